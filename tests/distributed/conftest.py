# SPDX-License-Identifier: Apache-2.0
"""Results of the processes, each group of them started once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .processes import results_of
from .trainer_cases import MODES, Case, checkpoints, run_alone


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Runs in plain torch, a mapping from the case for each process."""
    return results_of("tests.distributed.plain_worker", tmp_path_factory)


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Runs under FSDP2 in plain torch, a mapping from the case for each process."""
    return results_of("tests.distributed.sharded_worker", tmp_path_factory)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Runs under the Trainer."""
    return results_of("tests.distributed.trainer_worker", tmp_path_factory, prepare=_begin_alone)


@pytest.fixture(scope="session")
def sharded_trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Runs under the Trainer with FSDP2."""
    return results_of("tests.distributed.sharded_trainer_worker", tmp_path_factory, prepare=_begin_alone)


def _begin_alone(folder: Path) -> None:
    for mode in MODES:  # two processes shall go on with what one has begun
        run_alone(Case(mode), callbacks=checkpoints(folder / f"alone-{mode}"), enable_checkpointing=True, max_epochs=1)
