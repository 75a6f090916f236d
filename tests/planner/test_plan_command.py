# SPDX-License-Identifier: Apache-2.0
"""``lightning-galore plan`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from lightning_galore.cli import main
from lightning_galore.planner.command import write_picture
from lightning_galore.planner.results import Column, Peak, Plan
from lightning_galore.planner.sharing import Devices
from lightning_galore.planner.table import as_text

ROOT = Path(__file__).parent.parent.parent
RECIPES = ROOT / "recipes"
SMALL = ["--candidates=[adamw,galore-layerwise]", "--checkpointing=false"]
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")


def planned(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    assert main(["plan", *args, *SMALL, "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


@pytest.mark.parametrize("spelling", [[], ["-c"], ["--config"]])
def test_a_recipe_without_its_data_and_weights(spelling: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, *spelling, str(RECIPES / "demo.yaml"))
    assert (found["model"], found["rank"], found["batch"], found["precision"]) == (
        *("minilm", 8, "32 x 64 tokens"),
        "32-true",
    )
    held = {column["name"]: column["moments"] + column["bases"] for column in found["columns"]}
    # The table of the README: measured on the run.
    assert held["adamw"] / 1e6 == pytest.approx(181.7, abs=0.05)
    assert held["galore-layerwise"] / 1e6 == pytest.approx(99.0, abs=0.05)


def test_options_win_over_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, str(RECIPES / "glue" / "rte_r4.yaml"), "--rank=2", "--batch_size=3", "--sequence_length=32")
    assert (found["model"], found["rank"], found["batch"]) == ("roberta-base", 2, "3 x 32 tokens")


def test_every_glue_recipe_is_known() -> None:
    from lightning_galore.cli.commands import _read_recipe
    from lightning_galore.planner.command import PlanOptions

    for path in sorted((RECIPES / "glue").glob("stsb*.yaml")):
        read = _read_recipe(str(path), PlanOptions(str(path)))
        job, config = read.job, read.config
        assert job.name == "roberta-base"
        assert job.batch["labels"].dtype.is_floating_point  # a regression
        assert config.method == "galore"


RUN = """
trainer:
  accumulate_grad_batches: 2
  strategy: {class_path: lightning_galore.GaLoreStrategy, init_args: {rank: 8, mode: layerwise, method: galore-8bit}}
model:
  class_path: lightning_galore.tasks.CausalLMModule
  init_args: {model: 60m, config: {num_hidden_layers: 1, vocab_size: 500}, optimizer: adamw8bit, checkpointing: true}
data: {class_path: lightning_galore.tasks.CausalLMDataModule, init_args: {batch_size: 2, block_size: 32}}
"""


def recipe_column(capsys: pytest.CaptureFixture[str], path: Path, *args: str) -> dict:
    assert main(["plan", str(path), *args, "--candidates=recipe", "--json"]) == 0
    (column,) = json.loads(capsys.readouterr().out)["columns"]
    return column  # type: ignore[no-any-return]


def test_the_recipe_is_the_first_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    own = recipe_column(capsys, path)
    assert main(["plan", str(path), "--candidates=[galore-8bit]", "--json"]) == 0
    (same,) = json.loads(capsys.readouterr().out)["columns"]
    assert {**own, "name": "", "label": ""} == {**same, "name": "", "label": ""}
    assert [peak["checkpointing"] for peak in own["peaks"]] == [True]  # as it says
    assert recipe_column(capsys, path, "--checkpointing=false")["peaks"][0]["checkpointing"] is False
    path.write_text(RUN.replace("layerwise", "step").replace("galore-8bit", "galore").replace("adamw8bit", "sgd"))
    assert recipe_column(capsys, path)["moments"] == 0
    path.write_text(RUN.replace("strategy:", "strategy: auto #"))
    assert recipe_column(capsys, path)["bases"] == 0
    path.write_text(RUN.replace("optimizer:", "lora_rank: 4, optimizer:").replace("galore-8bit}", "galore, rank: 2}"))
    with_factors = recipe_column(capsys, path)
    assert 0 < with_factors["moments"] < own["moments"] / 5


def test_what_is_planned_where_nothing_is_named() -> None:
    from lightning_galore.planner import CANDIDATES, Candidate, choose

    own = Candidate(name="recipe", label="", kind="full", base="sgd")
    usual = [candidate.name for candidate in choose(None, own)]
    assert usual == [
        *("recipe", "adamw", "adamw-8bit", "galore-step", "galore-project", "galore-layerwise", "galore-8bit"),
        *("q-galore", "lora"),
    ]
    assert list(choose(["all"])) == list(choose("all")) == list(CANDIDATES)
    assert [candidate.name for candidate in choose("apollo")] == ["apollo"]
    with pytest.raises(
        ValueError, match="candidates='recipe' is known of recipes of .* only; choose among adamw, .* or 'all'"
    ):
        choose(["recipe"])


def test_another_module_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, str(RECIPES / "gan.yaml"))
    assert found["columns"][1]["moments"] > 0
    assert "without a batch" in found["columns"][1]["missing"]
    assert main(["plan", str(RECIPES / "gan.yaml"), "--batch_size=3"]) == 2
    assert "batch_size=3 cannot be given for RingGan" in capsys.readouterr().err


def test_table_budget_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "plan.png"
    args = ["llama-60m", "--rank=64", "--batch_size=1", "--sequence_length=64", "--budget=1GB", f"--picture={picture}"]
    assert main(["plan", *args, *SMALL]) == 0
    out = capsys.readouterr().out
    assert "MiB (2^20 bytes)" in out
    assert "Fits into 1.00 GB (0.93 GiB)" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert out.endswith(f"The peaks are drawn in {picture}\n")


def test_a_picture_beside_json_is_said_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    args = ["--batch_size=1", "--sequence_length=8", "--candidates=adamw", "--checkpointing=false", "--json"]
    assert main(["plan", "llama-60m", *args, f"--picture={picture}"]) == 0
    found = capsys.readouterr()
    json.loads(found.out)
    assert f"The peaks are drawn in {picture}\n" in found.err


@pytest.mark.parametrize(("peak", "name"), [(3 * 2**31, "GiB (2^30 bytes)"), (2**20 * 300, "MiB (2^20 bytes)")])
def test_the_picture_has_the_unit_of_the_table(
    peak: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from lightning_galore.report import plan_bars

    worst = Peak(
        total=peak, by_category={"weights": peak}, where="step", step="ordinary", activations=0, checkpointing=False
    )
    found = Plan(
        model="m", parameters=1, rank=4, batch="b", precision="bf16-true", devices=Devices(),
        columns=(Column(name="a", label="a", mode="step", weights=peak, peaks=(worst,)),),
    )  # fmt: skip
    figures = []
    monkeypatch.setattr(plan_bars, "png", lambda figure: figures.append(figure) or b"")
    write_picture(found, tmp_path / "plan.png")
    (ax,) = figures[0].axes
    assert ax.get_xlabel() == f"{name} at the peak"
    assert ax.texts[0].get_text() == (" 6.00" if name.startswith("GiB") else " 300.00")
    assert name in as_text(found)


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "no-such-model"]) == 2
    err = capsys.readouterr().err
    assert "error: model='no-such-model' cannot be planned" in err
    assert "Traceback" not in err
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "llama-60m", "--rank=many"])
    with pytest.raises(SystemExit, match="0"):
        main(["plan", "--help"])
    text = capsys.readouterr().out
    assert "24GB" in text
    assert "usage: lightning-galore plan -c RECIPE.yaml" in text
    assert main(["plan", "-c", str(RECIPES / "dmo.yaml")]) == 2
    assert "there is no such file. Did you mean" in capsys.readouterr().err


def test_importing_the_package_brings_no_transformers_of_its_own() -> None:
    """Lightning's own imports (torchmetrics) may."""
    code = "import sys, {}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    own, others = (
        set(subprocess.run([sys.executable, "-c", code.format(names)], cwd=ROOT, check=True, capture_output=True,
                           text=True).stdout.split())
        for names in ("lightning_galore", "lightning.pytorch, torchmetrics")
    )  # fmt: skip
    assert not {"transformers", "matplotlib", "bitsandbytes", "datasets"} & (own - others)
