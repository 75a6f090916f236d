# SPDX-License-Identifier: Apache-2.0
"""A process that fails takes the others with it, soon, and leaves whole checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .processes import launch

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
