# SPDX-License-Identifier: Apache-2.0
"""How near an ordinary step comes to what the machine can do: its arithmetic and its traffic, beside measured rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from benchmarks.results import Table, megabytes
from benchmarks.timing import Clock, Plan, Spread, Work, side_by_side
from benchmarks.weights import WeightSet
from lightning_galore import gemm
from lightning_galore.subspace import Projection, resolve_side

_SQUARE = 1024  # of the product whose rate counts as the machine's
_COPIED = 2**24  # entries of the tensor that is copied: more than caches hold
BYTES = 4  # fp32


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the machine does in the run that it is compared with.

    Args:
        flops: Of a product of two large square matrices, a second.
        bytes: Read and written by a copy of a large tensor, a second.
    """

    flops: float
    bytes: float

    @classmethod
    def measure(cls, clock: Clock, device: torch.device) -> Rates:
        """The faster one of the ways to multiply that are there, and torch's copy."""
        one, other = (torch.randn(_SQUARE, _SQUARE, device=device) for _ in range(2))
        source = torch.ones(_COPIED, device=device)
        target = torch.empty_like(source)
        works: dict[str, Work] = {
            "mm": lambda: one @ other,
            "product": lambda: gemm.product(one, other),
            "copy": lambda: target.copy_(source),
        }
        with torch.no_grad():
            done = side_by_side(works, clock=clock, plan=Plan(seconds=2, least=5))
        median = {name: Spread.of(seconds).median for name, seconds in done.seconds.items()}
        return cls(
            flops=2 * _SQUARE**3 / min(median["mm"], median["product"]), bytes=2 * source.nbytes / median["copy"]
        )


@dataclass(frozen=True, kw_only=True)
class Least:
    """The least that an ordinary step over a set must do.

    Args:
        flops: Two products of every matrix with its basis.
        bytes: The gradient and the basis read, the weight and the moments read and written, all in fp32.
    """

    flops: float
    bytes: float

    @classmethod
    def of(cls, weights: WeightSet) -> Least:
        """Of one step over ``weights``, with the sides that ``proj_type="std"`` chooses."""
        flops = entries = 0
        for shape in weights.shapes:
            one = Projection(shape=shape, side=resolve_side("std", shape), rank=weights.rank)
            flops += 4 * math.prod(shape) * one.rank
            basis = sum(math.prod(own) for own in one.basis_shapes)
            entries += 3 * math.prod(shape) + 4 * math.prod(one.low_shape) + 2 * basis
        return cls(flops=flops, bytes=entries * BYTES)


def compared(weights: WeightSet, rates: Rates, seconds: float) -> dict[str, Any]:
    """An ordinary step that took ``seconds``, as shares of what the machine can do."""
    least = Least.of(weights)
    arithmetic, traffic = least.flops / rates.flops, least.bytes / rates.bytes
    return {
        "gflop": least.flops / 1e9,
        "gbyte": least.bytes / 1e9,
        "gflop_per_s": least.flops / seconds / 1e9,
        "gbyte_per_s": least.bytes / seconds / 1e9,
        "gemm_gflop_per_s": rates.flops / 1e9,
        "copy_gbyte_per_s": rates.bytes / 1e9,
        "arithmetic_alone_s": arithmetic,
        "traffic_alone_s": traffic,
        # Both at once is a bound that nothing passes; one after the other is what separate kernels can reach.
        "share_of_overlapped_limit": max(arithmetic, traffic) / seconds,
        "share_of_serial_limit": (arithmetic + traffic) / seconds,
    }


def table(measurements: Sequence[dict[str, Any]]) -> Table:
    """How near the ordinary steps of ``measurements`` come to the limits."""
    rows = []
    for held in measurements:
        own = held["limits"]
        rows.append(
            (
                held["name"],
                f"{own['gflop_per_s']:.0f} of {own['gemm_gflop_per_s']:.0f}",
                f"{own['gbyte_per_s']:.1f} of {own['copy_gbyte_per_s']:.1f}",
                f"{own['arithmetic_alone_s'] * 1e3:.1f}",
                f"{own['traffic_alone_s'] * 1e3:.1f}",
                f"{own['share_of_serial_limit']:.0%}",
            )
        )
    return Table(
        title="our ordinary step beside the machine's rates: a square product's and a copy's, of the same run",
        header=("weights", "GFLOP/s", "GB/s", "arithmetic alone, ms", "traffic alone, ms", "share of the two in turn"),
        rows=rows,
    )


def memory_table(measurements: Sequence[dict[str, Any]]) -> Table:
    """What the optimizers of ``measurements`` hold, and what a step of theirs takes for a moment."""
    names = dict.fromkeys(name for held in measurements for name in held["optimizers"])
    rows = []
    for name in names:
        own = [held["optimizers"].get(name) for held in measurements]
        cells = (f"{megabytes(row['state_bytes'])} / {megabytes(row['step_peak_bytes'])}" if row else "" for row in own)
        rows.append((name, *cells))
    return Table(
        title="memory, MB: state held / taken for a moment by an ordinary step",
        header=("optimizer", *(held["name"] for held in measurements)),
        rows=rows,
    )


def peak_bytes(work: Work, device: torch.device) -> int:
    """Bytes that one run of ``work`` allocates at its worst moment, beyond what was there before.

    From the allocator, on a CPU through torch's profiler.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    assert seen.profiler is not None
    # One by one: the profiler's own sums add up whatever happens inside an operator or an annotated block.
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes that the optimizer's state keeps alive, those of whole factors of which it shows a part."""
    storages: dict[int, int] = {}

    def note(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            own = value.untyped_storage()
            storages[own.data_ptr()] = own.nbytes()
        elif isinstance(value, (list, tuple)):
            for one in value:
                note(one)
        elif hasattr(value, "__dict__"):  # a projector
            note(list(vars(value).values()))

    for state in optimizer.state.values():
        note(list(state.values()))
    return sum(storages.values())
