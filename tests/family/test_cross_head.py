# SPDX-License-Identifier: Apache-2.0
"""GaLore+: a basis for all heads from some of them, beside the plain formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer
from lightning_galore.config import GaLoreConfig
from lightning_galore.state_keys import BASIS
from lightning_galore.subspace import Projection, seeded_generator
from lightning_galore.subspace.cross_head import CrossHead
from lightning_galore.subspace.randomized import Randomized
from tests.helpers import assert_same_subspace, same_bits
from tests.reference.cross_head_reference import CrossHeadGaLore

from .loops import copied, gradient, run

SEED = 1  # with which not all four refreshes draw one head
SETTINGS: dict[str, Any] = {"method": "galore-plus", "update_proj_gap": 8, "scale": 0.5, "head_size": 4, "seed": SEED}


class Attention(nn.Module):
    def __init__(self, name: str, shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleDict({name: nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)})


def made(name: str, shape: tuple[int, int], dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    model = Attention(name, shape, dtype)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    return model, GaLoreOptimizer(base, model, **{**SETTINGS, **settings})


def chosen(name: str, heads: int, taken: int, refreshes: int) -> list[list[int]]:
    """The heads that each refresh draws."""
    drawn = []
    for draw in range(refreshes):
        generator = seeded_generator(torch.device("cpu"), seed=SEED, name=name, draw=draw)
        drawn.append(torch.randperm(heads, generator=generator)[:taken].tolist())
    return drawn


@pytest.mark.parametrize("mode", ["step", "project", "layerwise"])
@pytest.mark.parametrize(
    ("shape", "proj_type", "rank", "taken"),
    [((16, 12), "std", 1, 1), ((16, 12), "std", 3, 1), ((16, 16), "std", 6, 2), ((12, 16), "right", 4, 1)],
)
def test_thirty_steps_are_those_of_the_formulas(
    shape: tuple[int, int], proj_type: str, rank: int, taken: int, mode: str
) -> None:
    model, optimizer = made("q_proj", shape, rank=rank, proj_type=proj_type, mode=mode)
    params = list(model.parameters())
    (expected,) = copied(params)
    drawn = chosen("layers.q_proj.weight", shape[0] // 4, taken, 4)
    assert len({tuple(one) for one in drawn}) > 1
    rule = CrossHeadGaLore(lr=1e-2, rank=rank, gap=8, scale=0.5, size=4, chosen=drawn)
    for step in range(30):
        run(optimizer, params, [step], spikes=False)
        rule.apply_(expected, gradient(step, expected.shape))
        torch.testing.assert_close(params[0].detach(), expected, rtol=0, atol=1e-6)


def basis_of(name: str, shape: tuple[int, int], **settings: Any) -> Tensor:
    model, optimizer = made(name, shape, rank=3, **settings)
    run(optimizer, list(model.parameters()), [0], spikes=False)
    basis: Tensor = next(iter(optimizer.state.values()))[BASIS]
    return basis


@pytest.mark.parametrize(
    ("name", "shape", "settings"),
    [
        ("o_proj", (16, 12), {}),  # its heads are along its columns
        ("up_proj", (16, 12), {}),
        ("keyboard", (16, 12), {}),
        ("q_proj", (8, 16), {}),  # std projects the rows, which heads do not share
        ("q_proj", (16, 12), {"proj_type": "full"}),
        ("q_proj", (18, 12), {}),  # no whole number of heads
        ("q_proj", (16, 12), {"head_size": 16}),  # one head is all
    ],
)
def test_others_get_what_randomized_finds(name: str, shape: tuple[int, int], settings: dict[str, Any]) -> None:
    mine = basis_of(name, shape, **settings)
    assert torch.equal(mine, basis_of(name, shape, **settings, subspace="randomized"))


@pytest.mark.parametrize("name", ["q_proj", "attention.key", "to_v", "v_lin"])
def test_attention_modules_are_known_by_name(name: str) -> None:
    assert GaLoreConfig(subspace="cross_head").has_heads(f"model.layers.0.{name}")
    assert not GaLoreConfig().has_heads(f"model.layers.0.{name}")
    last = name.rpartition(".")[2]
    assert not torch.equal(basis_of(last, (16, 12)), basis_of(last, (16, 12), subspace="randomized"))


def test_a_head_without_a_gradient_does_not_decide() -> None:
    grad = gradient(0, (16, 12)).float()
    projection = Projection(shape=(16, 12), side="right", rank=3, has_heads=True)
    generator = torch.Generator().manual_seed(0)
    head = int(torch.randperm(4, generator=torch.Generator().manual_seed(0))[0])
    grad[4 * head : 4 * head + 4] = 0
    found = CrossHead(4).find(grad, projection, generator=generator)
    other = Randomized().find(grad, projection, generator=torch.Generator().manual_seed(0))
    assert found is not None
    assert other is not None
    assert_same_subspace(found.bases[0], other.bases[0], atol=1e-3)


def test_refreshes_repeat() -> None:
    one, other = basis_of("q_proj", (16, 12)), basis_of("q_proj", (16, 12))
    assert same_bits([one], [other])
    assert not torch.equal(one, basis_of("q_proj", (16, 12), seed=5))


@pytest.mark.parametrize("rule", ["energy", "noise_edge", "energy_shrink"])
def test_ranks_by_the_spectrum_of_one_head_are_refused(rule: Any) -> None:
    with pytest.raises(
        ValueError, match=r"rank_rule='.*' looks at singular values .*subspace='cross_head' does not find"
    ):
        GaLoreConfig(subspace="cross_head", rank_rule=rule)
    with pytest.raises(ValueError, match=r"head_size=0 must be at least 1; LLaMA-7B has 128 rows a head"):
        GaLoreConfig(head_size=0)
