# SPDX-License-Identifier: Apache-2.0
"""What one process by itself shows: what is let go, and what sharing leaves as it is."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import _sync_module_states
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_galore import GaLoreOptimizer, weights
from lightning_galore.distributed import OrderedAverage, Team
from lightning_galore.lift import LIFTS
from tests.helpers import same_bits


@pytest.fixture
def team() -> Iterator[Team]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield Team()
    dist.destroy_process_group()


def test_what_has_travelled_is_let_go(team: Team) -> None:
    """Mode "layerwise" frees a gradient when its weight has moved: nothing here may keep it."""
    params = [torch.zeros(1) for _ in range(6)]
    number = {param: i for i, param in enumerate(params)}
    seen: list[int] = []
    average = OrderedAverage(team, params, done=lambda param: seen.append(number[param]), bucket_bytes=1)
    held: list[weakref.ref[Tensor]] = []
    for i, param in enumerate(params[:5]):
        grad = torch.full((3,), float(i))
        held.append(weakref.ref(grad))
        average.put(param, grad)
        del grad
        assert average.has(param)
    assert seen == [0, 1, 2, 3]  # the fifth travels
    assert [ref() is None for ref in held] == [True] * 4 + [False]
    assert average.finish(lambda param: torch.zeros(3)) == [params[5]]
    assert [ref() is None for ref in held] == [True] * 5


def test_sharing_the_first_weights_leaves_codes_as_they_are(team: Team) -> None:
    """A resumed run has codes before its processes share their weights; rounded anew they would be others."""
    model = nn.Sequential(nn.Linear(300, 70), nn.BatchNorm1d(70))
    weights.quantize(model, [model[0].weight])
    ((_, weight),) = weights.coded_weights(model).items()
    with torch.no_grad():
        weight.update_(weight.dequantize() * 1.01, torch.Generator().manual_seed(0))
    before = [weight.codes.clone(), weight.absmax.clone()]
    _sync_module_states(model)
    assert same_bits([weight.codes, weight.absmax], before)


@pytest.mark.parametrize("lift", [name for name in LIFTS if name != "project_back"])
def test_lifts_that_need_whole_matrices_refuse_sharded_weights(team: Team, lift: Any) -> None:
    model = nn.Sequential(nn.Linear(12, 8))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"lift='{lift}' with sharded weights .*GaLoreDDPStrategy"):
        GaLoreOptimizer(base, model, rank=2, lift=lift, target_modules=[".*"])
