# SPDX-License-Identifier: Apache-2.0
"""Every recipe goes through the real command line and trains for one step, on a tiny model and local rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_galore.cli import GaLoreCLI
from lightning_galore.optimizer import GaLoreOptimizer
from lightning_galore.tasks.glue_tasks import TASKS
from tests.tasks.tiny import build_tiny_model, write_pairs

RECIPES = Path(__file__).parent.parent / "recipes"
# Others have tests of their own: tests/tasks/test_gan.py, test_lora.py, test_shapes.py, tests/test_llama_recipes.py.
ELSEWHERE = ("gan", "lora", "conv", "instruct", *(f"llama/{path.stem}" for path in (RECIPES / "llama").glob("*.yaml")))
ALL = sorted(
    path for path in RECIPES.rglob("*.yaml") if path.relative_to(RECIPES).with_suffix("").as_posix() not in ELSEWHERE
)
GLUE = sorted(set(TASKS) - {"demo"})

# Appendix table of arXiv 2403.03507: the peak learning rates.
PAPER_LR = {
    4: {"mnli": 1e-5, "sst2": 1e-5, "mrpc": 3e-5, "cola": 3e-5, "qnli": 1e-5, "qqp": 1e-5, "rte": 1e-5, "stsb": 1e-5},
    8: {"mnli": 1e-5, "sst2": 2e-5, "mrpc": 2e-5, "cola": 1e-5, "qnli": 1e-5, "qqp": 2e-5, "rte": 2e-5, "stsb": 3e-5},
}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("tiny_roberta"))


def name_of(path: Path) -> str:
    return path.relative_to(RECIPES).with_suffix("").as_posix()


def test_every_task_has_both_ranks() -> None:
    assert {name_of(path) for path in ALL} == {f"glue/{task}_r{rank}" for task in GLUE for rank in (4, 8)} | {"demo"}


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_recipe_trains_one_step(path: Path, tiny_model: str, tmp_path: Path) -> None:
    task = yaml.safe_load(path.read_text())["model"]["init_args"]["task"]
    local = [f"--model.model={tiny_model}", f"--data.data_dir={write_pairs(tmp_path, task, rows=16)}"]
    size = ["--data.max_length=16", "--data.batch_size=8", "--trainer.strategy.update_proj_gap=1"]
    quick = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    cli = GaLoreCLI(args=["-c", str(path), *local, *size, *quick, "--trainer.enable_model_summary=false"], run=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    optimizer = cli.trainer.optimizers[0]
    assert isinstance(optimizer, GaLoreOptimizer)
    assert len(optimizer.targets) == 12  # six weights in each of the two layers
    assert cli.model.task.monitor in cli.trainer.callback_metrics  # type: ignore[union-attr]


@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("task", GLUE)
def test_glue_recipe_says_what_the_paper_says(task: str, rank: int) -> None:
    recipe = yaml.safe_load((RECIPES / "glue" / f"{task}_r{rank}.yaml").read_text())
    assert recipe["trainer"]["strategy"]["init_args"] == {
        "method": "galore",
        "rank": rank,
        "update_proj_gap": 500,
        "scale": {4: 4, 8: 2}[rank],
    }
    assert recipe["trainer"]["max_epochs"] == 30
    assert recipe["trainer"]["callbacks"]["init_args"] == {"monitor": TASKS[task].monitor, "mode": "max"}
    model = recipe["model"]["init_args"]
    # The paper has no WNLI; those recipes take the settings of RTE.
    assert float(model["lr"]) == PAPER_LR[rank]["rte" if task == "wnli" else task]
    assert (model["task"], model["model"]) == (task, "roberta-base")
    assert recipe["data"].get("init_args", {}) == ({"batch_size": 32} if task == "cola" else {})


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_recipe_starts_with_its_command(path: Path) -> None:
    assert f"-c recipes/{name_of(path)}.yaml" in path.read_text()


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_recipe_states_no_default_of_the_data(path: Path) -> None:
    data = yaml.safe_load(path.read_text())["data"].get("init_args", {})
    assert data.get("batch_size") != 16
    assert data.get("max_length") != 512
