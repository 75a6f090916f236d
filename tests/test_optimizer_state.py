# SPDX-License-Identifier: Apache-2.0
"""State dicts: what is in them, that a resumed run equals the unbroken one, and what is refused whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import galore_torch
import pytest
import torch
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer
from lightning_galore.state_keys import BASIS
from tests.helpers import Matrices, TinyTransformer, assert_state_whole, language_loss, same_bits, train

BASES: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "Adafactor": {"lr": 0.05},
    "Adagrad": {"lr": 0.05, "initial_accumulator_value": 0.1},
    "NAdam": {"lr": 0.01},
}


def start(name: str = "AdamW", dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, GaLoreOptimizer]:
    model = TinyTransformer(dtype=dtype)
    base = getattr(torch.optim, name)(model.parameters(), **BASES[name])
    return model, GaLoreOptimizer(base, model, **{"rank": 4, "update_proj_gap": 3, **settings})


def primitives(value: object) -> bool:
    if isinstance(value, dict):
        return all(primitives(key) and primitives(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(primitives, value))
    return value is None or type(value) in (Tensor, bool, int, float, str)


@pytest.mark.parametrize("name", BASES)
def test_state_dict_holds_tensors_and_numbers_only(name: str, tmp_path: Path) -> None:
    model, optimizer = start(name)
    train(model, optimizer, range(5))
    saved = optimizer.state_dict()
    assert primitives(saved)
    for state in saved["state"].values():
        assert_state_whole({key: value for key, value in state.items() if isinstance(value, Tensor)})
    torch.save(saved, tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert loaded["state"].keys() == saved["state"].keys()
    # A checkpoint is not larger than what it holds: no view drags a whole factor along.
    size = sum(t.numel() * t.element_size() for s in saved["state"].values() for t in s.values() if torch.is_tensor(t))
    assert (tmp_path / "optimizer.pt").stat().st_size < 2 * size + 60_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "storage"), [*((name, "param") for name in BASES), ("AdamW", "fp32"), ("AdamW", "bf16")]
)
def test_resumed_run_equals_the_unbroken_one(name: str, storage: str, dtype: torch.dtype, tmp_path: Path) -> None:
    whole, optimizer = start(name, dtype, basis_storage=storage)
    train(whole, optimizer, range(10))
    first, optimizer = start(name, dtype, basis_storage=storage)
    train(first, optimizer, range(5))
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    second, resumed = start(name, dtype, basis_storage=storage)
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for param, old in zip(second.parameters(), first.parameters(), strict=True):
        for key, value in optimizer.state[old].items():
            loaded = resumed.state[param][key]
            assert type(loaded) is type(value), key
            if isinstance(value, Tensor):
                assert loaded.dtype == value.dtype, key
                assert torch.equal(loaded, value), key
                assert loaded.data_ptr() != value.data_ptr(), key
    kept = {"param": dtype, "fp32": torch.float32, "bf16": torch.bfloat16}[storage]
    assert resumed.state[second.matrices()[0]][BASIS].dtype == kept
    train(second, resumed, range(5, 10))
    assert same_bits(second.parameters(), whole.parameters())


def test_state_dict_of_an_optimizer_that_was_never_stepped_loads() -> None:
    for name in BASES:
        model, optimizer = start(name)
        _, fresh = start(name)
        optimizer.load_state_dict(copy.deepcopy(fresh.state_dict()))
        other, plain = start(name)
        train(model, optimizer, range(3))
        train(other, plain, range(3))
        assert same_bits(model.parameters(), other.parameters())


def test_weight_that_never_had_a_gradient_does_not_stop_a_resume() -> None:
    for name in BASES:
        model, optimizer = start(name)
        model.blocks[0].up.requires_grad_(False)
        train(model, optimizer, range(2))
        _, resumed = start(name)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_full_rank_state_made_by_a_constructor_is_refused() -> None:
    full = torch.optim.Adagrad(TinyTransformer().parameters(), **BASES["Adagrad"])
    _, optimizer = start("Adagrad")
    with pytest.raises(
        ValueError, match=r"holds no subspace for blocks\.0\.query\.weight: its optimizer state is full-rank"
    ):
        optimizer.load_state_dict(full.state_dict())


def test_loading_is_by_keyword_too() -> None:
    _, optimizer = start()
    optimizer.load_state_dict(state_dict=optimizer.state_dict())


# -- refused, and nothing changed --------------------------------------------------------------------------------------


def full_rank_state() -> dict[str, Any]:
    model = TinyTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), **BASES["AdamW"])
    train(model, optimizer, range(2))
    return optimizer.state_dict()


def galore_torch_state() -> dict[str, Any]:
    model = TinyTransformer()
    keys = {"rank": 4, "update_proj_gap": 3, "scale": 1.0, "proj_type": "std"}
    params = [{"params": [param], **(keys if param.ndim == 2 else {})} for param in model.parameters()]
    optimizer = galore_torch.GaLoreAdamW(params, no_deprecation_warning=True)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    saved["param_groups"] = [{**saved["param_groups"][0], "params": list(range(len(params)))}]
    return saved


def state_of(**settings: Any) -> dict[str, Any]:
    model, optimizer = start(**settings)
    train(model, optimizer, range(2))
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (
            lambda: state_of(rank=5),
            r"subspace of blocks\.0\.query\.weight has rank=5, side=right .* rank=4, .* Set rank=5",
        ),
        (
            lambda: state_of(proj_type="left"),
            r"has rank=4, side=left .* this run has rank=4, side=right .* the proj_type of",
        ),
        (lambda: state_of(proj_type="full"), r"has rank=4, side=full .* this run has rank=4, side=right"),
        (
            full_rank_state,
            r"holds no subspace for blocks\.0\.query\.weight: its optimizer state is full-rank\. Load its",
        ),
        (
            galore_torch_state,
            r"blocks\.0\.query\.weight was written by galore_torch\. Convert it .* lightning-galore convert",
        ),
        (
            lambda: state_of(target_modules=[nn.Linear, "lm_head"]),
            r"A weight of shape \(24, 16\) was projected with rank 4 in the checkpoint and is not now\. Set rank, tar",
        ),
    ],
    ids=["rank", "side", "full side", "full-rank checkpoint", "galore-torch", "other targets"],
)
def test_state_that_does_not_fit_is_refused_and_nothing_changes(saved: Any, message: str) -> None:
    model, optimizer = start()
    other, twin = start()
    for one, opt in ((model, optimizer), (other, twin)):
        train(one, opt, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert state.keys() == after["state"][index].keys()
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(after["state"][index][k])) for k, v in state.items())
    train(model, optimizer, range(2, 5))
    train(other, twin, range(2, 5))
    assert same_bits(model.parameters(), other.parameters())


def test_groups_of_other_sizes_are_refused_by_torch() -> None:
    _, optimizer = start()
    saved = state_of()
    saved["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(saved)


# -- gradients that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("subspace", ["randomized", "svd", "gaussian"])
@pytest.mark.parametrize("bad_step", [0, 3, 4])
def test_gradient_that_is_not_finite_never_reaches_a_decomposition(
    subspace: str, bad_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("svd", "qr"):
        real = getattr(torch.linalg, name)

        def guarded(matrix: Tensor, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            assert bool(torch.isfinite(matrix).all())
            return real(matrix, *args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, guarded)
    model = Matrices((12, 8))
    (weight,) = model.parameters()
    # SGD without momentum keeps nothing of a bad gradient, so the weight is mended by hand and the run goes on.
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = GaLoreOptimizer(base, model, rank=2, update_proj_gap=3, subspace=subspace)
    refreshed = []
    for step in range(8):
        model.give_gradients(step)
        start_of_step, state = weight.detach().clone(), dict(optimizer.state[weight])
        if step == bad_step:
            weight.grad[5, 3] = float("nan")  # type: ignore[index]
        optimizer.step()
        new = optimizer.state[weight]
        if step == bad_step:
            due = step % 3 == 0
            assert torch.equal(weight, start_of_step) == due  # where a basis was to come from it the step is skipped
            assert bool(torch.isnan(weight).any()) == (not due)
            if step == 0:
                assert torch.equal(new[BASIS], torch.eye(8, 2))
                assert (new["galore_refreshed_at"], new["galore_refreshes"]) == (-1, 0)
            else:
                assert torch.equal(new[BASIS], state[BASIS])
            assert new["galore_failures"] == int(due)
            assert new.get("galore_step", 0) == state.get("galore_step", 0) + (not due)
            with torch.no_grad():
                weight.copy_(start_of_step)
        elif BASIS not in state or not torch.equal(new[BASIS], state[BASIS]):
            refreshed.append(step)
    # The refresh is tried again at the next step, and the grid counts the steps that were taken.
    expected = {0: [1, 4, 7], 3: [0, 4, 7], 4: [0, 3, 6]}[bad_step]
    assert refreshed == expected
    assert optimizer.state[weight]["galore_refreshes"] == 3
    assert optimizer.state[weight]["galore_failures"] == (0 if bad_step == 4 else 1)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("mode", ["step", "project", "layerwise"])
def test_weight_that_skips_a_step_is_as_if_the_step_had_not_been(name: str, mode: str) -> None:
    """The others go on; nothing of the bad gradient reaches the weight, the base's state of it or its subspace."""

    def run(bad: float | None) -> tuple[Matrices, GaLoreOptimizer]:
        """Eight steps; at the fourth, where all are due, the second weight has a bad gradient, or none at all."""
        model = Matrices((12, 8), (8, 12))
        base = getattr(torch.optim, name)(model.parameters(), **BASES[name])
        optimizer = GaLoreOptimizer(base, model, rank=2, update_proj_gap=3, stagger=False, mode=mode)
        for step in range(8):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            for i, weight in enumerate(model.parameters()):
                slope = torch.randn(weight.shape, generator=generator)
                if (step, i) == (3, 1):
                    if bad is None:
                        continue
                    slope[1, 2] = bad
                (weight * slope).sum().backward()
            optimizer.step()
        return model, optimizer

    expected, other = run(None)
    for bad in (float("inf"), float("nan")):
        model, optimizer = run(bad)
        assert same_bits(model.parameters(), expected.parameters())
        for weight, twin, failures in zip(model.parameters(), expected.parameters(), (0, 1), strict=True):
            ours, theirs = dict(optimizer.state[weight]), dict(other.state[twin])
            assert (ours.pop("galore_failures"), theirs.pop("galore_failures")) == (failures, 0)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key])) for key in ours)
            assert ours["galore_step"] == 8 - failures


@pytest.mark.parametrize("name", BASES)
def test_resumed_after_a_weight_has_sat_out_its_first_step(name: str) -> None:
    """The wrapped optimizer keeps nothing of it yet, not the ``step`` either that Adam looks for when it loads."""

    def start() -> tuple[Matrices, GaLoreOptimizer]:
        model = Matrices((12, 8), (8, 12))
        base = getattr(torch.optim, name)(model.parameters(), **BASES[name])
        return model, GaLoreOptimizer(base, model, rank=2, update_proj_gap=3, stagger=False)

    def go_on(model: Matrices, optimizer: GaLoreOptimizer) -> None:
        for step in range(1, 6):
            model.give_gradients(step)
            optimizer.step()

    model, optimizer = start()
    model.give_gradients(0)
    bad = next(model.parameters())
    bad.grad[1, 2] = torch.inf  # type: ignore[index]
    optimizer.step()
    resumed, loaded = start()
    resumed.load_state_dict(model.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert loaded.state[next(resumed.parameters())]["galore_failures"] == 1
    go_on(model, optimizer)
    go_on(resumed, loaded)
    assert same_bits(resumed.parameters(), model.parameters())


def test_zero_gradient_keeps_the_basis_and_the_weight() -> None:
    model = Matrices((12, 8))
    (weight,) = model.parameters()
    optimizer = GaLoreOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, rank=2, update_proj_gap=1)
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)
    assert torch.equal(optimizer.state[weight][BASIS], torch.eye(8, 2))
    model.give_gradients(0)
    optimizer.step()
    assert not torch.equal(weight, before)
    assert not torch.equal(optimizer.state[weight][BASIS], torch.eye(8, 2))


@pytest.mark.parametrize("fused", [True, False])
def test_grad_scaler_skips_an_overflow_and_unscales_for_a_fused_base(fused: bool) -> None:
    """The scaler lets a fused optimizer unscale by itself; hidden behind the wrapper it could not be told the scale."""

    def run(scaled: bool) -> TinyTransformer:
        model = TinyTransformer()
        base = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        optimizer = GaLoreOptimizer(base, model, rank=4, update_proj_gap=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000, enabled=scaled)
        for step in range(6):
            optimizer.zero_grad()
            overflow = step == 3
            if overflow and not scaled:
                continue
            loss = language_loss(model, step)
            scaler.scale(loss).backward()
            if overflow:
                model.matrices()[0].grad[0, 0] = float("inf")  # type: ignore[index]
            scaler.step(optimizer)
            scaler.update()
        assert not scaled or scaler.get_scale() == 2.0**9
        assert all(optimizer.state[weight]["galore_step"] == 5 for weight in model.matrices())
        return model

    assert same_bits(run(True).parameters(), run(False).parameters())
