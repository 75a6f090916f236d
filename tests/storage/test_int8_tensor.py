# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from lightning_galore.storage import INT8, Int8Tensor, nbytes
from tests.helpers import same_bits

OUT, IN = 20, 30


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameter(*shape: int, dtype: torch.dtype = torch.float32, trains: bool = True) -> nn.Parameter:
    value = gaussian(*(shape or (OUT, IN)), seed=1, dtype=dtype)
    return nn.Parameter(Int8Tensor.quantized(value), requires_grad=trains)


def decoded(weight: Tensor) -> Tensor:
    """A plain leaf of the same value."""
    assert isinstance(weight, Int8Tensor)
    return weight.dequantize().requires_grad_(weight.requires_grad)


def layer(*, dtype: torch.dtype = torch.float32) -> nn.Linear:
    made = nn.Linear(IN, OUT, dtype=dtype)
    with torch.no_grad():
        made.bias.copy_(gaussian(OUT, seed=2))
    made.weight = parameter(dtype=dtype)
    return made


@pytest.fixture
def int8() -> nn.Parameter:
    return parameter()


# -- linear ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN), (0, IN), (1, IN)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("setting", ["fp32", "fp64", "bf16", "autocast", "autocast-fp64", "frozen-x", "frozen-weight"])
def test_linear_is_that_of_the_decoded_weight(shape: tuple[int, ...], has_bias: bool, setting: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp64": torch.float64, "autocast-fp64": torch.float64}.get(setting, torch.float32)
    weight = parameter(dtype=dtype, trains=setting != "frozen-weight")
    results = []
    for one in (weight, decoded(weight)):
        x = gaussian(*shape, dtype=dtype).requires_grad_(setting != "frozen-x")
        bias = gaussian(OUT, seed=2, dtype=dtype).requires_grad_() if has_bias else None
        with torch.autocast("cpu", torch.bfloat16) if "autocast" in setting else nullcontext():
            y = F.linear(x, one, bias)
        y.backward(gaussian(*y.shape, seed=3).to(y.dtype))
        grads = [x.grad, one.grad, None if bias is None else bias.grad]
        assert [grad is None for grad in grads] == [setting == "frozen-x", setting == "frozen-weight", bias is None]
        results.append([y.detach(), *(grad for grad in grads if grad is not None)])
    assert same_bits(*results)
    assert all(type(part) is Tensor for part in results[0])


@pytest.mark.parametrize("autocast", [False, True])
def test_backward_keeps_codes_only(autocast: bool) -> None:
    linear = layer()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = gaussian(4, IN).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", enabled=autocast):
        y = linear(x)
    assert sorted(nbytes(one) for one in saved if isinstance(one, Int8Tensor)) == [INT8.nbytes(OUT * IN)]
    assert not [one for one in saved if not isinstance(one, Int8Tensor) and one.numel() >= OUT * IN]
    y.float().sum().backward()
    assert x.grad is not None


def test_a_frozen_weight_keeps_no_input_and_a_frozen_input_no_weight() -> None:
    for frozen_weight, expected in ((True, Int8Tensor), (False, Tensor)):
        weight, saved = parameter(trains=not frozen_weight), list[Tensor]()
        x = gaussian(4, IN).requires_grad_(frozen_weight)
        with torch.autograd.graph.saved_tensors_hooks(lambda one, to=saved: (to.append(one), one)[1], lambda one: one):
            F.linear(x, weight)
        assert [type(one) for one in saved] == [expected]


def test_gradient_of_a_gradient() -> None:
    """A gradient penalty: the weight's gradient comes through the gradient of the input too."""
    weight = parameter()
    grads = []
    for one in (weight, decoded(weight)):
        x = gaussian(4, IN).requires_grad_()
        loss = F.linear(x, one).pow(3).sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + grad.square().sum()).backward()
        assert one.grad is not None
        assert x.grad is not None
        grads.append([one.grad, x.grad])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-4)


def test_codes_as_the_input_of_linear_have_a_gradient_too(int8: nn.Parameter) -> None:
    plain, other = decoded(int8), gaussian(4, IN)
    F.linear(int8, other).square().sum().backward()
    F.linear(plain, other).square().sum().backward()
    assert int8.grad is not None
    assert plain.grad is not None
    assert same_bits([int8.grad], [plain.grad])


def test_an_overwritten_weight_is_noticed_in_backward() -> None:
    linear = layer()
    writes: list[Callable[[Tensor], Any]] = [
        lambda w: w.mul_(2),
        lambda w: w.detach().zero_(),
        lambda w: w.copy_(gaussian(OUT, IN)),
        lambda w: w.update_(gaussian(OUT, IN), torch.Generator().manual_seed(0)),  # type: ignore[attr-defined]
        lambda w: torch._foreach_mul_([w], 2.0),
    ]
    for write in writes:
        y = linear(gaussian(4, IN).requires_grad_())
        with torch.no_grad():
            write(linear.weight)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_linear_is_the_same(backend: str) -> None:
    torch._dynamo.reset()
    linear, results = layer(), []
    for run in (linear, torch.compile(linear, backend=backend)):
        linear.zero_grad()
        x = gaussian(4, IN).requires_grad_()
        y = run(x)
        y.square().sum().backward()
        assert x.grad is not None
        assert linear.weight.grad is not None
        results.append([y.detach(), x.grad, linear.weight.grad, linear.bias.grad])
    assert same_bits(*results)


def test_checkpointing_is_the_same() -> None:
    linear, results = layer(), []
    for wrap in (False, True):
        linear.zero_grad()
        x = gaussian(4, IN).requires_grad_()
        y = checkpoint(linear, x, use_reentrant=False) if wrap else linear(x)
        y.square().sum().backward()
        assert x.grad is not None
        results.append([y.detach(), x.grad, linear.weight.grad, linear.bias.grad])
    assert same_bits(*results)


# -- everything else ---------------------------------------------------------------------------------------------------

READS: dict[str, Callable[[Tensor], Tensor]] = {
    "matmul": lambda w: gaussian(2, 3, IN) @ w.t(),
    "einsum": lambda w: torch.einsum("abi,oi->abo", gaussian(2, 3, IN), w),
    "addmm": lambda w: torch.addmm(gaussian(OUT), gaussian(4, IN), w.t()),
    "slice": lambda w: w[3:7, ::2] * 2,
    "index": lambda w: w[torch.tensor([0, 3, 3])],
    "view": lambda w: w.view(-1)[:10],
    "norm": lambda w: w.norm(),
    "float": lambda w: w.float().square(),
    "double": lambda w: w.double().square(),
    "clone": lambda w: w.clone() * 3,
    "arithmetic": lambda w: 1 - w / 2 + w**2,
    "cat": lambda w: torch.cat([w, w.flip(0)]),
    "embedding": lambda w: F.embedding(torch.tensor([1, 5]), w),
    "linear-of-a-cast": lambda w: F.linear(gaussian(4, IN).double(), w.double()),
    "where": lambda w: torch.where(w > 0, w, 2 * w),
}


@pytest.mark.parametrize("name", READS)
def test_other_operations_decode(name: str, int8: nn.Parameter) -> None:
    plain, results = decoded(int8), []
    for weight in (int8, plain):
        result = READS[name](weight)
        result.square().sum().backward()
        assert weight.grad is not None
        results.append([result.detach(), weight.grad])
    assert type(results[0][1]) is Tensor
    if name in ("double", "linear-of-a-cast"):  # decoded in fp64, not rounded to fp32 before
        torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-5)
    else:
        assert same_bits(*results)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda w: w.mul_(3),
    "zero_": lambda w: w.zero_(),
    "copy_": lambda w: w.copy_(gaussian(OUT, IN, seed=5)),
    "copy_ of another dtype": lambda w: w.copy_(gaussian(OUT, IN, seed=5).bfloat16()),
    "copy_ of a row": lambda w: w.copy_(gaussian(IN, seed=5)),
    "copy_ of a number": lambda w: w.copy_(torch.tensor(0.5)),
    "copy_ of codes": lambda w: w.copy_(Int8Tensor.quantized(gaussian(OUT, IN, seed=5))),
    "lerp_": lambda w: w.lerp_(gaussian(OUT, IN, seed=5), 0.25),
    "add_": lambda w: w.add_(gaussian(OUT, IN, seed=5), alpha=0.5),
    "addmm_": lambda w: w.addmm_(gaussian(OUT, 2), gaussian(2, IN)),
    "clamp_": lambda w: w.clamp_(-0.5, 0.5),
    "masked_fill_": lambda w: w.masked_fill_(w > 0, 0.5),
    "_foreach_mul_": lambda w: torch._foreach_mul_([w, torch.ones(2)], 0.5),
    "_foreach_lerp_": lambda w: torch._foreach_lerp_([w], [gaussian(OUT, IN, seed=5)], 0.5),
    "data": lambda w: w.data.mul_(3),
    "item": lambda w: w.__setitem__((0, slice(2, 5)), 0.25),
    "items": lambda w: w.__setitem__(w > 0, 0.25),
    "out": lambda w: torch.add(gaussian(OUT, IN, seed=5), 1.0, out=w),
    "set data": lambda w: setattr(w, "data", gaussian(OUT, IN, seed=5)),
    "init": lambda w: nn.init.constant_(w, 0.125),
}


@pytest.mark.parametrize("name", WRITES)
def test_operations_in_place_write(name: str, int8: nn.Parameter) -> None:
    plain = decoded(int8)
    before = plain.detach().clone()
    version = int8._version
    with torch.no_grad():
        outcome = WRITES[name](int8)
        WRITES[name](plain)
    if isinstance(outcome, Tensor) and name != "data":
        assert outcome is int8
    assert not torch.equal(plain, before)
    step = float(plain.detach().abs().max()) / 127 * (1 + 2**-7)
    assert isinstance(int8, Int8Tensor)
    assert float((int8.dequantize() - plain.detach()).abs().max()) <= step / 2 * (1 + 1e-5)
    assert isinstance(int8, nn.Parameter)
    assert name == "data" or int8._version > version


def test_codes_are_copied_as_they_are(int8: nn.Parameter) -> None:
    other = nn.Parameter(Int8Tensor.quantized(gaussian(OUT, IN, seed=5)))
    with torch.no_grad():
        other.copy_(int8)
        assert same_bits([other.codes, other.absmax], [int8.codes, int8.absmax])
        assert other.codes.data_ptr() != int8.codes.data_ptr()
        into = torch.zeros(OUT, IN, dtype=torch.float64)
        into.copy_(int8)
    assert torch.equal(into, int8.dequantize(torch.float64))


def test_a_row_of_several_blocks_is_copied_to_all() -> None:
    weight = parameter(4, 300)
    with torch.no_grad():
        weight.copy_(gaussian(300))
    assert float((weight.detach() - gaussian(300)).abs().max()) < 0.02


def test_what_would_be_lost_is_refused(int8: nn.Parameter) -> None:
    for value in (gaussian(2, IN), gaussian(OUT, IN).double(), gaussian(OUT, IN).to("meta")):
        with pytest.raises(ValueError, match=r"data=Tensor .* cannot replace .* Use copy_ under"):
            int8.data = value
    with pytest.raises(RuntimeError, match="leaf Variable"):
        int8[0] = 1.0
    before = int8.dequantize()
    with torch.no_grad(), pytest.raises(RuntimeError):
        int8.copy_(gaussian(OUT, IN + 1))
    assert torch.equal(int8.dequantize(), before)


@pytest.mark.parametrize("how", ["store", "update", "update at random"])
def test_store_and_update_write_codes_in_place(how: str, int8: nn.Parameter) -> None:
    addresses = int8.codes.data_ptr(), int8.absmax.data_ptr()
    value, generator = gaussian(OUT, IN, seed=5), torch.Generator().manual_seed(3)
    before = int8.absmax.clone()
    expected = {
        "store": INT8.encode(value),
        "update": INT8.encode(value, absmax=before),
        "update at random": INT8.encode_stochastically(value, torch.Generator().manual_seed(3), absmax=before),
    }[how]
    with torch.no_grad():
        if how == "store":
            int8.store_(value)
        else:
            int8.update_(value, generator if how == "update at random" else None)
    assert same_bits([int8.codes, int8.absmax], expected)
    assert (int8.codes.data_ptr(), int8.absmax.data_ptr()) == addresses


def test_update_to_the_nearest_moves_nothing_where_nothing_is_added(int8: nn.Parameter) -> None:
    before = int8.codes.clone(), int8.absmax.clone()
    with torch.no_grad():
        for _ in range(3):
            int8.update_(int8.dequantize())
    assert same_bits([int8.codes, int8.absmax], before)


# -- a tensor among tensors --------------------------------------------------------------------------------------------


def test_it_is_a_parameter(int8: nn.Parameter) -> None:
    assert isinstance(int8, nn.Parameter)
    assert isinstance(int8, Int8Tensor)
    assert (int8.shape, int8.dtype, int8.requires_grad, int8.is_leaf) == ((OUT, IN), torch.float32, True, True)
    assert repr(int8) == "Int8Tensor(shape=(20, 30), dtype=torch.float32, device=cpu)"
    assert nbytes(int8) == INT8.nbytes(OUT * IN)
    assert list(nn.ParameterList([int8]).parameters()) == [int8]


def through_pickle(weight: Tensor) -> Tensor:
    return pickle.loads(pickle.dumps(weight))


def through_file(weight: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, through_pickle, through_file])
def test_copies_are_whole_and_their_own(make: Callable[[Tensor], Tensor], int8: nn.Parameter) -> None:
    other = make(int8)
    assert isinstance(other, nn.Parameter)
    assert isinstance(other, Int8Tensor)
    assert other.requires_grad
    assert same_bits([other.codes, other.absmax], [int8.codes, int8.absmax])
    with torch.no_grad():
        other.zero_()
    assert bool(int8.dequantize().any())


def test_clone_is_its_own_and_detach_is_not(int8: nn.Parameter) -> None:
    detached, cloned = int8.detach(), int8.clone()
    for one in (detached, cloned):
        assert isinstance(one, Int8Tensor)
        assert same_bits([one.codes, one.absmax], [int8.codes, int8.absmax])
    assert not detached.requires_grad
    assert detached.codes.data_ptr() == int8.codes.data_ptr()
    assert cloned.codes.data_ptr() != int8.codes.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_has_the_same_codes(dtype: torch.dtype) -> None:
    linear = layer()
    codes = linear.weight.codes.clone()
    linear.to(dtype)
    weight = linear.weight
    assert isinstance(weight, Int8Tensor)
    assert isinstance(weight, nn.Parameter)
    assert (weight.dtype, weight.dequantize().dtype) == (dtype, dtype)
    assert torch.equal(weight.codes, codes)
    assert weight.absmax.dtype == torch.bfloat16
    x = gaussian(3, IN, dtype=dtype)
    assert torch.equal(linear(x), F.linear(x, weight.dequantize(), linear.bias))


def test_another_kind_of_number_is_no_code(int8: nn.Parameter) -> None:
    whole = int8.detach().to(torch.int64)
    assert type(whole) is Tensor
    assert torch.equal(whole, int8.dequantize().to(torch.int64))


def test_meta_and_back_in_a_state_dict() -> None:
    linear = layer()
    meta = copy.deepcopy(linear).to("meta")
    assert isinstance(meta.weight, Int8Tensor)
    assert {part.device.type for part in (meta.weight, meta.weight.codes, meta.weight.absmax)} == {"meta"}
    fresh = layer()
    with torch.no_grad():
        fresh.weight.zero_()
    fresh.load_state_dict(linear.state_dict())
    assert same_bits([fresh.weight.codes, fresh.weight.absmax], [linear.weight.codes, linear.weight.absmax])


def test_it_is_made_of_its_parts(int8: nn.Parameter) -> None:
    names, meta = int8.__tensor_flatten__()
    parts = {name: getattr(int8, name) for name in names}
    again = Int8Tensor.__tensor_unflatten__(parts, meta, int8.shape, int8.stride())
    assert set(parts) == {"codes", "absmax"}
    assert torch.equal(again.dequantize(), int8.dequantize())


def test_it_trains() -> None:
    linear, generator = layer(), torch.Generator().manual_seed(0)
    x, y = gaussian(64, IN), gaussian(64, IN) @ gaussian(IN, OUT, seed=7)
    losses = []
    for _ in range(60):
        linear.zero_grad()
        loss = F.mse_loss(linear(x), y)
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            linear.weight.update_(linear.weight.dequantize() - 2.0 * linear.weight.grad, generator)
    assert losses[-1] < 0.1 * losses[0]
