# SPDX-License-Identifier: Apache-2.0
"""Tensor-GaLore (method="tensor-galore") against plain formulas, and the faults of neuralop's version (TG-1, TG-3)."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_galore import GaLoreConfig, GaLoreOptimizer, storage
from lightning_galore.change import change_between
from lightning_galore.state_keys import BASIS, BASIS_RIGHT, LAYOUT
from lightning_galore.subspace import Known, Tucker, TuckerProjection, WarmTucker, seeded_generator
from lightning_galore.subspace.tensors import tucker_ranks
from tests.family.tensors import MODES, SHAPES, Tensors, give, gradient, wrapped
from tests.helpers import assert_orthonormal, assert_state_whole, max_difference
from tests.reference import tensor_galore_reference as reference
from tests.reference.galore_reference import Adam, Momentum

STEPS, GAP = 30, 7
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
RANKS: list[Any] = [1, 2, 4, 0.4, "tuple"]


def ranks_of(name: str, rank: Any) -> Any:
    return tuple(max(1, d - 1) for d in SHAPES[name]) if rank == "tuple" else rank


def trained(
    shape: tuple[int, ...], steps: range, *, memory_format: Any = None, base: Any = None, **settings: Any
) -> Any:
    model = Tensors(shape)
    weight = model.weights[0]
    if memory_format is not None:
        weight.data = weight.data.to(memory_format=memory_format)
    optimizer = wrapped(model, base and base(model.parameters()), **settings)
    run(weight, optimizer, steps)
    return weight, optimizer


def run(weight: Tensor, optimizer: GaLoreOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        give(weight, gradient(tuple(weight.shape), step))
        optimizer.step()


def expected(shape: tuple[int, ...], ranks: tuple[int, ...], **settings: Any) -> Tensor:
    weight = Tensors(shape).weights[0].detach().clone()
    plain = reference.TensorGaLore(**{"rule": Adam(lr=0.01), "ranks": ranks, "gap": GAP, "scale": 0.5, **settings})
    for step in range(STEPS):
        plain.apply_(weight, gradient(shape, step))
    return weight


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", SHAPES)
def test_thirty_steps_are_those_of_the_formulas(name: str, rank: Any, mode: Any) -> None:
    shape, rank = SHAPES[name], ranks_of(name, rank)
    weight, optimizer = trained(
        shape, range(STEPS), method="tensor-galore", rank=rank, update_proj_gap=GAP, scale=0.5, mode=mode
    )
    ranks = tucker_ranks(shape, rank)
    assert optimizer.targets[weight].projection.layout == ranks
    assert max_difference([weight], [expected(shape, ranks)]) < 1e-6
    assert optimizer.subspaces()[0].num_refreshes == math.ceil(STEPS / GAP)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", SHAPES)
def test_bases_that_are_found_anew_are_those_of_the_formulas(name: str, rank: Any) -> None:
    shape, rank = SHAPES[name], ranks_of(name, rank)
    settings: dict[str, Any] = {"method": "tensor-galore", "subspace": "tucker", "update_proj_gap": GAP, "scale": 0.5}
    weight, _ = trained(shape, range(STEPS), rank=rank, **settings)
    assert max_difference([weight], [expected(shape, tucker_ranks(shape, rank), warm=False)]) < 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["decoupled", "coupled", "rotated"])
@pytest.mark.parametrize("name", ["tall", "wide", "conv3d"])
def test_decay_acts_once_and_moments_turn_with_the_modes(name: str, kind: str, mode: Any) -> None:
    shape = SHAPES[name]
    settings: dict[str, Any] = {"method": "tensor-galore", "rank": 2, "update_proj_gap": GAP, "scale": 0.5}
    more: dict[str, Any] = {}
    if kind == "decoupled":
        base: Any = lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.5)  # noqa: E731
        more = {"decoupled": 0.5}
    elif kind == "coupled":
        base = lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=0.3)  # noqa: E731
        more = {"rule": Momentum(lr=0.01), "coupled": 0.3}
    else:
        base = lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9)  # noqa: E731
        more, settings["moments"] = {"rule": Momentum(lr=0.01), "rotates": True}, "rotate"
    weight, _ = trained(shape, range(STEPS), base=base, mode=mode, **settings)
    assert max_difference([weight], [expected(shape, tucker_ranks(shape, 2), **more)]) < 1e-6


@pytest.mark.parametrize("name", ["tall", "wide", "conv3d"])
def test_memory_format_of_the_weight_does_not_matter(name: str) -> None:
    shape = SHAPES[name]
    settings: dict[str, Any] = {"method": "tensor-galore", "rank": 2, "update_proj_gap": GAP, "scale": 0.5}
    weight, _ = trained(shape, range(STEPS), memory_format=CHANNELS_LAST[len(shape)], **settings)
    assert weight.is_contiguous(memory_format=CHANNELS_LAST[len(shape)])
    assert max_difference([weight], [expected(shape, tucker_ranks(shape, 2))]) < 1e-6


def test_bases_are_refreshed_every_gap() -> None:
    """TG-1: neuralop finds its factors once and never again, so that its gap and warm restart do nothing."""
    shape, seen = SHAPES["conv1d"], []
    model = Tensors(shape)
    optimizer = wrapped(model, method="tensor-galore", rank=2, update_proj_gap=3)
    for step in range(10):
        run(model.weights[0], optimizer, range(step, step + 1))
        seen.append([optimizer.state[model.weights[0]][key].clone() for key in (BASIS, BASIS_RIGHT, f"{BASIS}_2")])
    for step in range(1, 10):
        same = [torch.equal(one, other) for one, other in zip(seen[step], seen[step - 1], strict=True)]
        assert same == [step % 3 != 0] * 3
    energy = optimizer.subspaces()[0].energy_at_refresh
    assert energy is not None
    assert energy > 0.5
    for basis in seen[-1]:
        assert_orthonormal(basis, atol=1e-12)


def test_a_first_gradient_of_zero_begins_with_unit_vectors_and_is_tried_again() -> None:
    model = Tensors(SHAPES["conv1d"])
    weight, optimizer = model.weights[0], wrapped(model, method="tensor-galore", rank=2, update_proj_gap=50)
    give(weight, torch.zeros(SHAPES["conv1d"]))
    optimizer.step()
    assert torch.equal(optimizer.state[weight][BASIS], torch.eye(9, 2, dtype=torch.float64))
    assert optimizer.subspaces()[0].num_failures == 1
    run(weight, optimizer, range(1))
    assert optimizer.subspaces()[0].num_refreshes == 1
    bad = gradient(SHAPES["conv1d"], 3)
    bad[0, 0, 0] = torch.nan
    before = weight.detach().clone()
    optimizer.set_schedule(update_proj_gap=1)
    optimizer.zero_grad()
    give(weight, bad)
    optimizer.step()  # it sits the step out
    assert torch.equal(weight, before)


# -- finding bases -----------------------------------------------------------------------------------------------------


def found(grad: Tensor, ranks: tuple[int, ...], known: Any = None) -> tuple[Tensor, ...]:
    projection = TuckerProjection.of(tuple(grad.shape), ranks)
    generator = seeded_generator(grad.device, seed=0, name="w", draw=0)
    result = (Tucker() if known is None else WarmTucker()).find(grad, projection, generator=generator, known=known)
    assert result is not None
    return result.bases


def energy(grad: Tensor, ranks: tuple[int, ...], bases: tuple[Tensor, ...]) -> float:
    low = TuckerProjection.of(tuple(grad.shape), ranks).project(grad, bases)
    return float(low.square().sum() / grad.square().sum())


def test_a_tensor_of_the_ranks_is_kept_whole() -> None:
    shape, ranks = (12, 10, 6), (3, 2, 4)
    core = torch.randn(ranks, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for mode, (d, r) in enumerate(zip(shape, ranks, strict=True)):
        core = reference.mode_product(core, torch.linalg.qr(torch.randn(d, r, dtype=torch.float64)).Q, mode)
    bases = found(core, ranks)
    assert energy(core, ranks, bases) == pytest.approx(1.0, abs=1e-12)
    # A warm restart from bases of something else finds it as well.
    other = found(torch.randn(shape, dtype=torch.float64), ranks)
    assert energy(core, ranks, found(core, ranks, Known(bases=other))) == pytest.approx(1.0, abs=1e-6)


def test_iteration_keeps_more_than_each_unfolding_by_itself() -> None:
    gains = []
    for seed in range(10):
        grad = torch.randn(12, 10, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ranks = (3, 2, 3)
        plain = tuple(reference.leading(reference.unfolding(grad, k), ranks[k]) for k in range(3))
        gains.append(energy(grad, ranks, found(grad, ranks)) / energy(grad, ranks, plain))
    assert min(gains) >= 1 - 1e-9
    assert max(gains) > 1.05


def test_a_gradient_that_the_last_bases_do_not_touch_is_found_anew() -> None:
    grad = torch.zeros(8, 7, 6, dtype=torch.float64)
    grad[5, 5, 5] = 1.0
    old = tuple(torch.eye(d, 2, dtype=torch.float64) for d in grad.shape)
    assert energy(grad, (2, 2, 2), found(grad, (2, 2, 2), Known(bases=old))) == pytest.approx(1.0)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_half_precision_and_magnitude(magnitude: float) -> None:
    grad = (gradient((12, 10, 6), 0) * magnitude).bfloat16()
    bases = found(grad, (2, 2, 2))
    for basis, other in zip(bases, found(grad.double() / magnitude, (2, 2, 2)), strict=True):
        assert basis.dtype == torch.float32
        assert_orthonormal(basis)
        torch.testing.assert_close(basis.double(), other, rtol=0, atol=1e-4)


# -- geometry ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "rank", "ranks"),
    [
        ((64, 32, 3, 3), 8, (8, 8, 3, 3)),
        ((64, 32, 3, 3), (16, 40, 3, 2), (16, 32, 3, 2)),
        ((64, 1, 3, 3), 16, (9, 1, 3, 3)),  # no mode wider than the others together
        ((4, 4, 4), 9, (4, 4, 4)),
        ((64, 32, 3, 3), 1, (1, 1, 1, 1)),
    ],
)
def test_ranks_of_modes(sizes: Any, rank: Any, ranks: Any) -> None:
    assert tucker_ranks(sizes, rank) == ranks


def test_what_is_said_of_ranks() -> None:
    projection = TuckerProjection.of((8, 4, 3, 3), (2, 4, 3, 2))
    assert (projection.label, projection.rank, projection.modes) == ("2x4x3x2", 2, (0, 3))
    assert projection.with_rank(1) is projection


@pytest.mark.parametrize("share", [0.02, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("sizes", [(64, 32, 3, 3), (32, 32, 16, 8), (128, 64, 5)])
def test_a_fraction_is_the_share_of_entries_in_core_and_bases(sizes: tuple[int, ...], share: float) -> None:
    ranks = tucker_ranks(sizes, share)
    held = math.prod(ranks) + sum(d * r for d, r in zip(sizes, ranks, strict=True) if r < d)
    assert held <= share * math.prod(sizes)
    assert held > 0.35 * share * math.prod(sizes)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", [name for name in SHAPES if len(SHAPES[name]) > 3])
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_project_and_back_are_mode_products(name: str, channels_last: bool, dtypes: Any) -> None:
    shape, (dtype, kept) = SHAPES[name], dtypes
    projection = TuckerProjection.of(shape, tucker_ranks(shape, 2))
    generator = torch.Generator().manual_seed(0)
    bases = tuple(
        torch.linalg.qr(torch.randn(d, r, generator=generator).double()).Q.to(kept) for d, r in projection.basis_shapes
    )
    wide = {k: basis.double() for k, basis in zip(projection.modes, bases, strict=True)}
    weight = torch.randn(shape, generator=generator).to(dtype)
    if channels_last:
        weight = weight.to(memory_format=CHANNELS_LAST[len(shape)])
    low = projection.project(weight, bases)
    assert low.dtype == dtype
    assert low.shape == projection.low_shape
    tolerance = 1e-12 if dtype == torch.float64 else 2.0**-7
    exact = reference.core_of(weight.double(), wide)
    torch.testing.assert_close(low.double().reshape(exact.shape), exact, rtol=tolerance, atol=tolerance)
    result = 0.9 * weight.double() + 0.5 * reference.back(low.double().reshape(exact.shape), wide)
    address = weight.data_ptr()
    projection.add_back_(weight, low, bases, alpha=0.5, beta=0.9)
    assert weight.data_ptr() == address
    torch.testing.assert_close(weight.double(), result, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("shape", "ranks"),
    [
        ((64, 16, 3, 3), (8, 2, 2, 2)),
        ((16, 64, 3, 3), (15, 8, 3, 3)),  # the first mode saves next to nothing
        ((16, 16, 2, 31), (2, 2, 2, 3)),
    ],
)
def test_a_step_makes_no_full_size_temporary(
    shape: tuple[int, ...], ranks: tuple[int, ...], channels_last: bool
) -> None:
    projection = TuckerProjection.of(shape, ranks)
    bases = tuple(torch.linalg.qr(torch.randn(d, r)).Q for d, r in projection.basis_shapes)
    weight, grad = torch.randn(shape), torch.randn(shape)
    if channels_last:
        weight, grad = (one.to(memory_format=torch.channels_last) for one in (weight, grad))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        projection.add_back_(weight, projection.project(grad, bases), bases, alpha=1.0, beta=0.9)
    assert all(event.self_cpu_memory_usage < weight.nbytes / 2 for event in profile.events())


def test_moments_change_with_each_mode() -> None:
    projection = TuckerProjection.of((9, 8, 3, 7), (3, 2, 3, 4))
    pairs = [
        tuple(torch.linalg.qr(torch.randn(d, r, generator=torch.Generator().manual_seed(s)).double()).Q
              for d, r in projection.basis_shapes)
        for s in (1, 2)
    ]  # fmt: skip
    change = change_between(pairs[0], pairs[1], projection)
    low = torch.randn(projection.low_shape, dtype=torch.float64)
    core, squares = low.reshape(3, 2, 3, 4), low.square().reshape(3, 2, 3, 4)
    for mode, old, new in zip(projection.modes, *pairs, strict=True):
        core = reference.mode_product(core, new.T @ old, mode)
        squares = reference.mode_product(squares, (new.T @ old).square(), mode)
    torch.testing.assert_close(change.rotate(low), core.reshape(3, -1))
    torch.testing.assert_close(change.rotate_squares(low.square()), squares.reshape(3, -1))
    torch.testing.assert_close(
        change.rotate(torch.stack([low, 2 * low])), torch.stack([core, 2 * core]).reshape(2, 3, -1)
    )
    assert not change.changes_rank
    assert change.fits(low)
    assert not change.fits(low.mT)
    assert torch.equal(change.resize(low, fill="mean"), low)
    ones = torch.ones_like(low)
    torch.testing.assert_close(change.average(ones), ones)


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("basis_storage", ["param", "int8"])
def test_resume_is_exact(mode: Any, basis_storage: Any) -> None:
    settings: dict[str, Any] = {"rank": 2, "update_proj_gap": 4, "mode": mode, "basis_storage": basis_storage}
    for shape in (SHAPES["wide"], SHAPES["conv1d"]):
        whole, one = trained(shape, range(12), method="tensor-galore", **settings)
        half, saver = trained(shape, range(6), method="tensor-galore", **settings)
        file = io.BytesIO()
        torch.save({"weight": half.detach(), "optimizer": saver.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed, loader = trained(shape, range(0), method="tensor-galore", **settings)
        resumed.data.copy_(saved["weight"])
        loader.load_state_dict(saved["optimizer"])
        run(resumed, loader, range(6, 12))
        assert torch.equal(resumed, whole)
        assert_state_whole(loader.state[resumed])
        for key, value in one.state[whole].items():
            other = loader.state[resumed][key]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


def test_a_checkpoint_of_other_ranks_is_refused() -> None:
    shape = (8, 8, 8)
    _, saver = trained(shape, range(1), method="tensor-galore", rank=(2, 8, 8))
    # The same shapes of bases, but of another mode.
    for rank in ((8, 2, 8), (2, 2, 8), (3, 8, 8)):
        weight, loader = trained(shape, range(0), method="tensor-galore", rank=rank)
        with pytest.raises(ValueError, match=r"weights\.0 has .*rank.*Set rank"):
            loader.load_state_dict(saver.state_dict())
        assert not loader.state[weight]
    _, folded = trained(shape, range(0), method="galore", rank=2)
    with pytest.raises(ValueError, match=r"side=modes and bases"):
        folded.load_state_dict(saver.state_dict())


@pytest.mark.parametrize("basis_storage", ["param", "bf16", "int8", "int4"])
@pytest.mark.parametrize("base", ["AdamW", "SGD", "Adagrad", "Adafactor", "RMSprop", "Muon"])
def test_planned_bytes_are_those_held(base: str, basis_storage: Any) -> None:
    shapes = [(40, 24, 3, 3), (12, 30, 5), (16, 1, 3, 3)]
    model = Tensors(*shapes, dtype=torch.float32)
    given = {"momentum": 0.9} if base == "SGD" else {}
    if base == "Muon":
        with pytest.raises(ValueError, match="2D"):
            torch.optim.Muon(model.parameters())
        return
    optimizer = wrapped(
        model,
        getattr(torch.optim, base)(model.parameters(), lr=0.01, **given),
        method="tensor-galore",
        rank=4,
        basis_storage=basis_storage,
    )
    planned = {row.name: row.state_bytes for row in optimizer.targets_table().taken}
    predicted = optimizer.footprint()
    for weight in model.weights:
        give(weight, gradient(tuple(weight.shape), 0))
    optimizer.step()
    held = {target.name: storage.nbytes(optimizer.state[weight]) for weight, target in optimizer.targets.items()}
    assert planned == held
    assert optimizer.footprint() == predicted
    assert predicted.bases == sum(
        storage.nbytes([v for k, v in optimizer.state[w].items() if k.startswith(BASIS)]) for w in model.weights
    )
    saved = [status.bytes_saved for status in optimizer.subspaces()]
    assert all(one > 0 for one in saved) or base == "Adafactor"


@pytest.mark.parametrize("moments", ["keep", "rotate", "rotate_first", "reset"])
@pytest.mark.parametrize("schedule", ["fixed", "adaptive", "cos", "energy"])
def test_it_composes_with_the_other_axes(moments: Any, schedule: Any) -> None:
    shape = SHAPES["conv3d"]
    weight, optimizer = trained(
        shape, range(20), subspace="tucker", rank=2, update_proj_gap=4, moments=moments, schedule=schedule
    )
    assert bool(torch.isfinite(weight).all())
    status = optimizer.subspaces()[0]
    assert status.num_refreshes > 1
    assert status.overlap is not None
    assert 0 <= status.overlap <= 1
    assert (status.side, status.shape) == ("modes", (6, 120))


@pytest.mark.parametrize("base", ["Adafactor", "RMSprop", "Adamax", "Adagrad"])
def test_other_optimizers_under_rotation(base: str) -> None:
    weight, optimizer = trained(
        SHAPES["conv1d"],
        range(20),
        base=lambda params: getattr(torch.optim, base)(params, lr=0.01),
        subspace="tucker",
        rank=3,
        update_proj_gap=4,
        moments="rotate",
    )
    assert bool(torch.isfinite(weight).all())
    assert optimizer.subspaces()[0].num_refreshes == 5


def test_bf16_and_stochastic_rounding_move_the_weight() -> None:
    for stochastic in (False, True):
        model = Tensors((16, 8, 3, 3), dtype=torch.bfloat16)
        optimizer = wrapped(model, method="tensor-galore", rank=4, stochastic_round=stochastic, update_proj_gap=3)
        before = model.weights[0].detach().clone()
        run(model.weights[0], optimizer, range(8))
        assert model.weights[0].dtype == torch.bfloat16
        assert not torch.equal(model.weights[0], before)
        assert optimizer.state[model.weights[0]][BASIS].dtype == torch.bfloat16


def test_accumulation_is_in_the_core() -> None:
    shape = SHAPES["tall"]
    ends = []
    for mode in MODES:
        model = Tensors(shape)
        weight, optimizer = (
            model.weights[0],
            wrapped(model, method="tensor-galore", rank=2, update_proj_gap=3, mode=mode),
        )
        for step in range(6):
            optimizer.zero_grad()
            with optimizer.accumulate():
                give(weight, gradient(shape, step))
            give(weight, gradient(shape, step + 50))
            assert mode == "step" or weight.grad is None
            optimizer.step()
        ends.append(weight.detach().clone())
    assert max_difference(ends[:1], ends[1:2]) < 1e-9
    assert max_difference(ends[:1], ends[2:]) < 1e-9


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rank": (2, 2, 2)},
            r"rank=\(2, 2, 2\) names a rank for each mode, which subspace='randomized' does not know",
        ),
        ({"rank_pattern": {"a": (2, 2, 2)}}, r"use subspace='tucker', or one rank"),
        ({"subspace": "tucker", "rank": (2, 2)}, r"a rank for each of three modes or more"),
        ({"subspace": "tucker", "rank": (2, 0, 2)}, r"must be at least 1; each mode"),
        ({"subspace": "tucker", "rank_rule": "energy"}, r"rank_rule='energy' looks at singular values"),
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaLoreConfig(**settings)


def test_ranks_that_do_not_fit_the_weight_are_refused_by_name() -> None:
    model = Tensors((8, 8, 8, 8))
    with pytest.raises(ValueError, match=r"rank=\(2, 2, 2\) has 3 entries for a weight of shape \(8, 8, 8, 8\)"):
        wrapped(model, method="tensor-galore", rank=(2, 2, 2))
    with pytest.raises(ValueError, match=r"rank=\(2, 2, 2\) for weights of shape \(8, 8\): a matrix has one rank"):
        wrapped(Tensors((8, 8)), method="tensor-galore", rank=(2, 2, 2))
    with pytest.raises(ValueError, match="rank = 9 reaches every mode: nothing would be saved"):
        wrapped(model, method="tensor-galore", rank=9)
    both = wrapped(Tensors((8, 8, 8)), method="tensor-galore", rank=3, rank_pattern={"weights": [4, 2, 8]})
    assert next(iter(both.targets.values())).projection.label == "4x2x8"


def test_copies_keep_their_geometry() -> None:
    weight, optimizer = trained((8, 8, 8), range(3), method="tensor-galore", rank=2)
    twin = copy.deepcopy(optimizer)
    ((param, target),) = twin.targets.items()
    assert twin.state[param][LAYOUT] == (2, 2, 2)
    assert target.projection == optimizer.targets[weight].projection
