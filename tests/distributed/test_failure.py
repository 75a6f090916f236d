# SPDX-License-Identifier: Apache-2.0
"""A process that fails takes the others with it, soon, and leaves whole checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_galore.strategies.sharded_files import consolidated
from tests.strategies.modules import Tiny

from .processes import launch
from .sharded_trainer_cases import listing, on_one
from .test_trainer import difference

pytestmark = pytest.mark.multiprocess


def test_one_failure_ends_all_and_leaves_whole_checkpoints(tmp_path: Path) -> None:
    one, other = launch("tests.distributed.failure_worker", tmp_path, timeout=90, patient=True)
    assert "ArithmeticError: this process has had enough" in other.output
    assert other.code not in (0, None)
    assert one.code not in (0, None), "hung, or went on alone"
    assert one.seconds - other.seconds < 25
    # Steps 6 and later were never taken, and what was being written when it ended is under no final name.
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=2.ckpt", "step=4.ckpt"]
    checkpoint = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


@pytest.mark.parametrize("way", ["raised", "killed"])
def test_one_failure_under_fsdp2_ends_all_and_leaves_whole_checkpoints(way: str, tmp_path: Path) -> None:
    folder = tmp_path / way
    folder.mkdir()
    one, other = launch("tests.distributed.sharded_failure_worker", folder, timeout=90, patient=True)
    if way == "raised":
        assert "ArithmeticError: this process has had enough" in other.output
    assert other.code == (-9 if way == "killed" else 1)
    assert one.code not in (0, None), "hung, or went on alone"
    assert one.seconds - other.seconds < 25
    whole = ["last.ckpt", "step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    assert [name for name in listing(folder / "saved") if not name.startswith(".")] == whole
    # What was being written when it was killed is under no final name: the last one is that of step 4 still.
    assert (".last.ckpt.part" in listing(folder / "saved")) == (way == "killed")
    for name in whole:
        checkpoint = consolidated(folder / "saved" / name)
        steps = checkpoint["global_step"]
        assert steps == (int(name[5]) if name != "last.ckpt" else 4 if way == "killed" else 6)
        reached = on_one({"mode": "layerwise"}, Tiny(), max_steps=steps)
        assert difference(checkpoint["state_dict"], reached["weights"]) <= 1e-5
        assert len(checkpoint["optimizer_states"][0]["state"]) == len(reached["weights"])
