# SPDX-License-Identifier: Apache-2.0
"""Weights of order > 2 as matrices: plain GaLore on ``(d_1, d_2 ... d_N)``, in either memory format."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from lightning_galore import GaLoreOptimizer, storage
from lightning_galore.lift import ProjectBack, Update
from lightning_galore.state_keys import BASIS, LAYOUT
from lightning_galore.subspace import SUBSPACES, FoldedProjection
from lightning_galore.subspace.tensors import columns_as_they_lie
from tests.family.tensors import MODES, SHAPES, Tensors, give, gradient, wrapped
from tests.helpers import assert_state_whole, max_difference
from tests.reference.galore_reference import Adam, GaLore

STEPS, GAP = 30, 7
LAST: dict[int, Any] = {4: torch.channels_last, 5: torch.channels_last_3d}
SETTINGS: dict[str, Any] = {"method": "galore", "update_proj_gap": GAP, "scale": 0.5}


def trained(
    shape: tuple[int, ...], steps: range, *, last: bool = False, **settings: Any
) -> tuple[Any, GaLoreOptimizer]:
    model = Tensors(shape)
    weight = model.weights[0]
    if last:
        weight.data = weight.data.to(memory_format=LAST[len(shape)])
    optimizer = wrapped(
        model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.2), **{**SETTINGS, **settings}
    )
    run(weight, optimizer, steps)
    return weight, optimizer


def run(weight: Tensor, optimizer: GaLoreOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        give(weight, gradient(tuple(weight.shape), step))
        optimizer.step()


def expected(shape: tuple[int, ...], rank: int, proj_type: str) -> Tensor:
    weight = Tensors(shape).weights[0].detach().clone()
    plain = GaLore(rule=Adam(lr=0.01), rank=rank, gap=GAP, scale=0.5, proj_type=proj_type, decoupled=0.2)
    for step in range(STEPS):
        plain.apply_(weight.view(shape[0], -1), gradient(shape, step).reshape(shape[0], -1))
    return weight


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_thirty_steps_are_galore_on_the_matrix(name: str, rank: int, proj_type: Any, mode: Any) -> None:
    shape = SHAPES[name]
    ours, optimizer = trained(shape, range(STEPS), rank=rank, proj_type=proj_type, mode=mode, fix_signs=False)
    assert isinstance(optimizer.targets[ours].projection, FoldedProjection)
    assert max_difference([ours], [expected(shape, rank, proj_type)]) < 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
@pytest.mark.parametrize("name", [name for name in SHAPES if len(SHAPES[name]) in LAST])
def test_channels_last_trains_as_contiguous(name: str, proj_type: Any, mode: Any) -> None:
    shape = SHAPES[name]
    plain, _ = trained(shape, range(STEPS), rank=2, proj_type=proj_type, mode=mode)
    ours, optimizer = trained(shape, range(STEPS), rank=2, proj_type=proj_type, mode=mode, last=True)
    assert ours.is_contiguous(memory_format=LAST[len(shape)])
    assert max_difference([ours], [plain]) < 1e-9
    if shape[1] > 1:
        assert optimizer.state[ours][LAYOUT] == (*range(2, len(shape)), 1)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_a_step_copies_neither_weight_nor_gradient(proj_type: Any, last: bool) -> None:
    shape = (64, 32, 3, 3)
    model = Tensors(shape, dtype=torch.float32)
    weight = model.weights[0]
    if last:
        weight.data = weight.data.to(memory_format=torch.channels_last)
    optimizer = wrapped(model, torch.optim.SGD(model.parameters(), lr=0.01), rank=4, proj_type=proj_type)
    run(weight, optimizer, range(2))
    give(weight, gradient(shape, 3))
    assert weight.grad is not None
    assert weight.grad.stride() == weight.stride()
    address = weight.data_ptr()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert weight.data_ptr() == address
    assert all(event.self_cpu_memory_usage < weight.nbytes / 2 for event in profile.events())


def test_a_gradient_or_weight_that_lies_otherwise_is_copied_and_right() -> None:
    shape = (8, 6, 3, 3)
    projection = FoldedProjection(shape=(8, 54), side="left", rank=2, sizes=shape, order=(1, 2, 3))
    weight = torch.randn(6, 8, 3, 3).transpose(0, 1)
    before = weight.clone()
    matrix = projection.unfold(weight)
    assert torch.equal(matrix, before.reshape(8, 54))
    projection.fold_back(weight, matrix.mul_(2))
    assert torch.equal(weight, 2 * before)
    mixed = projection.in_layout((2, 3, 1))
    matrix = mixed.unfold(before)
    assert torch.equal(matrix, before.permute(0, 2, 3, 1).reshape(8, 54))
    mixed.fold_back(before, matrix.add_(1))
    assert torch.equal(before, weight / 2 + 1)
    assert mixed.unfold(matrix) is matrix


@pytest.mark.parametrize(
    ("weight", "order"),
    [
        (torch.zeros(4, 3, 2, 2), (1, 2, 3)),
        (torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last), (2, 3, 1)),
        (torch.zeros(4, 1, 2, 2).to(memory_format=torch.channels_last), (1, 2, 3)),
        (torch.zeros(4, 3, 1, 1).to(memory_format=torch.channels_last), (1, 2, 3)),
        (torch.zeros(4, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d), (2, 3, 4, 1)),
        (torch.zeros(4, 3, 2), (1, 2)),
    ],
)
def test_order_of_the_columns(weight: Tensor, order: tuple[int, ...]) -> None:
    assert columns_as_they_lie(weight) == order


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("first", "second"), [(False, False), (True, True), (False, True), (True, False)])
def test_resume_in_the_same_or_another_memory_format(first: bool, second: bool, mode: Any) -> None:
    shape = SHAPES["wide"]
    whole, _ = trained(shape, range(12), rank=2, mode=mode, last=first)
    half, saver = trained(shape, range(6), rank=2, mode=mode, last=first)
    file = io.BytesIO()
    torch.save({"weight": half.detach(), "optimizer": saver.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, loader = trained(shape, range(0), rank=2, mode=mode, last=second)
    resumed.data.copy_(saved["weight"])
    loader.load_state_dict(saved["optimizer"])
    run(resumed, loader, range(6, 12))  # there is a refresh among them
    assert resumed.is_contiguous() is not second
    if first == second:
        assert torch.equal(resumed, whole)
        assert_state_whole(loader.state[resumed])
    else:
        assert max_difference([resumed], [whole]) < 1e-12
        assert loader.state[resumed][LAYOUT] == saver.state[half][LAYOUT]


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_every_subspace_takes_a_convolution(subspace: Any) -> None:
    model = Tensors((12, 6, 3, 3), (4, 24, 3), dtype=torch.float32)
    optimizer = wrapped(model, subspace=subspace, rank=3, update_proj_gap=3)
    planned = {row.name: row.state_bytes for row in optimizer.targets_table().taken}
    before = [weight.detach().clone() for weight in model.weights]
    for step in range(7):
        optimizer.zero_grad()
        for weight in model.weights:
            give(weight, gradient(tuple(weight.shape), step))
        optimizer.step()
    assert all(not torch.equal(weight, old) for weight, old in zip(model.weights, before, strict=True))
    held = {target.name: storage.nbytes(optimizer.state[weight]) for weight, target in optimizer.targets.items()}
    assert planned == held


@pytest.mark.parametrize("base", ["Muon", "Adafactor", "Adagrad"])
def test_other_optimizers(base: str) -> None:
    model = Tensors((12, 6, 3, 3), dtype=torch.float32)
    if base == "Muon":
        with pytest.raises(ValueError, match="2D"):
            torch.optim.Muon(model.parameters())  # torch itself refuses it
        return
    optimizer = wrapped(model, getattr(torch.optim, base)(model.parameters(), lr=0.01), rank=3, update_proj_gap=3)
    before = model.weights[0].detach().clone()
    run(model.weights[0], optimizer, range(5))
    assert not torch.equal(model.weights[0], before)


def test_bf16_stochastic_rounding_in_channels_last() -> None:
    model = Tensors((12, 6, 3, 3), dtype=torch.bfloat16)
    weight = model.weights[0]
    weight.data = weight.data.to(memory_format=torch.channels_last)
    optimizer = wrapped(model, rank=3, stochastic_round=True)
    before = weight.detach().clone()
    run(weight, optimizer, range(3))
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(weight, before)


class Looks(ProjectBack):
    """Wants the full gradient and keeps a part of it, as the lifts of other methods do."""

    needs_grad = True
    leaves_over = True

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    @override
    def apply_(self, weight: Tensor, update: Update) -> None:
        assert update.grad is not None
        assert weight.shape == update.grad.shape
        self.seen.append(update.grad.clone())
        super().apply_(weight, update)
        update.entries["rest"] = torch.zeros_like(update.grad)

    @override
    def left_over(self, entries: Any) -> Tensor | None:
        return entries.get("rest")


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mode", ["step", "layerwise"])
def test_lifts_see_matrices(mode: Any, last: bool) -> None:
    shape = (6, 5, 3, 3)
    model, lift = Tensors(shape), Looks()
    weight = model.weights[0]
    if last:
        weight.data = weight.data.to(memory_format=torch.channels_last)
    base = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.5)
    optimizer = wrapped(model, base, rank=2, mode=mode)
    optimizer._projector.lift = lift
    order = (0, 2, 3, 1) if last else (0, 1, 2, 3)
    for step in range(3):
        before = weight.detach().clone()
        run(weight, optimizer, range(step, step + 1))
        expected = gradient(shape, step) + 0.5 * before  # a coupled decay is in the gradient that a lift sees
        torch.testing.assert_close(lift.seen[-1], expected.permute(order).reshape(6, 45))


# -- a real network ----------------------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    """Plain, grouped, depthwise, transposed and 1-D convolutions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, groups=4, padding=1)
        self.depthwise, self.point = nn.Conv2d(32, 32, 3, groups=32, padding=1), nn.Conv2d(32, 24, 1)
        self.up, self.wave = nn.ConvTranspose2d(24, 12, 2, stride=2), nn.Conv1d(12, 16, 5)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x).relu(), 2)
        x = self.point(self.depthwise(self.grouped(x).relu()).relu()).relu()
        x = self.wave(self.up(x).mean(2)).relu()
        return self.head(x.mean(2))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Images of a bright bar in one of four places."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(4, (32,), generator=generator)
    images = 0.3 * torch.randn(32, 1, 12, 12, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        rows = slice(0, 6) if label < 2 else slice(6, 12)
        image[0, rows, slice(2, 4) if label % 2 else slice(8, 10)] += 1.0
    return images, labels


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["galore", "tensor-galore"])
def test_a_convolutional_network_trains(method: Any, mode: Any, last: bool) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    if last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    convolutions = [nn.Conv2d, nn.Conv1d, "up"]
    optimizer = GaLoreOptimizer(
        base, model, method=method, rank=4, target_modules=convolutions, update_proj_gap=10, scale=1.0, mode=mode
    )
    taken = {target.name for target in optimizer.targets.values()}
    assert {"grouped.weight", "point.weight", "up.weight", "wave.weight", "stem.weight"} <= taken
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    losses = []
    for step in range(60):
        images, labels = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert all(not torch.equal(param, start[name]) for name, param in model.named_parameters())
    assert all(optimizer.state[weight][BASIS].isfinite().all() for weight in optimizer.targets)
    moments = sum(optimizer.state[weight]["exp_avg"].numel() for weight in optimizer.targets)
    assert moments < 0.7 * sum(weight.numel() for weight in optimizer.targets)


def test_all_linear_leaves_convolutions_alone() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(8, 8))
    optimizer = wrapped(model, rank=2, target_modules="all-linear")
    assert [target.name for target in optimizer.targets.values()] == ["1.weight"]
    assert "0.weight   8x8x3x3  -" in str(optimizer.targets_table())


def test_complex_weights_are_left_out_by_name() -> None:
    model = Tensors((8, 8, 4))
    model.waves = nn.Parameter(torch.zeros(8, 8, 4, dtype=torch.complex64))
    table = wrapped(model, rank=2).targets_table()
    (row,) = (row for row in table.rows if row.name == "waves")
    assert row.reason == "torch.complex64 is not a real floating-point type"
    with pytest.raises(ValueError, match=r"waves \(torch\.complex64 is not a real floating-point type\)"):
        wrapped(model, rank=2, ignore_modules=["weights"])


def test_a_group_with_a_rank_names_convolutions_too() -> None:
    model = ConvNet()
    groups = [
        {"params": [model.stem.weight, model.grouped.weight], "rank": 3},
        {"params": list(model.head.parameters())},
    ]
    optimizer = GaLoreOptimizer(torch.optim.AdamW(groups), model)
    assert {t.name: t.projection.rank for t in optimizer.targets.values()} == {"stem.weight": 3, "grouped.weight": 3}


def test_sharded_convolutions_are_refused_by_name() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        model = Tensors((8, 6, 3), dtype=torch.float32)
        mesh = init_device_mesh("cpu", (1,))
        model.weights[0] = nn.Parameter(distribute_tensor(model.weights[0].detach(), mesh, [Shard(0)]))
        with pytest.raises(
            ValueError, match=r"weights\.0 of shape \(8, 6, 3\) is sharded .*ignore_modules, or use GaLoreDDP"
        ):
            wrapped(model, rank=2)
    finally:
        dist.destroy_process_group()
