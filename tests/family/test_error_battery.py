# SPDX-License-Identifier: Apache-2.0
"""What must hold for each preset with a lift of its own, whatever its formulas: modes, resume, bytes, precisions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_galore import GaLoreOptimizer, storage
from lightning_galore.config import METHODS
from lightning_galore.lift import LIFTS
from tests.family.common import LR, SHAPES, advance, backward, made, saved_and_loaded
from tests.helpers import TinyTransformer, assert_state_whole, max_difference, same_bits, train

PRESETS: dict[str, dict[str, Any]] = {
    "ldadam": {},
    "frugal": {"update_proj_gap": 4},
    "golore": {"update_proj_gap": 4, "random_after": 6},
    "swan": {"update_proj_gap": 4},
}


def base_of(method: str, params: Any, **how: Any) -> torch.optim.Optimizer:
    kind: Any = torch.optim.SGD if method == "swan" else torch.optim.AdamW
    return kind(params, lr=LR, **how)


def build(method: str, *shapes: tuple[int, int], dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return made(
        lambda params: base_of(method, params),
        *(shapes or SHAPES),
        dtype=dtype,
        **{"method": method, "rank": 4, **PRESETS[method], **settings},
    )


def modes(method: str) -> list[Any]:
    needs = LIFTS[METHODS[method].get("lift", "project_back")].needs_grad
    return ["step", "layerwise"] if needs else ["step", "project", "layerwise"]


CASES = [(method, mode) for method in PRESETS for mode in modes(method)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "mode"), [case for case in CASES if case[1] != "step"])
def test_modes_agree_to_the_bit(method: str, mode: Any, dtype: torch.dtype) -> None:
    runs = []
    for one in ("step", mode):
        model, optimizer = build(method, mode=one, dtype=dtype)
        advance(model, optimizer, range(10))
        runs.append([*model.parameters()])
    assert same_bits(*runs)


@pytest.mark.parametrize(("method", "mode"), CASES)
def test_accumulation(method: str, mode: Any) -> None:
    """Two halves of a gradient in two backwards are the whole one."""
    model, optimizer = build(method, mode=mode, dtype=torch.float64)
    other, twin = build(method, mode=mode, dtype=torch.float64)
    for step in range(8):
        optimizer.zero_grad()
        # The second half from the same weights: in mode "layerwise" they move in the last backward.
        with optimizer.accumulate():
            backward(model, step, share=0.5)
        backward(model, step, share=0.5)
        optimizer.step()
        advance(other, twin, [step])
    assert max_difference(model.parameters(), other.parameters()) < 1e-10


@pytest.mark.parametrize("settings", [{}, {"basis_storage": "int4"}, {"proj_type": "full"}], ids=str)
@pytest.mark.parametrize(("method", "mode"), CASES)
def test_resume_is_exact(method: str, mode: Any, settings: dict[str, Any]) -> None:
    def make() -> Any:
        model = TinyTransformer(layers=1)
        both = {"method": method, "rank": 6, "mode": mode, **PRESETS[method], **settings}
        return model, GaLoreOptimizer(base_of(method, model.parameters()), model, **both)

    whole, trained = make()
    train(whole, trained, range(14))
    first, before = make()
    train(first, before, range(7))
    saved = saved_and_loaded({"model": first.state_dict(), "optimizer": before.state_dict()})
    again, resumed = make()
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, range(7, 14))
    assert same_bits(again.parameters(), whole.parameters())
    assert all(bool(torch.isfinite(weight).all()) for weight in whole.parameters())
    for weight in whole.matrices():
        assert_state_whole(trained.state[weight])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_storage", ["param", "int8"])
@pytest.mark.parametrize(("method", "mode"), CASES)
def test_bytes_are_predicted(method: str, mode: Any, weight_storage: Any, dtype: torch.dtype) -> None:
    model, optimizer = build(method, mode=mode, weight_storage=weight_storage, dtype=dtype)
    predicted = optimizer.footprint()
    table = optimizer.targets_table().rows
    advance(model, optimizer, range(2))
    assert optimizer.footprint() == predicted
    held = {optimizer.targets[weight].name: storage.nbytes(optimizer.state[weight]) for weight in model.parameters()}
    assert {row.name: row.state_bytes for row in table} == held
    lifted = [value for state in optimizer.state.values() for key, value in state.items() if "lift" in key]
    assert predicted.lifts == storage.nbytes(lifted)
    whole = sum(m * n for m, n in SHAPES) * dtype.itemsize
    assert predicted.lifts == (whole if method == "ldadam" else 0)


@pytest.mark.parametrize("weight_storage", ["param", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "mode"), CASES)
def test_a_small_language_model_learns(method: str, mode: Any, dtype: torch.dtype, weight_storage: Any) -> None:
    model = TinyTransformer(dtype=dtype)
    start = [weight.detach().clone() for weight in model.matrices()]
    settings = {"method": method, "rank": 4, "mode": mode, "weight_storage": weight_storage, **PRESETS[method]}
    optimizer = GaLoreOptimizer(base_of(method, model.parameters()), model, **settings)
    losses = train(model, optimizer, [0] * 40)
    assert losses[-1] < (1.0 if method == "golore" else 0.8) * losses[0]  # whose scale is 0.25
    for weight, old in zip(model.matrices(), start, strict=True):
        assert not torch.equal(weight.detach() - old, torch.zeros_like(old))


@pytest.mark.parametrize("method", PRESETS)
def test_nothing_moves_where_the_wrapped_optimizer_fails(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build(method)
    advance(model, optimizer, range(3))
    before = saved_and_loaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    backward(model, 3)
    with monkeypatch.context() as patched:
        patched.setattr(optimizer.base, "step", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
    after = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    assert same_bits(after["model"].values(), before["model"].values())
    states = [one["optimizer"]["state"] for one in (after, before)]
    for index in states[0]:
        for key, value in states[0][index].items():
            same = torch.equal(value, states[1][index][key]) if isinstance(value, torch.Tensor) else None
            assert same or value == states[1][index][key], key
