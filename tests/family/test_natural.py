# SPDX-License-Identifier: Apache-2.0
"""Natural GaLore: beside the plain formulas, resumed, and what it remembers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_galore.change import Change
from lightning_galore.config import GaLoreConfig
from lightning_galore.memory import held_bytes
from lightning_galore.state_keys import transform_entries
from lightning_galore.transforms.natural import Natural
from tests.reference.galore_reference import Adam
from tests.reference.natural_reference import NaturalGaLore

from .loops import RANKS, SHAPES, assert_resume_is_exact, copied, gradient, make, run

MODES: list[Any] = ["step", "project", "layerwise"]
SETTINGS: dict[str, Any] = {
    "method": "natural-galore",
    "rank": 3,
    "update_proj_gap": 8,
    "scale": 0.5,
    "fix_signs": False,
    "natural_damping": 0.3,
}


@pytest.mark.parametrize(
    ("shape", "rank", "mode"),
    [
        *((shape, rank, "step") for shape in SHAPES for rank in RANKS),
        ((12, 7), 3, "project"),
        ((7, 12), 3, "layerwise"),
    ],
)
def test_thirty_steps_are_those_of_the_formulas(shape: tuple[int, int], rank: int, mode: str) -> None:
    model, optimizer = make({**SETTINGS, "rank": rank, "mode": mode}, [shape])
    params = list(model.parameters())
    expected = copied(params)
    rule = NaturalGaLore(lr=1e-2, rank=rank, gap=8, scale=0.5, damping=0.3)
    plain, state = Adam(lr=1e-2), {}  # type: ignore[var-annotated]
    for step in range(30):
        run(optimizer, params, [step], spikes=False)
        for param, weight in zip(params, expected, strict=True):
            grad = gradient(step, weight.shape)
            if weight.ndim == 2:
                rule.apply_(weight, grad)
            else:  # not projected: as the wrapped optimizer does
                weight.add_(plain.update(grad, state, step + 1))
            torch.testing.assert_close(param.detach(), weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", [2, 11])
def test_a_resumed_run_ends_with_the_same_bits(stop: int, mode: Any) -> None:
    assert_resume_is_exact({**SETTINGS, "mode": mode}, stop=stop)
    assert_resume_is_exact({**SETTINGS, "mode": mode, "moments": "rotate_first"}, stop=stop, dtype=torch.bfloat16)


def test_bytes_are_as_predicted() -> None:
    model, optimizer = make(SETTINGS, dtype=torch.float32)
    predicted, of_each = optimizer.footprint(), held_bytes(optimizer.base, optimizer.targets, optimizer.config)
    assert predicted.transforms == 2 * 4 * (12 * 3) * 4
    run(optimizer, list(model.parameters()), range(2))
    entries = [transform_entries(state) for state in optimizer.state.values()]
    assert sum(value.nbytes for one in entries for value in one.values()) == predicted.transforms
    assert optimizer.footprint() == predicted
    assert held_bytes(optimizer.base, optimizer.targets, optimizer.config) == of_each


def test_a_rank_that_changes_takes_the_history_along() -> None:
    history = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))
    bases = [torch.linalg.qr(torch.randn(9, rank, generator=torch.Generator().manual_seed(rank))).Q for rank in (5, 2)]
    change = Change.between((bases[0],), (bases[1],), "left")
    carried = Natural().carried({"history": history}, change)["history"]
    torch.testing.assert_close(carried, bases[1].mT @ bases[0] @ history)
    assert Natural().carried({"history": history}, None) == {}


def test_directions_that_come_back_are_damped_and_zero_stays_zero() -> None:
    transform, entries = Natural(length=4, damping=1.0), {}  # type: ignore[var-annotated]
    common, other = torch.zeros(3, 4), torch.zeros(3, 4)
    common[0, 0], other[1, 1] = 1.0, 1.0
    for _ in range(4):
        grad = common.clone()
        entries = transform.apply_(grad, entries, second=None)
    assert float(grad[0, 0]) == pytest.approx(1 / 5)  # lambda / (lambda + 4)
    fresh = other.clone()
    transform.apply_(fresh, entries, second=None)
    assert float(fresh[1, 1]) == pytest.approx(1 / 2)
    zero = torch.zeros(3, 4)
    entries = transform.apply_(zero, {}, second=None)
    assert not bool(zero.any())
    # The scale of the loss does not matter, as it would with a constant lambda.
    small = transform.apply_(tiny := 1e-6 * common, {}, second=None)
    torch.testing.assert_close(tiny, 0.5e-6 * common)
    assert entries["history"].shape == small["history"].shape == (4, 3, 4)


def test_a_history_of_another_length_is_taken_over() -> None:
    long = Natural(length=6).apply_(torch.ones(2, 2), {"history": torch.full((2, 2, 2), 3.0)}, second=None)["history"]
    assert [float(one[0, 0]) for one in long] == [1.0, 3.0, 3.0, 0.0, 0.0, 0.0]
    short = Natural(length=2).apply_(torch.ones(2, 2), {"history": torch.full((5, 2, 2), 3.0)}, second=None)["history"]
    assert [float(one[0, 0]) for one in short] == [1.0, 3.0]


@pytest.mark.parametrize("setting", [{"natural_history": 0}, {"natural_damping": 0.0}])
def test_settings_out_of_range(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        GaLoreConfig(**setting)
