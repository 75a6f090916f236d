# SPDX-License-Identifier: Apache-2.0
"""Ways to divide a model that leave nothing to project, or that were never tried, are refused before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from lightning_galore import GaLoreOptimizer
from lightning_galore.distributed import Team
from lightning_galore.foreign_shards import check_parameters
from lightning_galore.sharding import Sharding
from lightning_galore.strategies.sharded_files import put_back, replace_folder
from tests.strategies.modules import Tiny, adamw


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def wrap(model: nn.Module, **settings: Any) -> GaLoreOptimizer:
    return GaLoreOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, rank=2, **settings)


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))


@pytest.mark.parametrize("placements", [(Shard(0), Shard(1)), (Shard(0), Shard(0))])
def test_a_weight_cut_along_two_dimensions_of_a_mesh(placements: Any) -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    model = linear()
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, placements))
    message = r"0\.weight of shape \(16, 8\).*not FSDP2 together with tensor.*Set tensor_parallel_size=1"
    with pytest.raises(ValueError, match=message):
        wrap(model)


def test_replicas_of_shards_are_no_second_cut() -> None:
    mesh = init_device_mesh("cpu", (1, 1))
    sharding = Sharding.of(distribute_tensor(torch.zeros(4, 6), mesh, [Replicate(), Shard(0)]))
    assert sharding is not None
    assert (sharding.shards.axis, sharding.dim) == (1, 0)


def test_some_weights_in_parts_and_some_whole() -> None:
    model = linear()
    fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"not all sharded alike.*ignore_modules"):
        wrap(model)
    assert len(wrap(model, ignore_modules=["1"]).targets) == 1


def test_joining_a_team_of_processes_that_share_each_weight() -> None:
    model = linear()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"join\(\): the weights are sharded"):
        wrap(model).join(Team())


def test_a_model_that_fsdp1_has_wrapped() -> None:
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # it refuses to be made on a CPU
    nn.Module.__init__(wrapped)
    model = nn.Sequential(nn.Linear(8, 16))
    model.add_module("inner", wrapped)
    with pytest.raises(ValueError, match=r"inner is wrapped in FullyShardedDataParallel \(FSDP1\).*Use FSDP2.*or DDP"):
        GaLoreOptimizer(torch.optim.AdamW(model[0].parameters()), model, rank=2)


def flat() -> Tensor:
    param = nn.Parameter(torch.zeros(12))
    param._is_flat_param = True  # type: ignore[attr-defined]
    return param


def flattened_part() -> Tensor:
    param = nn.Parameter(torch.zeros(7))
    param._fsdp_flattened = True  # type: ignore[attr-defined]
    return param


def of_zero() -> Tensor:
    param = nn.Parameter(torch.zeros(0))
    param.ds_id = 3  # type: ignore[attr-defined]
    return param


class OnTpu(Tensor):
    @staticmethod
    def __new__(cls) -> OnTpu:
        return Tensor._make_wrapper_subclass(cls, (4, 4), device=torch.device("xla:0"))  # type: ignore[attr-defined,no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


def offloaded() -> Tensor:
    """A part on the CPU of a weight on a mesh of GPUs, as ``CPUOffloadPolicy`` keeps it."""
    mesh = DeviceMesh("cuda", [0], _init_backend=False, _rank=0)
    meta = TensorMeta(torch.Size((4, 4)), (4, 1), torch.float32)
    spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=meta)
    return DTensor(torch.zeros(4, 4), spec, requires_grad=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (flat, r"shape \(12,\) belongs to FSDP1.*Use FSDP2.*or DDP"),
        (flattened_part, r"shape \(7,\) belongs to FSDP1"),
        (of_zero, r"belongs to DeepSpeed's ZeRO.*Use FSDP2"),
        (OnTpu, r"is on a TPU \(xla\).*Use GPUs or CPUs"),
        (offloaded, r"kept on cpu and its mesh on cuda \(CPU offload of FSDP2\).*Leave offload_policy out"),
    ],
)
def test_parameters_of_other_engines(make: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_parameters([nn.Parameter(torch.zeros(2, 2)), make()])


def test_parameters_of_other_engines_are_looked_for_when_an_optimizer_is_wrapped() -> None:
    model = linear()
    model[1].weight.ds_id = 1  # type: ignore[assignment]
    with pytest.raises(ValueError, match="DeepSpeed"):
        wrap(model)


class DeepSpeedStrategy:
    """By the name alone: Lightning's own needs a GPU and the package."""


class Fsdp(type("FSDPStrategy", (), {})):  # type: ignore[misc]
    """A subclass of the user's."""


class XLAStrategy:
    """As before."""


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (DeepSpeedStrategy(), r"strategy=DeepSpeedStrategy: DeepSpeed flattens weights.*Use FSDP2.*or DDP"),
        (Fsdp(), r"strategy=Fsdp: FSDP1 flattens weights"),
        (XLAStrategy(), r"strategy=XLAStrategy: TPUs are not supported"),
    ],
)
def test_configure_optimizers_under_a_strategy_that_flattens(strategy: Any, message: str) -> None:
    model = Tiny()
    model._trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=message):
        GaLoreOptimizer(adamw(model), model, rank=3)


@pytest.mark.parametrize("call", ["step", "zero_grad"])
def test_flat_vectors_in_place_of_the_weights(call: str) -> None:
    """ZeRO-1 and ZeRO-2 put one vector into each group, which would be trained at full rank."""
    model = linear()
    optimizer = wrap(model)
    vector = nn.Parameter(torch.zeros(sum(param.numel() for param in model.parameters())))
    vector.grad = torch.ones_like(vector)
    optimizer.param_groups[0]["params"] = [vector]
    with pytest.raises(RuntimeError, match=r"None of the 2 projected weights.*ZeRO.*Use FSDP2"):
        getattr(optimizer, call)()
    assert not vector.any()


def test_a_folder_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any rename, the last checkpoint or the new one is there, and the next save goes through."""
    path, new = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.part"

    def write(text: str) -> None:
        new.mkdir()
        (new / "part").write_text(text)

    write("first")
    replace_folder(new, path)
    rename, calls = Path.rename, []

    def killed(self: Path, target: Path) -> Path:
        calls.append(self.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    write("second")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            replace_folder(new, path)
    assert calls == ["last.ckpt", ".last.ckpt.part"]
    put_back(path)
    assert (path / "part").read_text() == "first"
    (tmp_path / ".last.ckpt.old").mkdir()  # killed while the one before was removed
    (tmp_path / ".last.ckpt.old" / "part").write_text("zeroth")
    replace_folder(new, path)
    put_back(path)
    assert (path / "part").read_text() == "second"
    assert [one.name for one in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_folder_takes_the_place_of_a_file_or_a_link(kind: str, tmp_path: Path) -> None:
    path, new, other = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.part", tmp_path / "epoch=0.ckpt"
    other.mkdir()
    if kind == "file":
        path.write_text("of one process")
    else:
        path.symlink_to(other)
    new.mkdir()
    (new / "part").write_text("new")
    replace_folder(new, path)
    assert (path / "part").read_text() == "new"
    assert not path.is_symlink()
    assert list(other.iterdir()) == []
    assert sorted(one.name for one in tmp_path.iterdir()) == ["epoch=0.ckpt", "last.ckpt"]
