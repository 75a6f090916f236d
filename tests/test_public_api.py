# SPDX-License-Identifier: Apache-2.0
"""The public names are typed: each argument and each answer, and a user's program passes ``mypy --strict``."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lightning_galore
from lightning_galore.memory import Footprint
from lightning_galore.refresh import RefreshEvent
from lightning_galore.report import ReportFiles, write_report
from lightning_galore.watch import SubspaceStatus

ROOT = Path(__file__).parent.parent
PUBLIC = [
    *(getattr(lightning_galore, name) for name in lightning_galore.__all__ if name != "__version__"),
    *(Footprint, RefreshEvent, ReportFiles, SubspaceStatus, write_report),
]

# What a user writes, with every public name in it.
CONSUMER = """
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from typing_extensions import assert_type

import lightning_galore
from lightning_galore import (
    GaLoreConfig,
    GaLoreDDPStrategy,
    GaLoreModelParallelStrategy,
    GaLoreOptimizer,
    GaLoreSingleDeviceStrategy,
    GaLoreStrategy,
    GradNormMonitor,
    MemoryMonitor,
    SubspaceScheduler,
    plan,
)
from lightning_galore.memory import Footprint
from lightning_galore.refresh import RefreshEvent
from lightning_galore.report import ReportFiles, write_report
from lightning_galore.watch import SubspaceStatus

config = GaLoreConfig(rank=0.25, method="galore", target_modules=[nn.Linear])
model = nn.Linear(8, 8)
optimizer = GaLoreOptimizer(torch.optim.AdamW(model.parameters()), model, config, mode="project")
optimizer.step()
optimizer.zero_grad()
with optimizer.accumulate():
    model(torch.ones(1, 8)).sum().backward()
assert_type(optimizer.grad_norm(), Tensor)
assert_type(optimizer.subspaces(), list[SubspaceStatus])
assert_type(optimizer.footprint(), Footprint)


def note(event: RefreshEvent) -> None:
    assert_type(event.overlap, float | None)


optimizer.on_refresh(note)()
for strategy in (GaLoreStrategy(rank=8), GaLoreDDPStrategy(rank=8), GaLoreModelParallelStrategy(rank=8)):
    Trainer(strategy=strategy, callbacks=[SubspaceScheduler(), MemoryMonitor(), GradNormMonitor()])
GaLoreSingleDeviceStrategy(device="cpu", mode="layerwise")
assert_type(plan(model, rank=8).as_dict(), dict[str, Any])
assert_type(write_report(Path("logs")), ReportFiles)
assert_type(lightning_galore.__version__, str)
"""


def functions(thing: Any) -> Iterator[tuple[str, Any]]:
    """A public function, or what a class of ours defines under a public name, its constructor included."""
    if inspect.isfunction(thing):
        yield thing.__qualname__, thing
        return
    for base in thing.__mro__:
        if not base.__module__.startswith("lightning_galore"):
            continue
        for name, member in vars(base).items():
            function = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
            if inspect.isfunction(function) and (name == "__init__" or not name.startswith("_")):
                yield f"{thing.__name__}.{name}", function


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_every_argument_and_answer_has_a_type(thing: Any) -> None:
    found = dict(functions(thing))
    assert found or inspect.isclass(thing)
    for name, function in found.items():
        if getattr(function, "__module__", "").startswith("lightning_galore"):
            signature = inspect.signature(function)
            arguments = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
            assert all(p.annotation is not p.empty for p in arguments), f"{name}{signature}"
            # A dataclass writes its own constructor.
            assert signature.return_annotation is not signature.empty or name.endswith("__init__"), name


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_every_public_name_is_described(thing: Any) -> None:
    assert inspect.getdoc(thing)
    module = inspect.getmodule(thing)
    assert module is not None
    assert module.__name__.startswith("lightning_galore")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_users_program_passes_mypy_strict(tmp_path: Path) -> None:
    assert all(f"    {name},\n" in CONSUMER for name in lightning_galore.__all__ if name != "__version__")
    path = tmp_path / "consumer.py"
    path.write_text(CONSUMER, encoding="utf8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent", str(path)]
    environment = {**os.environ, "MYPYPATH": str(ROOT), "MYPY_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
