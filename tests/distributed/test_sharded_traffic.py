# SPDX-License-Identifier: Apache-2.0
"""What low-rank training hands to collectives under FSDP2, beside what FSDP2 itself does."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from lightning_galore.subspace import Projection

from .cases import MODES, build
from .processes import WORLD
from .sharded_cases import CASES, STEPS
from .test_sharded import run_of

pytestmark = pytest.mark.multiprocess
Results = list[dict[str, Any]]
Calls = Counter[tuple[str, int]]
COUNTED = [name for name, case in CASES.items() if case.counted]
#: The dimension along which each weight is cut.
CUTS = {
    "even": (0, 0, 0),
    "long": (0, 1, 0),
    "long-shard": (0, 1, 0),
    "even-reverse": (0, 0, 0),
    "even-full": (0, 0, 0),
}

#: Numbers that announce a refresh.
HEADER = 33


def ours(results: Results, name: str, rank: int) -> list[Calls]:
    """Calls of each step that a bare optimizer would not make."""
    plain = Counter(results[rank][f"plain-{name}"])
    steps = [Counter(sent) for sent in run_of(results, name, rank).wire]
    assert sum(plain.values()) >= 6
    for step in steps:
        assert plain <= step
    return [step - plain for step in steps]


def low_ranks(name: str) -> list[Projection]:
    return [target.projection for target in build(CASES[name])[1].targets.values()]


def ordinary(name: str) -> Calls:
    """What the formulas say of a step without a refresh."""
    calls: Calls = Counter()
    for projection, cut in zip(low_ranks(name), CUTS[name.split("-", 1)[1]], strict=True):
        numbers, (rows, columns) = math.prod(projection.low_shape), projection.shape
        if projection.side == "full":  # both the divided dimension and the other one are projected
            calls["all_reduce", numbers] += 1
        elif cut == (0 if projection.side == "left" else 1):  # the projected dimension is divided
            calls["reduce_scatter_tensor", numbers] += 1
            calls["all_gather_into_tensor", numbers // WORLD] += 1
        elif "shard" in name:
            size = (columns if projection.side == "right" else rows) * projection.rank
            # To project with, and to lift with; in mode "layerwise" the one follows upon the other.
            calls["all_gather_into_tensor", size // WORLD] += 1 if name.startswith("layerwise") else 2
    return calls


@pytest.mark.parametrize("name", COUNTED)
def test_an_ordinary_step_sends_what_the_formulas_say(sharded: Results, name: str) -> None:
    for rank in range(WORLD):
        steps, wanted = ours(sharded, name, rank), ordinary(name)
        assert sum(step == wanted for step in steps) >= 3
        assert all(wanted <= step for step in steps[1:])


@pytest.mark.parametrize("mode", MODES)
def test_where_weights_are_cut_along_the_other_dimension_nothing_travels(sharded: Results, mode: str) -> None:
    assert not ordinary(f"{mode}-long")
    assert sum(not step for step in ours(sharded, f"{mode}-long", 0)) >= 3


@pytest.mark.parametrize("name", COUNTED)
def test_a_refresh_gathers_each_gradient_once_and_shares_its_basis(sharded: Results, name: str) -> None:
    shapes = {math.prod(projection.shape) // WORLD: projection for projection in low_ranks(name)}
    for rank in range(WORLD):
        run, more = run_of(sharded, name, rank), Counter(dict(ordinary(name)))
        refreshes = sum(state["galore_refreshes"] for state in run.state.values())
        gathers, headers, bases = 0, 0, 0
        for step in ours(sharded, name, rank):
            extra = step - more
            here = sum(count for (call, _), count in extra.items() if call == "gather_")
            assert all(size in shapes for call, size in extra if call == "gather_")
            gathers += here
            headers += extra["broadcast_", HEADER]
            sent = {size: count for (call, size), count in extra.items() if call == "broadcast_"}
            bases += sum(size * count for size, count in sent.items() if size not in (HEADER, 1))
        assert gathers == headers == refreshes >= 6
        per_refresh = {s.shape: sum(math.prod(basis) for basis in s.basis_shapes) for s in shapes.values()}
        states = zip(low_ranks(name), run.state.values(), strict=True)
        assert bases == sum(state["galore_refreshes"] * per_refresh[one.shape] for one, state in states)


@pytest.mark.parametrize("name", CASES)
def test_no_process_has_two_whole_gradients(sharded: Results, name: str) -> None:
    alone = CASES[name].mesh == (2, 1)  # nothing to gather
    for rank in range(WORLD):
        assert run_of(sharded, name, rank).most_whole == (0 if alone else 1)


@pytest.mark.parametrize("name", [f"{mode}-{name}" for mode in MODES for name in ("deep", "even", "full-shard")])
def test_the_work_of_refreshing_is_divided(sharded: Results, name: str) -> None:
    runs = [run_of(sharded, name, rank) for rank in range(WORLD)]
    total = sum(state["galore_refreshes"] for state in runs[0].state.values())
    assert sum(run.refreshes for run in runs) == total
    assert min(run.refreshes for run in runs) >= total // 2 - 1
    assert STEPS > 10
