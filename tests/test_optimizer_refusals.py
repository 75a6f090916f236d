# SPDX-License-Identifier: Apache-2.0
"""What cannot be wrapped is refused by name, with the reason and the remedy."""

from __future__ import annotations

from typing import Any

import galore_torch
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_galore import GaLoreOptimizer
from tests.helpers import Matrices
from tests.test_optimizer_bases import Lion

optim = torch.optim


def matrices() -> Matrices:
    return Matrices((12, 8))


class Unheard(Optimizer):
    """An optimizer that nobody knows."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, {"lr": 0.1, **defaults})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])


class Lamb(Unheard):
    """Known by name wherever it comes from."""


class Prodigy(Unheard):
    """Known by name wherever it comes from."""


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda p: optim.LBFGS(p),
            r"base=LBFGS cannot be wrapped: it evaluates the loss several times .* Use torch\.opt",
        ),
        (lambda p: optim.SparseAdam(p), r"base=SparseAdam cannot be wrapped: it takes row-sparse gradients"),
        (
            lambda p: optim.ASGD(p),
            r"base=ASGD cannot be wrapped: it reads the weight's value, .* Use torch\.optim\.AdamW",
        ),
        (lambda p: Lamb(p), r"base=Lamb cannot be wrapped: it scales its step by the weight's norm"),
        (lambda p: Prodigy(p), r"base=Prodigy cannot be wrapped: it reads the weight's value"),
    ],
)
def test_optimizer_that_needs_the_weight_is_refused(build: Any, message: str) -> None:
    model = matrices()
    with pytest.raises(ValueError, match=message):
        GaLoreOptimizer(build(list(model.parameters())), model, rank=2)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("LAMB", {}, r"base=LAMB cannot be wrapped: it scales its step by the weight's norm"),
        ("LAMB8bit", {}, r"base=LAMB8bit cannot be wrapped: it scales its step by the weight's norm"),
        ("LARS", {"lr": 0.1, "momentum": 0.9}, r"base=LARS cannot be wrapped: it scales its step by the weight's norm"),
        ("LARS8bit", {"lr": 0.1, "momentum": 0.9}, r"base=LARS8bit cannot be wrapped"),
        (
            "PytorchLARS",
            {"momentum": 0.9},
            r"base=PytorchLARS cannot be wrapped: it scales its step by the weight's norm",
        ),
    ],
)
def test_bitsandbytes_layerwise_optimizers_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = matrices()
    with pytest.raises(ValueError, match=message):
        GaLoreOptimizer(getattr(bnb.optim, name)(model.parameters(), **settings), model, rank=2)


def test_bitsandbytes_limit_on_the_updates_norm_is_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = matrices()
    base = bnb.optim.AdamW8bit(model.parameters())
    base.args.max_unorm = 100
    with pytest.raises(ValueError, match=r"base=AdamW8bit with max_unorm=100 cannot be wrapped: .* Set max_unorm=0\."):
        GaLoreOptimizer(base, model, rank=2)


@pytest.mark.parametrize("key", ["capturable", "differentiable"])
def test_groups_that_need_fixed_tensors_are_refused(key: str) -> None:
    model = matrices()
    base = optim.AdamW(model.parameters(), **{key: True})
    with pytest.raises(ValueError, match=rf"base=AdamW with {key}=True cannot be wrapped: .* Set {key}=False\."):
        GaLoreOptimizer(base, model, rank=2)


def test_decay_of_unknown_kind_is_refused() -> None:
    model = matrices()
    message = (
        r"weight_decay=0\.1: whether Unheard decouples it from the gradient is not known\. "
        r"Add decoupled_weight_decay=True or False to its param groups, or set weight_decay=0\."
    )
    with pytest.raises(ValueError, match=message):
        GaLoreOptimizer(Unheard(model.parameters(), weight_decay=0.1), model, rank=2)
    base = Unheard(model.parameters(), weight_decay=0.1, decoupled_weight_decay=True)
    with pytest.warns(UserWarning, match="base=Unheard is not among"):
        GaLoreOptimizer(base, model, rank=2)


def test_decoupled_decay_without_a_learning_rate_is_refused() -> None:
    model = matrices()
    base = Lion(model.parameters(), lr=None, weight_decay=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lr=None with weight_decay=0\.1: .* needs a learning rate\. Set lr\."):
        GaLoreOptimizer(base, model, rank=2)


def test_unknown_class_is_wrapped_with_a_warning() -> None:
    model = matrices()
    with pytest.warns(UserWarning, match=r"base=Unheard is not among the optimizers known to .* gradients only"):
        optimizer = GaLoreOptimizer(Unheard(model.parameters()), model, rank=2)
    model.give_gradients(0)
    before = model.layers[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.layers[0].weight, before)


@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "Adafactor", "RMSprop"])
def test_optimizer_that_was_already_stepped_is_refused(name: str) -> None:
    model = matrices()
    base = getattr(optim, name)(model.parameters(), lr=0.1)
    model.give_gradients(0)
    base.step()
    message = (
        rf"base={name} has already been stepped: .* full-rank.*\. Wrap a fresh optimizer, or load a checkpoint after"
    )
    with pytest.raises(ValueError, match=message):
        GaLoreOptimizer(base, model, rank=2)


def test_wrapper_is_not_wrapped_again() -> None:
    model = matrices()
    optimizer = GaLoreOptimizer(optim.AdamW(model.parameters()), model, rank=2)
    with pytest.raises(ValueError, match=r"base=GaLoreAdamW is wrapped already; use it as it is, or wrap its \.base"):
        GaLoreOptimizer(optimizer, model, rank=2)


@pytest.mark.parametrize("name", ["GaLoreAdamW", "GaLoreAdafactor"])
def test_optimizer_that_projects_by_itself_is_refused(name: str) -> None:
    model = matrices()
    group = {"params": list(model.parameters()), "rank": 2, "update_proj_gap": 10, "scale": 1.0, "proj_type": "std"}
    base = getattr(galore_torch, name)([group])
    message = r"base=\w+ of galore_torch\.\w+ projects by itself .* Give the same groups to torch\.optim\.AdamW instead"
    with pytest.raises(ValueError, match=message):
        GaLoreOptimizer(base, model, rank=2)


@pytest.mark.parametrize("base", [None, "adamw", optim.AdamW, [torch.nn.Parameter(torch.ones(2, 2))]])
def test_what_is_no_optimizer_is_refused(base: Any) -> None:
    with pytest.raises(TypeError, match=r"(?s)base=.* must be a torch\.optim\.Optimizer over the model's parameters"):
        GaLoreOptimizer(base, matrices(), rank=2)


def test_setting_out_of_range_in_a_group_is_refused() -> None:
    model = matrices()
    base = optim.AdamW([{"params": list(model.parameters()), "rank": 2, "scale": 0.0}])
    with pytest.raises(ValueError, match=r"scale=0\.0 must be positive"):
        GaLoreOptimizer(base, model)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'ranks'"):
        GaLoreOptimizer(optim.AdamW(model.parameters()), model, ranks=2)


def test_nothing_to_project_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"^rank=4 is too large: the widest it may be here is 3 .*0\.weight\)"):
        GaLoreOptimizer(optim.AdamW(model.parameters()), model, rank=4)
