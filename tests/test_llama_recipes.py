# SPDX-License-Identifier: Apache-2.0
"""The recipes of language models go through the real command line and train one step, tiny and on local rows."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("datasets")
pytest.importorskip("bitsandbytes")

from lightning_galore.cli import GaLoreCLI, main
from lightning_galore.optimizer import GaLoreOptimizer
from lightning_galore.report import write_report
from lightning_galore.tasks import CausalLMModule
from lightning_galore.tasks.tokenizing import train_bpe
from tests.strategies.modules import expect_warning
from tests.tasks.texts import TINY, VOCABULARY, sentences, write_jsonl

RECIPES = Path(__file__).parent.parent / "recipes"
LLAMA = sorted(path.stem for path in (RECIPES / "llama").glob("*.yaml"))
QUICK = [
    "--trainer.fast_dev_run=true",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.strategy.rank=4",
    "--trainer.strategy.update_proj_gap=1",
]
# Rank, learning rate, steps: tables 2, 3 and 5 of arXiv 2403.03507; the 7B's learning rate and gap of its scripts.
PAPER = {
    "60m": (128, 0.01, 10_000),
    "130m": (256, 0.01, 20_000),
    "350m": (256, 0.01, 60_000),
    "1b": (512, 0.01, 100_000),
    "7b": (1024, 0.005, 150_000),
    "7b_24gb": (1024, 0.005, 150_000),
    "7b_16gb": (1024, 0.004, 150_000),  # arXiv 2407.08296
}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(train_bpe(sentences(), VOCABULARY, tmp_path_factory.mktemp("bpe")))


@pytest.fixture
def text(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "text.jsonl", sentences()[:300])


PLANNED = {
    name: float(found[1])
    for name in LLAMA
    if (found := re.search(r"([\d.]+) GB at its peak", (RECIPES / "llama" / f"{name}.yaml").read_text()))
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "60m" else pytest.mark.slow) for name in sorted(PLANNED)]
)
def test_the_head_says_what_the_plan_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(RECIPES / "llama" / f"{name}.yaml"), "--candidates=recipe", "--json"]) == 0
    (column,) = json.loads(capsys.readouterr().out)["columns"]
    assert column["peaks"][0]["total"] / 1e9 == pytest.approx(PLANNED[name], rel=0.005)


def test_every_published_size_is_planned() -> None:
    assert set(PLANNED) == set(PAPER)


def settings(name: str) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())  # type: ignore[no-any-return]


def fitted(name: str, *args: str) -> GaLoreCLI:
    cli = GaLoreCLI(args=["-c", str(RECIPES / f"{name}.yaml"), *args], run=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    return cli


@pytest.mark.parametrize("name", LLAMA)
def test_llama_recipe_trains_one_step(name: str, bpe: str, text: str, tmp_path: Path) -> None:
    shape = {key: value for key, value in TINY.items() if key != "vocab_size" or name != "tiny_c4"}
    given = (
        [f"--data.vocab_size={VOCABULARY}", f"--data.tokenizer_dir={tmp_path}"]
        if name == "tiny_c4"
        else [f"--data.tokenizer_name={bpe}", "--data.streaming=true", "--data.num_workers=0"]
    )
    small = [
        f"--data.files={text}",
        "--data.block_size=16",
        "--data.batch_size=2",
        f"--model.config={json.dumps(shape)}",
    ]
    cli = fitted(f"llama/{name}", *QUICK, *given, *small)
    optimizer = cli.trainer.optimizers[0]
    assert isinstance(optimizer, GaLoreOptimizer)
    assert len(optimizer.targets) == 7
    assert cli.trainer.callback_metrics["val/perplexity"] > 1
    assert cli.trainer.callback_metrics["train/tokens"] == 2 * 16
    assert cli.model.net.config.vocab_size == VOCABULARY  # type: ignore[union-attr]
    checkpointed = settings(f"llama/{name}")["model"]["init_args"].get("checkpointing", False)
    assert any(getattr(part, "gradient_checkpointing", False) for part in cli.model.modules()) is checkpointed


def tiny_run(folder: Path, text: str, *args: str) -> Path:
    """A few steps of the recipe of `make pretrain`, logged into ``folder``."""
    shape = {key: value for key, value in TINY.items() if key != "vocab_size"}
    data = [f"--data.files={text}", f"--data.vocab_size={VOCABULARY}", f"--data.tokenizer_dir={folder.parent / 'bpe'}"]
    size = ["--data.block_size=16", "--data.batch_size=2", f"--model.config={json.dumps(shape)}"]
    steps = ["--trainer.max_steps=6", "--trainer.val_check_interval=3", "--trainer.log_every_n_steps=1"]
    logs = ["--trainer.enable_checkpointing=false", "--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}"]
    fitted("llama/tiny_c4", *QUICK[1:4], *data, *size, *steps, *logs, *args)
    return folder


def test_the_recipe_of_make_pretrain_leaves_a_whole_report_and_trains_as_without(text: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    low = ["--trainer.strategy.rank=4", "--trainer.strategy.update_proj_gap=2"]
    watched = tiny_run(tmp_path / "watched", text, *low)
    assert write_report(watched).missing == {}
    plain = tiny_run(tmp_path / "plain", text, *low, "--trainer.callbacks=null")

    def losses(folder: Path) -> list[tuple[str, ...]]:
        with next(folder.rglob("metrics.csv")).open(newline="") as file:
            rows = [(row["step"], row["train/loss"], row["val/loss"]) for row in csv.DictReader(file)]
        return [row for row in rows if any(row[1:])]

    assert losses(watched) == losses(plain)
    assert len(losses(plain)) == 8


def test_the_recipe_of_make_pretrain_runs_full_rank(text: str, tmp_path: Path) -> None:
    with expect_warning("SubspaceScheduler found no projected optimizer under SingleDeviceStrategy: there are no"):
        tiny_run(tmp_path / "full", text, "--trainer.strategy=auto")
    assert not list(tmp_path.rglob("galore_refreshes.csv"))


@pytest.mark.parametrize("name", PAPER)
def test_llama_recipe_says_what_the_paper_says(name: str) -> None:
    recipe = settings(f"llama/{name}")
    rank, lr, steps = PAPER[name]
    trainer, model = recipe["trainer"], recipe["model"]["init_args"]
    strategy = trainer["strategy"]["init_args"]
    assert (strategy["rank"], model["lr"], trainer["max_steps"]) == (rank, lr, steps)
    # On one small card nothing is accumulated; see the head of those recipes.
    blocks = trainer.get("accumulate_grad_batches", 1) * recipe["data"]["init_args"].get("batch_size", 16)
    assert blocks == (16 if name in ("7b_24gb", "7b_16gb") else 512)
    assert trainer["precision"] == "bf16-true"
    assert model["model"] == name.split("_")[0]
    if name == "7b_16gb":
        assert (strategy["method"], model["optimizer"], strategy["mode"]) == ("q-galore", "adamw8bit", "layerwise")
    elif name.startswith("7b"):
        assert (strategy["method"], model["optimizer"], strategy["update_proj_gap"]) == (
            "galore-8bit",
            "adamw8bit",
            500,
        )
        assert (strategy["mode"] == "layerwise") is (name == "7b_24gb")
    else:
        assert strategy == {"method": "galore", "rank": rank}
    # Warm-up over a tenth, a cosine to a tenth, scale 0.25 and gap 200 are the defaults.
    lm = CausalLMModule(model="60m")
    assert (lm.warmup_ratio, lm.min_lr_ratio) == (0.1, 0.1)


def write_model_and_answers(folder: Path, bpe: str) -> list[str]:
    """A tiny model with its tokenizer and rows to train it on, as options."""
    from transformers import AutoTokenizer

    lm = CausalLMModule(model="60m", config=TINY)
    lm.configure_model()
    lm.net.save_pretrained(folder / "model")  # type: ignore[union-attr, operator]
    AutoTokenizer.from_pretrained(bpe).save_pretrained(folder / "model")
    rows = [{"prompt": text, "response": text[:20]} for text in sentences()[:80]]
    files = folder / "answers.jsonl"
    files.write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = ["--data.max_length=256", "--data.validation_size=0.3"]
    return [f"--model.model={folder / 'model'}", f"--data.files={files}", '--data.template="{prompt}\\n"', *size]


def test_instruction_recipe_trains_one_step(bpe: str, tmp_path: Path) -> None:
    cli = fitted("instruct", *QUICK, *write_model_and_answers(tmp_path, bpe))
    optimizer = cli.trainer.optimizers[0]
    assert isinstance(optimizer, GaLoreOptimizer)
    assert len(optimizer.targets) == 7
    assert cli.trainer.callback_metrics["val/perplexity"] > 1


def test_lora_is_one_flag_of_the_same_recipe(bpe: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    flags = ["--trainer.strategy=auto", "--model.lora_rank=4"]
    cli = fitted("instruct", *QUICK[:4], *write_model_and_answers(tmp_path, bpe), *flags)
    trained = [name for name, param in cli.model.named_parameters() if param.requires_grad]
    assert len(trained) == 14
    assert all("lora_" in name for name in trained)
    assert sum(len(group["params"]) for group in cli.trainer.optimizers[0].param_groups) == 14


@pytest.mark.parametrize("name", [*(f"llama/{name}" for name in LLAMA), "instruct"])
def test_recipe_starts_with_its_command_hardware_and_memory(name: str) -> None:
    head = (RECIPES / f"{name}.yaml").read_text().split("seed_everything")[0]
    assert f"-c recipes/{name}.yaml" in head
    assert re.search(r"# Hardware: .*", head)
    assert re.search(r"\d [GM]B", head)


def test_a_language_model_recipe_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES / "llama" / "tiny_c4.yaml")
    assert main(["plan", "-c", recipe, "--candidates=[adamw]", "--checkpointing=false", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["rank"], found["batch"]) == ("llama-60m", 48, "8 x 128 tokens")
    assert found["parameters"] == 3_344_064
