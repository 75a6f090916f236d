# SPDX-License-Identifier: Apache-2.0
"""Weights as int8 codes inside a module: who notices (nobody), what its state dict holds, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_galore import GaLoreOptimizer
from lightning_galore.storage import Int8Tensor
from lightning_galore.weights import (
    coded_weights,
    damaged_codes,
    dequantize,
    holds_codes,
    plain_state_dict,
    prepare_to_load,
    quantize,
)

from .common import assert_same_states, coded, decoded, is_plain


def body(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Its weights of 24 x 20 fill one block of 256 entries and a part of another."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 20), nn.LayerNorm(20)).to(dtype)


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(1)).to(dtype)


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


def in_int8(model: nn.Sequential) -> nn.Sequential:
    quantize(model, weights_of(model))
    return model


def decoded_twin(model: nn.Sequential) -> nn.Sequential:
    """The same module with the floating-point weights that the codes stand for."""
    twin = body(next(iter(model.parameters())).dtype, seed=9)
    twin.load_state_dict(plain_state_dict(model.state_dict()))
    return twin


# -- nobody notices ----------------------------------------------------------------------------------------------------


def test_names_classes_hooks_and_identity_stay() -> None:
    model = body()
    params = dict(model.named_parameters())
    model[0].weight.note = "mine"  # type: ignore[attr-defined]
    model[2].weight.requires_grad_(False)
    forward = [lambda *_: None, lambda *_: None]
    model[0].register_forward_hook(forward[0])
    model[0].register_forward_pre_hook(forward[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    groups = [dict(group, params=list(group["params"])) for group in optimizer.param_groups]
    in_int8(model)
    assert {name: id(param) for name, param in model.named_parameters()} == {k: id(v) for k, v in params.items()}
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in groups[0]["params"]]
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == {
        k: v for k, v in groups[0].items() if k != "params"
    }
    assert [type(module) for module in model] == [nn.Linear, nn.Tanh, nn.Linear, nn.LayerNorm]
    assert list(model[0]._forward_hooks.values()) == forward[:1]
    assert list(model[0]._forward_pre_hooks.values()) == forward[1:]
    assert all(isinstance(param, nn.Parameter) for param in model.parameters())
    assert model[0].weight.note == "mine"  # type: ignore[attr-defined]
    assert [weight.requires_grad for weight in weights_of(model)] == [True, False]
    assert (model[0].weight.shape, model[0].weight.dtype, model[0].weight.numel()) == ((24, 20), torch.float32, 480)
    assert coded(model) == {"0.weight", "2.weight"} == set(coded_weights(model))


@pytest.mark.parametrize("back", [False, True], ids=["quantized", "and decoded again"])
def test_hooks_and_the_gradient_of_a_parameter_stay(back: bool) -> None:
    model, calls = body(), []
    weight = model[0].weight
    handles = [
        weight.register_hook(lambda grad: calls.append("gradient")),
        weight.register_post_accumulate_grad_hook(lambda param: calls.append("accumulated")),
    ]
    weight.grad = torch.ones_like(weight)
    in_int8(model)
    if back:
        dequantize(model)
        assert is_plain(weight)
    model(rows()).sum().backward()
    assert calls == ["gradient", "accumulated"]
    twin = decoded_twin(model)
    twin(rows()).sum().backward()
    torch.testing.assert_close(weight.grad, twin[0].weight.grad + 1, rtol=1e-4, atol=1e-4)
    for handle in handles:
        handle.remove()
    model(rows()).sum().backward()
    assert len(calls) == 2


class Tied(nn.Module):
    """One weight in two layers, and one of a layer that an embedding has too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 30)
        self.second.weight = self.first.weight
        self.words = nn.Embedding(30, 20)
        self.head.weight = self.words.weight


def test_tied_weights_stay_tied() -> None:
    model = Tied()
    with pytest.warns(UserWarning, match=r"nn\.Linear modules only: head\.weight stay as they are"):
        quantize(model, [model.first.weight, model.head.weight])
    assert model.second.weight is model.first.weight
    assert isinstance(model.first.weight, Int8Tensor)
    assert is_plain(model.head.weight)
    state = model.state_dict()
    assert state["first.weight"].data_ptr() == state["second.weight"].data_ptr()
    assert {key for key in state if key.endswith("_absmax")} == {"first.weight_absmax", "second.weight_absmax"}
    other = Tied()
    prepare_to_load(other, state)
    other.load_state_dict(state)
    assert other.second.weight is other.first.weight
    assert_same_states(other.state_dict(), state)


class Conv1D(nn.Module):
    """As in transformers' GPT-2: a linear layer with a transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(20, 24)), nn.Parameter(torch.zeros(24))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, 20), self.weight).view(*x.shape[:-1], 24)


def test_weights_of_other_modules_stay_with_a_warning() -> None:
    model = nn.Sequential(Conv1D(), nn.Linear(24, 20))
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.warns(UserWarning, match=r"weight_storage='int8' keeps weights of nn\.Linear modules only: 0\.weight"):
        optimizer = GaLoreOptimizer(base, model, rank=2, target_modules=".*", weight_storage="int8")
    assert len(optimizer.targets) == 2
    assert coded(model) == {"1.weight"}
    before = model[0].weight.detach().clone()
    model(rows()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_without_a_model_there_is_an_error() -> None:
    weight = nn.Parameter(torch.randn(24, 20))
    base = torch.optim.AdamW([{"params": [weight], "rank": 2}], lr=1e-2)
    with pytest.raises(ValueError, match=r"weight_storage='int8' needs the model.*pass model="):
        GaLoreOptimizer(base, weight_storage="int8")


def test_a_weight_in_use_by_a_graph_is_refused() -> None:
    model = body()
    loss = model(rows()).sum()
    with pytest.raises(ValueError, match=r"2\.weight cannot change how it is kept.*before the first forward pass"):
        in_int8(model)
    del loss
    assert coded(in_int8(model)) == {"0.weight", "2.weight"}


# -- what they compute -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients_are_those_of_the_decoded_weights(dtype: torch.dtype, autocast: Any) -> None:
    model = in_int8(body(dtype))
    twin = decoded_twin(model)
    results = []
    for one in (model, twin):
        x = rows(dtype).requires_grad_()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            y = one(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(param.grad for param in one.parameters())])
    tolerance = 1e-5 if dtype == torch.float32 and autocast is None else 2e-2
    for ours, expected in zip(*results, strict=True):
        assert is_plain(ours)
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_gradient_of_a_gradient_is_that_of_the_decoded_weights() -> None:
    """A gradient penalty, as GANs have it: the inner gradient depends on the weights too."""
    model = in_int8(body())
    found = []
    for one in (model, decoded_twin(model)):
        x = rows().requires_grad_()
        (inner,) = torch.autograd.grad(one(x).square().sum(), x, create_graph=True)
        inner.square().sum().backward()
        found.append(one[0].weight.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = in_int8(body())
    twin = decoded_twin(model)
    for one in (model, twin):
        checkpoint(one, rows().requires_grad_(), use_reentrant=reentrant).square().sum().backward()  # type: ignore[union-attr]
    for ours, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_modules_that_use_a_linear_of_theirs_in_another_way() -> None:
    """``nn.MultiheadAttention`` reads the weight of its ``out_proj``, and a layer may read its own transposed."""
    attention = nn.MultiheadAttention(20, 2, batch_first=True)
    expected = attention(rows(), rows(), rows())[0].detach()
    quantize(attention, [attention.out_proj.weight])
    ours = attention(rows(), rows(), rows())[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-2)
    ours.sum().backward()
    assert attention.out_proj.weight.grad is not None
    model = in_int8(body())
    y = rows() @ model[0].weight.T
    torch.testing.assert_close(y, rows() @ decoded_twin(model)[0].weight.T)


# -- state dicts -------------------------------------------------------------------------------------------------------


def test_state_dict_is_plain_tensors_in_their_places() -> None:
    model = in_int8(body())
    state = model.state_dict()
    assert set(state) == {*body().state_dict(), "0.weight_absmax", "2.weight_absmax"}
    assert all(is_plain(value) for value in state.values())
    assert (state["0.weight"].dtype, state["0.weight"].shape) == (torch.int8, (24, 20))
    absmax = state["0.weight_absmax"]
    assert (absmax.dtype, absmax.shape) == (torch.bfloat16, (2,))  # 480 entries in blocks of 256
    assert torch.equal(decoded(state, "0.weight"), model[0].weight.dequantize())
    off = (decoded(state, "0.weight") - body()[0].weight.detach()).abs()
    assert 0 < float(off.max()) <= 0.51 * float(state["0.weight_absmax"].float().max()) / 127
    wrapped = nn.ModuleDict({"inner": model}).state_dict(prefix="outer.")
    assert torch.equal(wrapped["outer.inner.0.weight"], state["0.weight"])
    assert is_plain(model.state_dict(keep_vars=True)["0.weight"])


@pytest.mark.parametrize("assign", [False, True])
def test_codes_load_into_codes(assign: bool) -> None:
    state = copy.deepcopy(in_int8(body()).state_dict())
    other = in_int8(body(seed=1))
    other.load_state_dict(state, assign=assign)
    assert coded(other) == {"0.weight", "2.weight"}
    assert_same_states(other.state_dict(), state)
    assert all(isinstance(param, nn.Parameter) and param.requires_grad for param in other.parameters())


def test_codes_load_into_a_fresh_model_that_was_prepared_and_not_into_another() -> None:
    state = in_int8(body()).state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.weight_absmax"):
        body(seed=1).load_state_dict(state)
    fresh = body(seed=1)
    prepare_to_load(fresh, state)
    fresh.load_state_dict(state)
    assert_same_states(fresh.state_dict(), state)
    untouched = body(seed=1)
    prepare_to_load(untouched, untouched.state_dict())
    assert coded(untouched) == set()


def test_codes_of_some_weights_make_codes_of_just_those() -> None:
    part = body()
    quantize(part, [part[2].weight])
    fresh = body(seed=1)
    prepare_to_load(fresh, part.state_dict())
    assert coded(fresh) == {"2.weight"}
    fresh.load_state_dict(part.state_dict())
    assert_same_states(fresh.state_dict(), part.state_dict())


def test_codes_load_into_a_model_that_was_decoded_and_floats_into_codes() -> None:
    model = in_int8(body())
    state = copy.deepcopy(model.state_dict())
    dequantize(model)
    assert coded(model) == set()
    assert_same_states(model.state_dict(), plain_state_dict(state))
    model.load_state_dict(state)
    assert coded(model) == set()
    assert torch.equal(model[0].weight, decoded(state, "0.weight"))
    other = in_int8(body(seed=1))
    other.load_state_dict(body().state_dict())
    assert coded(other) == {"0.weight", "2.weight"}
    assert torch.equal(other.state_dict()["0.weight"], in_int8(body()).state_dict()["0.weight"])


def test_codes_of_another_shape_are_refused() -> None:
    state = in_int8(nn.Sequential(nn.Linear(30, 24))).state_dict()
    model = nn.Sequential(nn.Linear(20, 24))
    prepare_to_load(model, state)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        model.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_state_dict(dtype: torch.dtype) -> None:
    state = in_int8(body()).state_dict()
    state["mask"], state["3.own_absmax"] = torch.zeros(3, dtype=torch.int8), torch.ones(2)  # the user's, no codes
    assert holds_codes(state)
    plain = plain_state_dict(state, dtype=dtype)
    assert list(plain) == [key for key in state if key not in ("0.weight_absmax", "2.weight_absmax")]
    assert torch.equal(plain["0.weight"], decoded(state, "0.weight", dtype))
    assert plain["0.bias"].dtype == torch.float32
    assert torch.equal(plain["mask"], state["mask"])
    assert not holds_codes(plain)


def test_damaged_codes_are_found() -> None:
    state = in_int8(body()).state_dict()
    state["mask"] = torch.zeros(3, dtype=torch.int8)
    assert damaged_codes(state) == []
    for bad in (torch.ones(3, dtype=torch.bfloat16), torch.tensor([1, torch.nan]).bfloat16(), -torch.ones(2).bfloat16(),
                torch.ones(2, dtype=torch.int16), "none"):  # fmt: skip
        assert damaged_codes({**state, "0.weight_absmax": bad}) == ["0.weight"]
    assert damaged_codes({**state, "2.weight": state["2.weight"][:3]}) == ["2.weight"]


# -- copies ------------------------------------------------------------------------------------------------------------


def test_a_copy_shares_nothing_and_has_the_same_state() -> None:
    model = in_int8(body())
    twin = copy.deepcopy(model)
    assert coded(twin) == coded(model)
    assert all(isinstance(param, nn.Parameter) for param in twin.parameters())
    assert_same_states(twin.state_dict(), model.state_dict())
    with torch.no_grad():
        twin[0].weight.mul_(-1)
    assert torch.equal(twin.state_dict()["0.weight"], -model.state_dict()["0.weight"])
    twin.load_state_dict(model.state_dict())
    assert_same_states(twin.state_dict(), model.state_dict())


def test_another_dtype_changes_no_code_and_no_identity() -> None:
    model = in_int8(body())
    state, weight = copy.deepcopy(model.state_dict()), model[0].weight
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        assert model[0].weight is weight
        assert weight.dtype == dtype
        assert model(rows(dtype)).dtype == dtype
        for key in ("0.weight", "0.weight_absmax"):
            assert torch.equal(model.state_dict()[key], state[key])


def test_only_the_chosen_are_decoded() -> None:
    model = in_int8(body())
    dequantize(model, [model[0].weight])
    assert coded(model) == {"2.weight"}
