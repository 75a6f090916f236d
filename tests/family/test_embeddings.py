# SPDX-License-Identifier: Apache-2.0
"""Embeddings and heads as targets: named on purpose, with a rank and a learning rate of their own, dense or sparse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_galore import GaLoreOptimizer
from lightning_galore.state_keys import BASIS
from tests.family.tensors import MODES
from tests.helpers import TinyTransformer, max_difference, train
from tests.reference.galore_reference import Adam, GaLore

EMBEDDING = "embedding, or tied to one (taken where a pattern names only embeddings)"
CLASS = "class:torch.nn.Embedding"


def taken(model: nn.Module, patterns: Any, **settings: Any) -> set[str]:
    optimizer = GaLoreOptimizer(
        torch.optim.AdamW(model.parameters()), model, **{"rank": 2, "target_modules": patterns, **settings}
    )
    return {target.name for target in optimizer.targets.values()}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (CLASS, True),
        ([nn.Embedding], True),
        (["embedding"], True),
        ("embedding", True),
        (["query", "embedding"], True),  # each pattern by itself
        (["query", CLASS], True),
        (".*", False),  # a pattern as wide as that does not ask for it
        (["class:torch.nn.Module"], False),
        (["e"], False),
        (r"embedding|lm_head", False),
    ],
)
def test_an_embedding_is_taken_where_it_is_meant(patterns: Any, expected: bool) -> None:
    model = TinyTransformer()
    assert ("embedding.weight" in taken(model, patterns)) is expected


def test_norms_beside_an_embedding_do_not_count() -> None:
    model = nn.ModuleDict({"embeddings": nn.ModuleDict({"word": nn.Embedding(30, 8), "norm": nn.LayerNorm(8)})})
    assert taken(model, ["embeddings"]) == {"embeddings.word.weight"}


def test_a_tied_head_goes_with_its_embedding() -> None:
    model = TinyTransformer()
    model.lm_head.weight = model.embedding.weight
    assert "embedding.weight" not in taken(model, ["query", "lm_head"])
    optimizer = GaLoreOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.01), model, rank=2, target_modules=["embedding"], update_proj_gap=3
    )
    (weight,) = optimizer.targets
    assert weight is model.lm_head.weight
    losses = train(model, optimizer, [0] * 12)
    assert losses[-1] < losses[0]
    # One parameter with one gradient, from both ends; one state.
    assert optimizer.state[weight]["exp_avg"].shape == (24, 2)


@pytest.mark.parametrize("mode", MODES)
def test_rank_and_learning_rate_of_their_own(mode: Any) -> None:
    model = TinyTransformer(dtype=torch.float64)
    vocabulary = [model.embedding.weight, model.lm_head.weight]
    others = [param for param in model.parameters() if all(param is not one for one in vocabulary)]
    groups = [{"params": others, "lr": 0.01}, {"params": vocabulary, "lr": 0.002, "scale": 1.0}]
    optimizer = GaLoreOptimizer(
        torch.optim.AdamW(groups, weight_decay=0.0),
        model,
        rank=4,
        target_modules=[CLASS, "class:torch.nn.Linear"],
        rank_pattern={"embedding": 3, "lm_head": 0.5},
        method="galore",
        fix_signs=False,
        update_proj_gap=4,
        mode=mode,
    )
    ranks = {target.name: target.projection.rank for target in optimizer.targets.values()}
    assert ranks == {
        "embedding.weight": 3,
        "lm_head.weight": 8,
        **{f"blocks.0.{name}.weight": 4 for name in ("query", "key", "value", "output", "up", "down")},
    }
    plain = GaLore(rule=Adam(lr=0.002), rank=3, gap=4, scale=1.0)
    expected, twin = model.embedding.weight.detach().clone(), TinyTransformer(dtype=torch.float64)
    for step in range(12):
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        train(twin, torch.optim.SGD(twin.parameters(), lr=0.0), [step])
        assert twin.embedding.weight.grad is not None
        plain.apply_(expected, twin.embedding.weight.grad)
        train(model, optimizer, [step])
        assert max_difference([model.embedding.weight], [expected]) < 1e-9


class Bag(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(40, 12, sparse=sparse, dtype=torch.float64)
        self.last = nn.Linear(12, 5, dtype=torch.float64)

    def forward(self, words: Tensor) -> Tensor:
        return self.last(self.words(words).mean(1).tanh())


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("base", ["AdamW", "SGD"])
def test_row_sparse_gradients_train_as_dense_ones(base: str, mode: Any, accumulate: int, clip: float | None) -> None:
    ends = []
    for sparse in (False, True):
        model = Bag(sparse=sparse)
        optimizer = GaLoreOptimizer(
            getattr(torch.optim, base)(model.parameters(), lr=0.05, weight_decay=0.1),
            model,
            rank=3,
            target_modules=["words"],
            update_proj_gap=3,
            mode=mode,
            clip_weight_norm=clip,
        )
        for step in range(8):
            generator = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            for micro in range(accumulate):
                words = torch.randint(40, (6, 4), generator=generator)
                with optimizer.hooks.arming(micro == accumulate - 1):
                    F.cross_entropy(model(words), words[:, 0] % 5).backward()
            assert float(optimizer.grad_norm()) > 0
            if mode == "step":
                assert model.words.weight.grad is not None
                assert model.words.weight.grad.is_sparse is sparse  # what the user sees stays as it was
            optimizer.step()
        assert optimizer.state[model.words.weight][BASIS].shape == (12, 3)
        ends.append([param.detach() for param in model.parameters()])
    assert max_difference(*ends) < 1e-12


def test_the_table_says_why_an_embedding_is_left_out() -> None:
    model = TinyTransformer()
    optimizer = GaLoreOptimizer(torch.optim.AdamW(model.parameters()), model, rank=2, target_modules=".*")
    reasons = {row.name: row.reason for row in optimizer.targets_table().rows}
    assert reasons["embedding.weight"] == EMBEDDING
