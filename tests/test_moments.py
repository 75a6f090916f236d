# SPDX-License-Identifier: Apache-2.0
"""What becomes of the wrapped optimizer's state at a change of basis: every policy, every optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_galore import base_rules, base_state, moments
from lightning_galore.change import Change
from lightning_galore.moments import MOMENTS, first_moment
from lightning_galore.subspace import Projection
from tests.reference import moments_reference as reference
from tests.test_optimizer_bases import BASES, build

# Shape of the weight, side, rank.
GEOMETRIES = {
    "tall": Projection((24, 10), "right", 4),
    "wide": Projection((10, 24), "left", 4),
    "square": Projection((12, 12), "right", 5),
    "full": Projection((12, 18), "full", 5),
    "rank one": Projection((24, 10), "right", 1),
    "rank one, full": Projection((12, 18), "full", 1),
    "largest rank": Projection((10, 24), "left", 10),
}
BOTH_SIDES_AND_FULL = ["tall", "wide", "full"]
BETAS = (0.9, 0.999)
# What bitsandbytes ships and is not refused; on the CPU, "paged" is ordinary memory.
BNB: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["Adagrad", "Adagrad8bit", "Adam", "Adam8bit", "AdamW", "AdamW8bit", "PagedAdamW8bit"], {}),
    **dict.fromkeys(["AdEMAMix", "AdEMAMix8bit", "Lion", "Lion8bit", "RMSprop", "RMSprop8bit"], {}),
    **dict.fromkeys(["SGD", "SGD8bit"], {"momentum": 0.9}),
}
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def bnb_base(name: str, params: Any) -> Optimizer:
    bnb = pytest.importorskip("bitsandbytes")
    return getattr(bnb.optim, name)(params, lr=2.0**-7, **BNB[name])


def make_base(name: str, params: Any) -> Optimizer:
    if name.startswith("bnb-"):
        return bnb_base(name.removeprefix("bnb-"), params)
    return build(name, "plain", params)


EVERY_BASE = [*BASES, *(f"bnb-{name}" for name in BNB)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_bases(projection: Projection, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    drawn = (torch.randn(shape, generator=generator(seed), dtype=torch.float64) for shape in projection.basis_shapes)
    return tuple(torch.linalg.qr(basis).Q.to(dtype) for basis in drawn)


def nearby_bases(projection: Projection, bases: tuple[Tensor, ...], seed: int = 9) -> tuple[Tensor, ...]:
    """Bases of a subspace that overlaps the old one, as after some steps."""
    noise = (torch.randn(basis.shape, generator=generator(seed)) for basis in bases)
    return tuple(torch.linalg.qr(basis + 0.2 * n).Q for basis, n in zip(bases, noise, strict=True))


def signed_permutations(rank: int, count: int) -> list[Tensor]:
    """Orthogonal matrices ``(r, r)`` that swap coordinates and flip signs."""
    order = torch.randperm(rank, generator=generator(3))
    signs = torch.where(torch.arange(rank) % 2 == 0, -1.0, 1.0)
    return [torch.eye(rank)[order] * signs] * count


def exactly(matrix: Tensor, projection: Projection) -> Change:
    """A change by ``matrix`` on each projected side, without the rounding errors of bases."""
    return Change(
        left=None if projection.side == "right" else matrix, right=None if projection.side == "left" else matrix
    )


class Stepper:
    """An optimizer over one low-rank proxy, replaced before each step as a wrapper would."""

    def __init__(self, name: str, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> None:
        self.proxy = nn.Parameter(torch.zeros(shape, dtype=dtype))
        self.base = make_base(name, [self.proxy])

    @property
    def group(self) -> dict[str, Any]:
        return self.base.param_groups[0]

    @property
    def state(self) -> dict[str, Any]:
        return self.base.state.get(self.proxy, {})

    def replace(self, state: Mapping[str, Any], shape: tuple[int, int]) -> None:
        dtype = self.proxy.dtype
        self.base.state.pop(self.proxy, None)
        self.proxy = nn.Parameter(torch.zeros(shape, dtype=dtype))
        self.group["params"] = [self.proxy]
        if state:
            self.base.state[self.proxy] = dict(state)

    def step(self, grad: Tensor) -> Tensor:
        """The update that the optimizer makes of ``grad``."""
        state = self.state
        self.replace(state, tuple(grad.shape))
        if type(self.base).__name__ == "Adafactor":
            self.group["eps"] = (None, 1.0)  # its step is relative to the weight, which a proxy is not
        self.proxy.grad = grad.clone().to(self.proxy.dtype)
        self.base.step()
        return self.proxy.detach().clone()

    def run(self, shape: tuple[int, int], steps: int, seed: int = 0) -> Stepper:
        for grad in torch.randn((steps, *shape), generator=generator(seed)):
            self.step(grad + 0.3)
        return self

    def carry(self, policy: str, change: Change) -> Mapping[str, Any]:
        return MOMENTS[policy]().carry(self.base, self.state, self.group, change)


def tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def assert_all_finite(state: Mapping[str, Any]) -> None:
    assert all(bool(torch.isfinite(value).all()) for value in tensors(state).values())


def of_rank(projection: Projection, rank: int) -> tuple[Change, tuple[int, int]]:
    """A change to a nearby subspace of another rank, and the shape of its low-rank gradient."""
    old = random_bases(projection, 0)
    other = projection.with_rank(rank)
    wide = nearby_bases(projection, random_bases(projection.with_rank(max(rank, projection.rank)), 0))
    return Change.between(old, tuple(basis[:, :rank].contiguous() for basis in wide), projection.side), other.low_shape


# -- the change --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_change_is_that_of_the_formulas(name: str, dtype: torch.dtype) -> None:
    projection = GEOMETRIES[name]
    old, new = random_bases(projection, 0, dtype), random_bases(projection, 1, dtype)
    change = Change.between(old, new, projection.side)
    low = torch.randn(projection.low_shape, generator=generator())
    left, right = reference.matrices(old, new, projection.side)
    for ours, theirs in ((change.left, left), (change.right, right)):
        assert (ours is None) == (theirs is None)
        assert ours is None or ours.dtype == torch.float32
    torch.testing.assert_close(change.rotate(low).double(), reference.apply(low, left, right), rtol=1e-5, atol=1e-6)
    squares = reference.apply(low**2, *reference.squared(left, right))
    torch.testing.assert_close(change.rotate_squares(low**2).double(), squares, rtol=1e-5, atol=1e-6)
    # To give coordinates back to the full matrix and to project it anew is the same.
    full = torch.zeros(projection.shape)
    projection.add_back_(full, low, tuple(basis.float() for basis in old), alpha=1.0)
    again = projection.project(full, tuple(basis.float() for basis in new))
    torch.testing.assert_close(change.rotate(low), again, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("rank", [1, 3, 5, 8])
@pytest.mark.parametrize("fill", [0.0, "mean"])
def test_resize_cuts_or_extends(name: str, rank: int, fill: Any) -> None:
    projection = GEOMETRIES[name]
    change, shape = of_rank(projection, rank)
    low = torch.randn(projection.low_shape, generator=generator())
    resized = change.resize(low, fill=fill)
    expected = reference.resized(low, shape, None if fill == "mean" else fill)
    torch.testing.assert_close(resized.double(), expected, rtol=1e-6, atol=1e-6)
    assert change.changes_rank == (resized is not low) == (rank != projection.rank)


def test_average_stays_between_the_extremes_and_follows_a_permutation() -> None:
    projection = GEOMETRIES["full"]
    low = torch.rand(projection.low_shape, generator=generator()) + 0.1
    for seed in range(5):
        change = Change.between(random_bases(projection, seed), random_bases(projection, seed + 9), "full")
        new = change.average(low)
        assert float(low.min()) * 0.999 <= float(new.min()) <= float(new.max()) <= float(low.max()) * 1.001
    longer = exactly(1.01 * torch.eye(5), projection)  # a basis that is kept in half precision is not quite orthonormal
    assert float(longer.average(low).max()) <= float(low.max()) * 1.001
    left, right = signed_permutations(5, 2)
    moved = Change(left=left, right=right).average(low)
    torch.testing.assert_close(moved, left.abs() @ low @ right.abs().mT)


# -- policies against the formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["rotate", "rotate_first"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_adam_follows_the_formulas(name: str, policy: str, dtype: torch.dtype) -> None:
    projection = GEOMETRIES[name]
    old = random_bases(projection, 0)
    new = nearby_bases(projection, old)
    stepper = Stepper("adamw-amsgrad", projection.low_shape, dtype).run(projection.low_shape, 5)
    state = stepper.state
    carried = stepper.carry(policy, Change.between(old, new, projection.side))
    left, right = reference.matrices(old, new, projection.side)
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20  # one rounding, or those of a short sum
    first = reference.apply(state["exp_avg"], left, right)
    torch.testing.assert_close(carried["exp_avg"].double(), first, rtol=unit, atol=unit * 0.1)
    assert {key: value.dtype for key, value in tensors(carried).items()} == {
        key: value.dtype for key, value in tensors(state).items()
    }
    if policy == "rotate_first":
        second = reference.floored_second(state["exp_avg_sq"], state["exp_avg"], left, right, step=5, betas=BETAS)
        torch.testing.assert_close(carried["exp_avg_sq"].double(), second, rtol=unit, atol=unit * 1e-2)
        largest = state["max_exp_avg_sq"].double().maximum(second)
        torch.testing.assert_close(carried["max_exp_avg_sq"].double(), largest, rtol=unit, atol=unit * 1e-2)
        return
    second = reference.adam_second(state["exp_avg_sq"], state["exp_avg"], left, right, step=5, betas=BETAS)
    torch.testing.assert_close(carried["exp_avg_sq"].double(), second, rtol=unit, atol=unit * 1e-2)
    largest = reference.apply(state["max_exp_avg_sq"], *reference.squared(left, right)).maximum(second)
    torch.testing.assert_close(carried["max_exp_avg_sq"].double(), largest, rtol=unit, atol=unit * 1e-2)
    assert bool((carried["max_exp_avg_sq"] >= carried["exp_avg_sq"]).all())
    assert carried["step"] is state["step"]


@pytest.mark.parametrize("name", BOTH_SIDES_AND_FULL)
def test_adamax_adafactor_and_plain_averages_follow_the_formulas(name: str) -> None:
    projection = GEOMETRIES[name]
    old = random_bases(projection, 0)
    new = nearby_bases(projection, old)
    left, right = reference.matrices(old, new, projection.side)
    change = Change.between(old, new, projection.side)

    def run(base: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
        stepper = Stepper(base, projection.low_shape).run(projection.low_shape, 5)
        return stepper.state, stepper.carry("rotate", change)

    state, carried = run("adamax")
    expected = reference.adamax_inf(state["exp_inf"], state["exp_avg"], left, right, step=5, beta1=0.9)
    torch.testing.assert_close(carried["exp_inf"].double(), expected, rtol=1e-4, atol=1e-5)
    state, carried = run("adafactor")
    rows, columns = reference.factored(state["row_var"], state["col_var"], left, right)
    torch.testing.assert_close(carried["row_var"].double().flatten(), rows, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(carried["col_var"].double().flatten(), columns, rtol=1e-5, atol=1e-7)
    assert carried["row_var"].shape == state["row_var"].shape
    assert carried["col_var"].shape == state["col_var"].shape
    for base, key in (("adagrad", "sum"), ("rmsprop", "square_avg"), ("adadelta", "square_avg"),
                      ("adadelta", "acc_delta")):  # fmt: skip
        state, carried = run(base)
        expected = reference.apply(state[key], *reference.squared(left, right))
        torch.testing.assert_close(carried[key].double(), expected, rtol=1e-5, atol=1e-9)
    for base, key in (("sgd-momentum", "momentum_buffer"), ("muon", "momentum_buffer"), ("lion", "exp_avg"),
                      ("rprop", "prev"), ("rmsprop-momentum", "momentum_buffer")):  # fmt: skip
        state, carried = run(base)
        expected = reference.apply(state[key], left, right)
        torch.testing.assert_close(carried[key].double(), expected, rtol=1e-5, atol=1e-5)


def test_vectors_of_a_factored_second_moment_follow_the_formulas() -> None:
    """Adafactor of Transformers keeps its averages over rows and columns as vectors."""
    projection = GEOMETRIES["wide"]
    change, shape = of_rank(projection, 6)
    state = {"step": 4, "exp_avg_sq_row": torch.rand(4), "exp_avg_sq_col": torch.rand(24), "RMS": 0.0}
    base = torch.optim.SGD([nn.Parameter(torch.zeros(4, 24))])
    carried = MOMENTS["rotate"]().carry(base, state, {}, change)
    assert change.left is not None
    rows, columns = reference.factored(state["exp_avg_sq_row"], state["exp_avg_sq_col"], change.left.double(), None)
    torch.testing.assert_close(carried["exp_avg_sq_row"].double(), rows, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(carried["exp_avg_sq_col"].double(), columns, rtol=1e-5, atol=1e-7)
    assert (len(carried["exp_avg_sq_row"]), len(carried["exp_avg_sq_col"])) == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BOTH_SIDES_AND_FULL)
def test_same_coordinates_leave_the_moments(name: str, dtype: torch.dtype) -> None:
    projection = GEOMETRIES[name]
    stepper = Stepper("adamw", projection.low_shape, dtype).run(projection.low_shape, 5)
    state = stepper.state
    carried = stepper.carry("rotate", exactly(torch.eye(projection.rank), projection))
    assert torch.equal(carried["exp_avg"], state["exp_avg"])
    assert carried["exp_avg"] is not state["exp_avg"]
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(carried["exp_avg_sq"], state["exp_avg_sq"], rtol=8 * unit, atol=8 * unit * 1e-3)


@pytest.mark.parametrize("policy", ["rotate", "rotate_first"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_first_moment_stays_the_same_matrix_where_the_subspace_stays(name: str, policy: str) -> None:
    projection = GEOMETRIES[name]
    old = random_bases(projection, 0)
    turns = [torch.linalg.qr(torch.randn(projection.rank, projection.rank, generator=generator(5))).Q] * len(old)
    new = tuple(basis @ turn for basis, turn in zip(old, turns, strict=True))
    stepper = Stepper("adamw", projection.low_shape).run(projection.low_shape, 5)
    carried = stepper.carry(policy, Change.between(old, new, projection.side))
    before, after = torch.zeros(projection.shape), torch.zeros(projection.shape)
    projection.add_back_(before, stepper.state["exp_avg"], old, alpha=1.0)
    projection.add_back_(after, carried["exp_avg"], new, alpha=1.0)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BOTH_SIDES_AND_FULL)
@pytest.mark.parametrize("base", [*BASES, *(f"bnb-{name}" for name in BNB if "8bit" not in name)])
def test_rotate_makes_signs_and_order_of_the_basis_irrelevant(base: str, name: str) -> None:
    """Coordinates that are renamed, and of which some point the other way: the weight moves as if nothing had."""
    projection = GEOMETRIES[name]
    old = random_bases(projection, 0)
    turns = signed_permutations(projection.rank, len(old))
    new = tuple(basis @ turn for basis, turn in zip(old, turns, strict=True))
    # Not from the bases, whose rounding errors Rprop would take for the signs of gradients that were zero.
    grad = torch.randn(projection.shape, generator=generator(7))
    stepper = Stepper(base, projection.low_shape).run(projection.low_shape, 4)
    carried = copy.deepcopy(stepper.carry("rotate", exactly(turns[0].mT, projection)))

    def moved(bases: tuple[Tensor, ...]) -> Tensor:
        update = stepper.step(projection.project(grad, bases))
        weight = torch.zeros(projection.shape)
        projection.add_back_(weight, update, bases, alpha=1.0)
        return weight

    expected = moved(old)
    stepper.replace(carried, projection.low_shape)
    difference = (moved(new) - expected).norm() / expected.norm()
    # Muon computes in bf16; NAdam's second moment goes through sums and differences of squares.
    assert float(difference) < (2e-2 if base.startswith("muon") else 1e-4)


# -- every optimizer ---------------------------------------------------------------------------------------------------


def step_on(stepper: Stepper, shape: tuple[int, int], *, steps: int = 3) -> None:
    for grad in torch.randn((steps, *shape), generator=generator(8)):
        assert bool(torch.isfinite(stepper.step(grad)).all())
        assert_all_finite(stepper.state)


@pytest.mark.parametrize("rank", [3, 5, 8])
@pytest.mark.parametrize("policy", MOMENTS)
@pytest.mark.parametrize("base", EVERY_BASE)
def test_every_optimizer_goes_on(base: str, policy: str, rank: int) -> None:
    for name in (*BOTH_SIDES_AND_FULL, "square"):
        projection = Projection(GEOMETRIES[name].shape, GEOMETRIES[name].side, 5)
        change, shape = of_rank(projection, rank)
        stepper = Stepper(base, projection.low_shape).run(projection.low_shape, 3)
        before = copy.deepcopy(stepper.state)
        carried = stepper.carry(policy, change)
        for key, value in tensors(before).items():
            assert torch.equal(value, stepper.state[key]), f"{key} was changed in place"
        assert_all_finite(carried)
        for key in ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "sum", "square_avg", "acc_delta", "step_size", "state2"):
            assert key not in carried or bool((carried[key] >= 0).all())
        for value in tensors(carried).values():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
            assert value.is_contiguous()
        stepper.replace(carried, shape)
        step_on(stepper, shape)
        for value in tensors(stepper.state).values():
            if value.ndim > 1 and 1 not in value.shape:
                assert value.shape[-2:] == shape


@pytest.mark.parametrize(("before", "after"), [(48, 48), (48, 56), (48, 16), (24, 40)])
@pytest.mark.parametrize("policy", MOMENTS)
@pytest.mark.parametrize("name", [name for name in BNB if "8bit" in name])
def test_8bit_optimizers_go_on(name: str, policy: str, before: int, after: int) -> None:
    """128 columns: 48 rows are kept as codes and 24 in fp32; what a state is kept as does not change with its rank."""
    projection = Projection((64, 128), "left", before)
    change, shape = of_rank(projection, after)
    stepper = Stepper(f"bnb-{name}", projection.low_shape).run(projection.low_shape, 3)
    kept = stepper.state["state1"].dtype
    assert kept == (torch.uint8 if before == 48 else torch.float32)
    carried = stepper.carry(policy, change)
    stepper.replace(carried, shape)
    if carried:
        assert carried["state1"].dtype == kept
        for key in ("state1", "state2"):
            assert key not in carried or carried[key].shape[-2:] == shape
    step_on(stepper, shape, steps=1)
    if policy == "reset":
        fresh = Stepper(f"bnb-{name}", shape)
        step_on(fresh, shape, steps=1)
        assert all(torch.equal(value, fresh.state[key]) for key, value in tensors(stepper.state).items())


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "Lion8bit", "RMSprop8bit"])
def test_error_of_8bit_codes_is_that_of_one_quantisation(name: str) -> None:
    projection = Projection((64, 128), "left", 48)
    change, _ = of_rank(projection, 48)
    stepper = Stepper(f"bnb-{name}", projection.low_shape).run(projection.low_shape, 3)
    state, carried = stepper.state, stepper.carry("rotate", change)
    plain = {key: base_state.read(state, key) for key in ("state1", "state2") if key in state}
    in_fp32 = MOMENTS["rotate"]().carry(stepper.base, {"step": state["step"], **plain}, stepper.group, change)
    for key in plain:
        exact, coded = in_fp32[key].reshape(-1, 256), base_state.read(carried, key).reshape(-1, 256)
        largest = exact.abs().amax(1, keepdim=True)
        assert not torch.equal(coded, exact)
        assert float(((coded - exact).abs() / largest).max()) < 0.0075  # half a step of the map near its end
        torch.testing.assert_close(carried[f"absmax{key[-1]}"].flatten(), largest.flatten())


# -- policies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_keep_costs_nothing_while_the_rank_stays(base: str) -> None:
    projection = GEOMETRIES["tall"]
    change, _ = of_rank(projection, projection.rank)
    stepper = Stepper(base, projection.low_shape).run(projection.low_shape, 2)
    assert stepper.carry("keep", change) is stepper.state or not stepper.state


@pytest.mark.parametrize("base", ["adamw", "adadelta", "adagrad", "rmsprop", "adamax", "adafactor", "rprop"])
def test_rotating_the_first_shares_what_has_no_first_beside_it(base: str) -> None:
    projection = GEOMETRIES["tall"]
    change, _ = of_rank(projection, projection.rank)
    stepper = Stepper(base, projection.low_shape).run(projection.low_shape, 2)
    carried = stepper.carry("rotate_first", change)
    moved = {key for key, value in carried.items() if value is not stepper.state[key]}
    assert moved == {"exp_avg", "prev"} & carried.keys() | ({"exp_avg_sq", "exp_inf"} & carried.keys())


@pytest.mark.parametrize("base", ["adamw", "adamw-amsgrad", "adamax"])
@pytest.mark.parametrize("name", BOTH_SIDES_AND_FULL)
def test_coordinate_without_a_gradient_so_far_takes_no_boundless_step(name: str, base: str) -> None:
    """With v = 0 where the rotated first moment is not, Adam would divide by eps."""
    projection = GEOMETRIES[name]
    old = random_bases(projection, 0)
    new = nearby_bases(projection, old)
    stepper = Stepper(base, projection.low_shape).run(projection.low_shape, 4)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf"):
        if key in stepper.state:
            stepper.state[key][..., 1:] = 0.0
    carried = stepper.carry("rotate_first", Change.between(old, new, projection.side))
    moment = carried["exp_avg"] / (1 - BETAS[0] ** 4)
    root = carried["exp_inf"] if base == "adamax" else (carried["exp_avg_sq"] / (1 - BETAS[1] ** 4)).sqrt()
    assert bool((moment.abs() <= root * (1 + 1e-4)).all())
    assert bool((moment != 0).any())


def test_reset_does_not_need_an_optimizer_that_begins_lazily() -> None:
    """Adagrad made its state in its constructor in older versions of torch, and only there."""
    change, shape = of_rank(GEOMETRIES["wide"], 6)
    stepper = Stepper("adagrad-start", (4, 24)).run((4, 24), 2)
    carried = stepper.carry("reset", change)
    assert float(carried["step"]) == 0
    assert torch.equal(carried["sum"], torch.full(shape, 0.5))


@pytest.mark.parametrize("base", EVERY_BASE)
def test_reset_begins_as_a_fresh_optimizer(base: str) -> None:
    projection = GEOMETRIES["wide"]
    for rank in (3, 4, 6):
        change, shape = of_rank(projection, rank)
        stepper = Stepper(base, projection.low_shape).run(projection.low_shape, 3)
        stepper.replace(stepper.carry("reset", change), shape)
        grad = torch.randn(shape, generator=generator(4))
        assert torch.equal(stepper.step(grad), Stepper(base, shape).step(grad))


@pytest.mark.parametrize("policy", ["keep", "rotate_first"])
@pytest.mark.parametrize(("name", "axis"), [("wide", 0), ("tall", 1)])
def test_first_step_in_a_further_direction_is_not_too_large(name: str, axis: int, policy: str) -> None:
    """With a second moment of 0 it would be (1 - beta1) / sqrt(1 - beta2) = 3.2 learning rates."""
    projection = GEOMETRIES[name]
    change, shape = of_rank(projection, 6)
    stepper = Stepper("adamw", projection.low_shape).run(projection.low_shape, 200)
    stepper.state["exp_avg_sq"] /= 1 - 0.999**200  # as after a long time, when no correction helps
    stepper.state["step"].fill_(1e5)
    carried = dict(stepper.carry(policy, change))

    def first_steps(state: Mapping[str, Any]) -> Tensor:
        stepper.replace(copy.deepcopy(state), shape)
        lr = stepper.group["lr"]
        return stepper.step(torch.ones(shape)).narrow(axis, 4, 2).abs() / lr

    if policy == "keep":
        assert float(first_steps(carried).max()) < 0.2
    second = carried["exp_avg_sq"].clone()
    second.narrow(axis, 4, 2).zero_()
    first = carried["exp_avg"].clone()
    first.narrow(axis, 4, 2).zero_()
    assert float(first_steps({**carried, "exp_avg_sq": second, "exp_avg": first}).min()) > 3.0
    assert float(first_steps({**carried, "exp_avg": first}).max()) < 0.2


@pytest.mark.parametrize("policy", ["rotate", "rotate_first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_variance_of_centered_rmsprop_stays_positive(policy: str, dtype: torch.dtype) -> None:
    """It takes the root of square_avg - grad_avg^2, and a mean that is large in one coordinate may come to another."""
    projection = GEOMETRIES["wide"]
    stepper = Stepper("rmsprop-centered", projection.low_shape, dtype)
    scale = torch.tensor([10.0, 1.0, 0.1, 0.01])[:, None]
    for noise in torch.randn((20, *projection.low_shape), generator=generator()):
        stepper.step(scale * (1 + 0.3 * noise))
    old = random_bases(projection, 0)
    change = Change.between(old, (old[0].flip(1),), "left")
    carried = stepper.carry(policy, change)
    spread = carried["square_avg"].double() - carried["grad_avg"].double() ** 2
    assert bool((spread > 0).all())
    if policy == "rotate":  # a permutation: the spread goes with its coordinate
        before = stepper.state["square_avg"].double() - stepper.state["grad_avg"].double() ** 2
        torch.testing.assert_close(spread, before.flip(0), rtol=1e-3 if dtype == torch.float32 else 0.1, atol=1e-9)
    stepper.replace(carried, projection.low_shape)
    step_on(stepper, projection.low_shape)


def test_step_sizes_of_rprop_stay_in_their_range() -> None:
    """In a direction that is new, nothing of the old ones is left: a statistical rule would make it creep."""
    projection = GEOMETRIES["wide"]
    stepper = Stepper("rprop", projection.low_shape).run(projection.low_shape, 4)
    before = stepper.state["step_size"]
    new = stepper.carry("rotate", Change(left=torch.zeros(4, 4), right=None))["step_size"]
    torch.testing.assert_close(new, before.mean(0, keepdim=True).expand(4, -1))


def test_second_moment_below_the_square_of_the_mean_stays_positive() -> None:
    """A mean forgets faster than the squares do, so that after a jump it may be the larger of the two."""
    projection = GEOMETRIES["wide"]
    stepper = Stepper("adamw", projection.low_shape).run(projection.low_shape, 3)
    stepper.state["step"].fill_(1000.0)
    stepper.state["exp_avg_sq"].copy_(stepper.state["exp_avg"].square() * 0.1)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator())).Q
    carried = stepper.carry("rotate", exactly(turn, projection))
    expected = reference.adam_second(
        stepper.state["exp_avg_sq"], stepper.state["exp_avg"], turn.double(), None, step=1000, betas=BETAS
    )
    torch.testing.assert_close(carried["exp_avg_sq"].double(), expected, rtol=1e-4, atol=1e-6)
    assert bool((carried["exp_avg_sq"] > 0).all())


def test_variance_that_rounding_made_negative_does_not_stay_so() -> None:
    projection = GEOMETRIES["wide"]
    stepper = Stepper("rmsprop-centered", projection.low_shape).run(projection.low_shape, 3)
    stepper.state["square_avg"].copy_(stepper.state["grad_avg"].square() * 0.99)
    carried = stepper.carry("rotate_first", exactly(torch.eye(4), projection))
    assert bool((carried["square_avg"] >= carried["grad_avg"].square()).all())


@pytest.mark.parametrize("size", [1e-18, 1e-12, 1e12, 1e18])
@pytest.mark.parametrize("base", ["adamw-amsgrad", "adamax", "rmsprop-centered", "adafactor", "sgd-momentum"])
def test_extreme_gradients_stay_finite_and_nonzero(base: str, size: float) -> None:
    projection = GEOMETRIES["full"]
    change, _ = of_rank(projection, projection.rank)
    stepper = Stepper(base, projection.low_shape)
    for grad in torch.randn((3, *projection.low_shape), generator=generator()):
        stepper.step(grad * size)
    carried = stepper.carry("rotate", change)
    assert_all_finite(carried)
    for key in ("exp_avg", "exp_avg_sq", "exp_inf", "square_avg", "row_var", "momentum_buffer"):
        assert key not in carried or bool((carried[key] != 0).all())


def test_roots_of_huge_second_moments_do_not_overflow() -> None:
    """Adamax keeps a magnitude, whose square may not be representable."""
    projection = GEOMETRIES["wide"]
    change, _ = of_rank(projection, projection.rank)
    stepper = Stepper("adamax", projection.low_shape)
    stepper.step(torch.full(projection.low_shape, 1e30))
    carried = stepper.carry("rotate", change)
    assert_all_finite(carried)
    assert float(carried["exp_inf"].max()) > 1e29


def test_half_precision_is_clamped_not_rounded_to_infinity() -> None:
    base = torch.optim.SGD([nn.Parameter(torch.zeros(2, 2))])
    state = {"exp_avg_sq": torch.ones(2, 2, dtype=torch.float16)}
    written = base_state.write(base, state, "exp_avg_sq", torch.tensor([[1e6, -1e6], [1.0, 2.0]]))["exp_avg_sq"]
    assert written.tolist() == [[65504.0, -65504.0], [1.0, 2.0]]
    assert written.dtype == torch.float16


def test_zero_moments_stay_zero() -> None:
    projection = GEOMETRIES["wide"]
    change, _ = of_rank(projection, projection.rank)
    for base in ("adamw-amsgrad", "adafactor", "rmsprop-centered"):
        stepper = Stepper(base, projection.low_shape)
        stepper.step(torch.zeros(projection.low_shape))
        carried = stepper.carry("rotate", change)
        assert all(not bool(value.any()) for value in tensors(carried).values() if value.ndim)


# -- what is not known -------------------------------------------------------------------------------------------------


def test_unknown_state_is_named_once_and_kept() -> None:
    class Curious(torch.optim.SGD):
        pass

    moments._warn_of_unknown.cache_clear()
    projection = GEOMETRIES["wide"]
    change, _ = of_rank(projection, projection.rank)
    base = Curious([nn.Parameter(torch.zeros(projection.low_shape))])
    state = {"whatever": torch.ones(projection.low_shape), "momentum_buffer": torch.ones(projection.low_shape),
             "scalar": torch.ones(()), "of another shape": torch.ones(3, 3)}  # fmt: skip
    with pytest.warns(UserWarning, match="Curious keeps 'whatever' in low-rank coordinates") as caught:
        carried = MOMENTS["rotate"]().carry(base, state, base.param_groups[0], change)
    assert len(caught) == 1
    assert carried["whatever"] is state["whatever"]
    assert carried["momentum_buffer"] is not state["momentum_buffer"]
    MOMENTS["rotate"]().carry(base, state, base.param_groups[0], change)  # a second warning would be an error
    assert MOMENTS["keep"]().carry(base, state, base.param_groups[0], change) is state


@pytest.mark.parametrize("policy", ["keep", "rotate", "rotate_first"])
def test_unknown_state_is_refused_when_the_rank_changes(policy: str) -> None:
    projection = GEOMETRIES["wide"]
    change, _ = of_rank(projection, 6)
    base = torch.optim.SGD([nn.Parameter(torch.zeros(projection.low_shape))])
    state = {"whatever": torch.ones(projection.low_shape)}
    with pytest.raises(
        ValueError, match=r"SGD keeps 'whatever' of shape \(4, 24\).*moments='reset'.*rank_rule='fixed'"
    ):
        MOMENTS[policy]().carry(base, state, base.param_groups[0], change)
    assert MOMENTS["reset"]().carry(base, state, base.param_groups[0], change) == {}


@pytest.mark.parametrize("base", EVERY_BASE)
def test_every_entry_of_every_known_optimizer_has_a_rule(base: str) -> None:
    stepper = Stepper(base, (48, 128)).run((48, 128), 2)
    assert [key for key in stepper.state if base_rules.state_rule(stepper.base, key) is None] == []


# -- paged and quantised tensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PagedAdamW8bit", "PagedAdamW", "PagedAdEMAMix8bit"])
def test_paged_buffers_go_on_living(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never freed, so none is dropped. Only a device has them: here tensors that say they are paged stand in."""
    monkeypatch.setitem(BNB, name, {})
    projection = Projection((64, 128), "left", 48)
    stepper = Stepper(f"bnb-{name}", projection.low_shape).run(projection.low_shape, 3)
    expected = {
        policy: dict(stepper.carry(policy, of_rank(projection, 48)[0])) for policy in ("rotate", "rotate_first")
    }
    start = copy.deepcopy(stepper.state)
    for policy in ("rotate", "rotate_first", "reset"):
        state = copy.deepcopy(start)
        for key in ("state1", "state2"):
            state[key].is_paged = True
        carried = MOMENTS[policy]().carry(stepper.base, state, stepper.group, of_rank(projection, 48)[0])
        assert carried["state1"] is state["state1"]
        assert carried["state2"] is state["state2"]
        for key, value in tensors(expected.get(policy, {})).items():
            assert torch.equal(carried[key], value)
        if policy == "reset":
            assert carried["step"] == 0
            assert not bool(base_state.read(carried, "state1").any())
        carried["state1"].is_paged = carried["state2"].is_paged = False
        stepper.replace(carried, projection.low_shape)
        step_on(stepper, projection.low_shape, steps=1)
    state = copy.deepcopy(start)
    state["state1"].is_paged = True
    wider = MOMENTS["keep"]().carry(stepper.base, state, stepper.group, of_rank(projection, 56)[0])
    assert wider["state1"].shape[-2:] == (56, 128)
    assert wider["state1"].dtype == state["state1"].dtype


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
@pytest.mark.parametrize("policy", ["keep", "rotate", "rotate_first"])
def test_tensor_classes_of_torchao(name: str, policy: str) -> None:
    torchao = pytest.importorskip("torchao.optim")
    projection = Projection((64, 128), "left", 48)
    base = getattr(torchao, f"_{name}", None) or getattr(torchao, name)
    proxy = nn.Parameter(torch.zeros(projection.low_shape))
    optimizer = base([proxy], lr=1e-3)
    with torch.compiler.set_stance("force_eager"):
        for grad in torch.randn((3, *projection.low_shape), generator=generator()):
            proxy.grad = grad
            optimizer.step()
    state, group = optimizer.state[proxy], optimizer.param_groups[0]
    for rank in (48, 56):
        change, shape = of_rank(projection, rank)
        carried = MOMENTS[policy]().carry(optimizer, state, group, change)
        assert type(carried["exp_avg"]) is type(state["exp_avg"])
        assert carried["exp_avg_sq"].shape == shape
        if policy == "rotate":
            expected = change.rotate(state["exp_avg"].dequantize())
            error = (carried["exp_avg"].dequantize() - expected).abs().max() / expected.abs().max()
            assert float(error) < {"AdamW8bit": 0.01, "AdamW4bit": 0.12, "AdamWFp8": 0.04}[name]
        moved = nn.Parameter(torch.zeros(shape))
        moved.grad = torch.ones(shape)
        optimizer.param_groups[0]["params"] = [moved]
        optimizer.state[moved] = dict(carried)
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
        assert bool(torch.isfinite(moved).all())


# -- the first moment --------------------------------------------------------------------------------------------------

KEEPS_NO_MEAN = {
    *("sgd", "rmsprop", "rmsprop-momentum", "adagrad", "adagrad-start", "adadelta", "rprop", "adafactor"),
    *("bnb-Adagrad", "bnb-Adagrad8bit", "bnb-RMSprop", "bnb-RMSprop8bit"),
}


@pytest.mark.parametrize("base", EVERY_BASE)
def test_first_moment_of_a_constant_gradient_is_that_gradient(base: str) -> None:
    shape = (48, 128) if "8bit" in base else (4, 6)
    stepper = Stepper(base, shape)
    grad = torch.randn(shape, generator=generator())
    assert first_moment(stepper.base, {}, stepper.group) is None
    counts_steps = base.startswith(("adam", "nadam", "radam", "rmsprop", "bnb-"))
    for _ in range(3 if counts_steps else 2000):
        stepper.step(grad)
    first = first_moment(stepper.base, stepper.state, stepper.group)
    if base in KEEPS_NO_MEAN:
        assert first is None
        return
    assert first is not None
    assert first.dtype == torch.float32
    assert first.shape == shape
    # Codes are coarse, and these have been written three times.
    torch.testing.assert_close(first, grad, rtol=1e-4, atol=0.07 if "8bit" in base else 1e-5)
    assert not any(first is value for value in stepper.state.values())


def test_mean_of_updates_is_no_first_moment() -> None:
    """Adafactor of Transformers averages its updates under a key by which others average gradients."""
    stepper = Stepper("adafactor", (4, 6)).run((4, 6), 1)
    assert first_moment(stepper.base, {**stepper.state, "exp_avg": torch.ones(4, 6)}, {"betas": (0.9, 0.99)}) is None


def test_first_moment_of_half_precision_state_is_in_fp32() -> None:
    stepper = Stepper("adamw", (4, 6), torch.bfloat16).run((4, 6), 3)
    first = first_moment(stepper.base, stepper.state, stepper.group)
    assert first is not None
    assert first.dtype == torch.float32
    torch.testing.assert_close(first, stepper.state["exp_avg"].float() / (1 - 0.9**3))


def test_names_of_the_policies() -> None:
    assert list(MOMENTS) == ["keep", "rotate", "rotate_first", "reset"]
    make: Callable[[], moments.Moments]
    for make in MOMENTS.values():
        assert isinstance(make(), moments.Moments)
