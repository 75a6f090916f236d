# SPDX-License-Identifier: Apache-2.0
"""Every command that a page shows is run: as it stands, or with the substitutes that this file lists.

Substitutes are small: a tiny model and its rows for those of a hub, a plan of a small model for one of a large. What
costs much is parsed by the program itself. A command of a kind that is not listed is an error, so none is left out.
"""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lightning_galore.cli import main
from lightning_galore.weights import quantize
from tests.report.synthetic import write_run
from tests.tasks.tiny import build_tiny_model, write_pairs

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "recipes" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
PROGRAMS = ("lightning-galore", "make", "pip", "python", "torchrun")
TRAINS = ("fit", "validate", "test", "predict")
#: Models that are planned by name, for which a tiny configuration stands, and the numbers that go with them.
NAMED_MODELS = ("llama-7b", "llama-1b")
SMALLER = {"1024": "8", "256": "16", "16": "2"}
#: What a page leaves to the reader -> a file or folder that the fixture ``place`` makes.
PLACES = {"FOLDER": "pairs", "PATH": "saved.ckpt", "train.tsv": "pairs/train.tsv", "dev.tsv": "pairs/validation.tsv"}
QUICK = {
    "--trainer.fast_dev_run": "true",
    "--trainer.accelerator": "cpu",
    "--trainer.enable_progress_bar": "false",
    "--trainer.enable_model_summary": "false",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf8"), flags=re.DOTALL | re.MULTILINE)


def commands() -> dict[str, str]:
    """Each command once, with the page that shows it first."""
    found: dict[str, str] = {}
    for page in [*PAGES, *sorted((ROOT / "examples").glob("*.py"))]:  # tests/test_recipes.py has the heads of recipes
        lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
        # The heads of examples, and pages that indent instead of fencing.
        lines += re.findall(rf"^    ((?:{'|'.join(PROGRAMS)}) .*)$", page.read_text("utf8"), flags=re.MULTILINE)
        for line in lines:
            for part in re.split(r"&&|(?<!\S)#", line)[: None if "&&" in line else 1]:
                words = re.split(r" {4,}|\s#", part.strip())[0].strip()
                if words:
                    found.setdefault(words, str(page.relative_to(ROOT)))
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands run: the repository's folders, and what the pages suppose to be there."""
    for name in ("recipes", "examples", "benchmarks", "Makefile", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def options_of(words: list[str]) -> dict[str, str]:
    """``--key value`` and ``--key=value`` as a dictionary."""
    pairs = " ".join(words).replace("=", " ").split()
    return {key: value for key, value in zip(pairs, [*pairs[1:], ""], strict=True) if key.startswith("--")}


# -- each kind of command ----------------------------------------------------------------------------------------------


def run_make(words: list[str], place: Path, tiny: str) -> None:
    """The target is there, and what it would do can be listed."""
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def run_pip(words: list[str], place: Path, tiny: str) -> None:
    """The extras are extras. Nothing is installed."""
    assert words[1] == "install"
    extras = [extra for word in words for found in re.findall(r"\[(.+)\]", word) for extra in found.split(",")]
    assert all(re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE) for extra in extras)


def run_torchrun(words: list[str], place: Path, tiny: str) -> None:
    """Its options are torchrun's. Thirty-two processes are not started; tests/distributed starts two."""
    from torch.distributed.run import get_args_parser

    get_args_parser().parse_args(words[1:])


def run_python(words: list[str], place: Path, tiny: str) -> None:
    """Modules show their options; a script of ours has a test of its own, which runs it."""
    if words[1] != "-m":
        assert Path(words[1]).is_file()
        assert Path(words[1]).parts[0] == "examples"  # tests/examples runs every one of them
        return
    before, sys.argv = sys.argv, [words[2], "--help"]
    try:
        with pytest.raises(SystemExit, match="0"):
            runpy.run_module(words[2], run_name="__main__")
    finally:
        sys.argv = before


def run_plan(words: list[str], place: Path, tiny: str) -> None:
    """Planned of a tiny model, with numbers that fit it."""
    from transformers import LlamaConfig

    small = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
    small.save_pretrained(place)
    given = [word for word in words[2:] if word != "-c"]
    source, options = given[0], given[1:]
    if source.endswith(".yaml"):
        content = yaml.safe_load(Path(source).read_text())
        content["model"]["init_args"]["model"] = tiny
        content["data"] = {**content["data"], "init_args": {"max_length": 16, "batch_size": 2}}
        content["trainer"]["strategy"]["init_args"]["rank"] = 4
        source = str(place / "tiny.yaml")
        Path(source).write_text(yaml.safe_dump(content))
    elif source in NAMED_MODELS:
        source = "./config.json"
    options = [SMALLER.get(word, word) for word in options]
    if not source.endswith(".yaml") and "--sequence_length" not in options:
        options += ["--sequence_length", "16"]
    assert main(["plan", source, *options, "--candidates", "[adamw,galore-step]"]) == 0


def run_training(words: list[str], place: Path, tiny: str) -> None:
    """One batch on a tiny model; recipes without a tiny counterpart here are parsed by the program."""
    if any(word == "--print_config" or word.endswith(".help") for word in words):
        with pytest.raises(SystemExit, match="0"):
            main(words[1:])
        return
    recipe = next(word for word in words if word.endswith(".yaml"))
    content = yaml.safe_load(Path(recipe).read_text())
    task = content["model"].get("init_args", {}).get("task")
    words = [PLACES.get(word, word) for word in words]
    replaced = {**QUICK} if words[1] in TRAINS else {"--trainer.accelerator": "cpu"}
    if "GlueModule" in content["model"]["class_path"]:
        (place / "pairs").mkdir()
        write_pairs(place / "pairs", task, rows=16)
        replaced |= {"--model.model": tiny, "--data.max_length": "16", "--data.batch_size": "8"}
        if "--data.train_file" not in words:
            replaced["--data.data_dir"] = str(place / "pairs")
        if "--trainer.strategy=auto" not in words:
            replaced["--trainer.strategy.rank"] = "8"
    elif "RingGan" not in content["model"]["class_path"]:
        with pytest.raises(SystemExit, match="0"):
            main([*words[1:], "--print_config"])
        return
    given = [f"{key}={value}" for key, value in replaced.items()]
    if "--ckpt_path" in words:
        saved = [*words[2 : words.index("--ckpt_path")], *given, "--trainer.fast_dev_run=false"]
        one_batch = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.logger=false"]
        assert main(["fit", *saved, *one_batch]) == 0
        next((place / "checkpoints").glob("*.ckpt")).rename(place / words[words.index("--ckpt_path") + 1])
    assert main([*words[1:], *given]) == 0


def run_convert(words: list[str], place: Path, tiny: str) -> None:
    """A checkpoint that the true galore-torch has made, as a file or in a folder of Transformers' Trainer."""
    galore_torch = pytest.importorskip("galore_torch")
    source = place / words[2]
    weight = nn.Parameter(torch.randn(12, 8))
    galore = {"rank": 2, "update_proj_gap": 10, "scale": 1.0, "proj_type": "std"}
    optimizer = galore_torch.GaLoreAdamW([{"params": [weight], **galore}], no_deprecation_warning=True)
    weight.grad = torch.randn(12, 8)
    optimizer.step()
    if source.suffix:
        torch.save(optimizer.state_dict(), source)
    else:
        from safetensors.torch import save_file

        source.mkdir(parents=True)
        torch.save(optimizer.state_dict(), source / "optimizer.pt")
        save_file({"weight": weight.detach()}, source / "model.safetensors")
        (source / "trainer_state.json").write_text('{"global_step": 1, "epoch": 0.5}')
    assert main(words[1:]) == 0
    assert (place / words[3]).is_file()


def run_export(words: list[str], place: Path, tiny: str) -> None:
    """A model with int8 weights."""
    model = nn.Sequential(nn.Linear(64, 64))
    quantize(model, [model[0].weight])
    torch.save({"state_dict": model.state_dict()}, place / words[2])
    assert main(words[1:]) == 0
    assert (place / words[3]).is_file()


def run_report(words: list[str], place: Path, tiny: str) -> None:
    """A run of which the logs are made up."""
    pytest.importorskip("matplotlib")
    write_run(place / words[2], layers=1, steps=200, kinds=2)
    assert main(words[1:]) == 0
    assert (place / words[2] / "report" / "index.html").is_file()


def run_completion(words: list[str], place: Path, tiny: str) -> None:
    """Its script is tested in tests/cli."""
    if find_spec("shtab") is None:
        pytest.skip("completion scripts are made with shtab")
    assert main(words[1:3]) == 0


KINDS: dict[str, Callable[[list[str], Path, str], None]] = {
    "make": run_make,
    "pip": run_pip,
    "torchrun": run_torchrun,
    "python": run_python,
    "lightning-galore plan": run_plan,
    "lightning-galore convert": run_convert,
    "lightning-galore export": run_export,
    "lightning-galore report": run_report,
    "lightning-galore completion": run_completion,
    **{f"lightning-galore {name}": run_training for name in (*TRAINS, "targets")},
}


def kind_of(words: list[str]) -> str:
    return " ".join(words[:2]) if words[0] == "lightning-galore" else words[0]


def test_commands_are_found_and_none_is_of_an_unknown_kind() -> None:
    found = {command: kind_of(shlex.split(command)) for command in commands()}
    assert {command: kind for command, kind in found.items() if kind not in KINDS} == {}
    assert set(found.values()) == set(KINDS) - {"lightning-galore test", "lightning-galore predict"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "command", [pytest.param(one, marks=[pytest.mark.slow] if "--budget" in one else []) for one in commands()]
)
def test_command(command: str, place: Path, tiny: str) -> None:
    words = shlex.split(command)
    KINDS[kind_of(words)](words, place, tiny)


# -- Python and YAML ---------------------------------------------------------------------------------------------------


def python_blocks() -> list[Any]:
    numbered = [(page, number, block) for page in PAGES for number, block in enumerate(blocks(page, "python"))]
    return [pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}") for page, number, block in numbered]


@pytest.mark.parametrize("block", python_blocks())
def test_python_compiles_and_its_imports_are_there(block: str) -> None:
    """Many pages have a test that also runs their blocks; this holds for all."""
    try:
        tree = ast.parse(block)
    except SyntaxError:
        tree = ast.parse(f"{{{block}}}")  # a row for a dictionary
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


class Migrated(nn.Module):
    """A network whose modules have the names that the pages name."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp, self.head = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 4)


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "migrating").glob("*.md")), ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore")
def test_pages_on_migrating_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"model": Migrated()}
    found = blocks(page, "python")
    assert found
    for block in found:
        exec(compile(block, page.stem, "exec"), scope)
    if "base" in scope:
        # The optimizer of the page trains.
        weight = scope["model"].mlp.weight
        before = weight.detach().clone()
        weight.grad = torch.randn_like(weight)
        scope["scheduler"].step() if "scheduler" in scope else None
        scope["base"].param_groups[-1]["lr"] = 0.1
        GaLore = scope["GaLoreOptimizer"]  # noqa: N806
        wrapped = next(one for one in scope.values() if isinstance(one, GaLore)) if "groups" not in scope else None
        (wrapped or GaLore(scope["optimizer"], method="galore")).step()
        assert not torch.equal(weight.detach(), before)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks(page, "yaml"))
        if re.match(r"(seed_everything|trainer|model|data):", block)
    ],
)
def test_yaml_is_a_recipe(block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(block)
    model = [] if "model" in yaml.safe_load(block) else ["--model", "RingGan"]
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "-c", str(tmp_path / "recipe.yaml"), *model, "--print_config"])
    assert "strategy:" in capsys.readouterr().out
