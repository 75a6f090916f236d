# SPDX-License-Identifier: Apache-2.0
"""One process of the runs under FSDP2 in plain torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_galore import GaLoreOptimizer, memory

from .cases import MODES, settings_of, start
from .processes import WORLD, begin, end
from .sharded_cases import CASES, TENSOR_PARALLEL, ShardedRun, plain_wire, sharded, together, trained


def tensor_parallel(mode: str) -> ShardedRun:
    """Both processes see the same data; one layer is cut by rows, the next by columns, the last is not cut at all."""
    case = TENSOR_PARALLEL[mode]
    model = start(case)
    plan = {"layers.0": ColwiseParallel(), "layers.2": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (WORLD,)), plan)
    optimizer = GaLoreOptimizer(case.base(model), model, **settings_of(case))
    return trained(model, optimizer, case, 0)


def budgeted() -> list[int]:
    """Bytes by which a budget is divided, of weights whose parts are not alike."""
    optimizer = sharded(CASES["step-shard"])[1]
    ranks = {target: target.projection.rank for target in optimizer.targets.values()}
    return list(memory.bytes_at(optimizer.base, optimizer.targets, optimizer.config, ranks).values())


def main(folder: Path) -> None:
    rank = begin()
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        try:
            results[name] = together(case, rank)
        except Exception as error:
            raise RuntimeError(f"case {name}") from error
    for mode in MODES:
        results[f"tensor-parallel-{mode}"] = tensor_parallel(mode)
    results["budgeted"] = budgeted()
    for name, case in CASES.items():
        if case.counted:
            results[f"plain-{name}"] = plain_wire(case, rank)
    end(folder, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
