# SPDX-License-Identifier: Apache-2.0
"""A weight that is kept as int8 codes and behaves as a floating-point tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from typing_extensions import Self, override

from lightning_galore.storage.blockwise import INT8

_aten = torch.ops.aten


class Int8Tensor(Tensor):
    """int8 codes with one scale for each 256 entries, under the shape and the dtype of the tensor that they stand for.

    A tensor class and not another module, so that a module keeps its class, its names and its ``forward``, and the
    parameter its place in the optimizer: gradients are ordinary tensors. Its ``linear`` keeps nothing but the codes for
    backward. Every other operation decodes first, and one that writes in place rounds to the nearest code afterwards.
    A view of it (``weight[0]``, ``weight.t()``) is a decoded copy: read it, but write to the weight itself.

    Args:
        codes: int8, of the tensor's shape.
        absmax: Scales ``(blocks,)``.
        dtype: That of the tensor, its gradients and what it is decoded into.
    """

    codes: Tensor
    absmax: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Self:
        """Make a tensor without memory of its own."""
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> None:
        self.codes, self.absmax = codes, absmax

    @classmethod
    def quantized(cls, value: Tensor) -> Self:
        """The nearest codes of a floating-point tensor."""
        codes, absmax = INT8.encode(value)
        return cls(codes, absmax, value.dtype)

    @override
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor that the codes stand for.

        Args:
            dtype: Of the result; None for that of the tensor.
        """
        return INT8.decode(self.codes, self.absmax, self.shape, dtype or self.dtype)

    def store_(self, value: Tensor) -> None:
        """Write another floating-point value, to the nearest codes with fresh scales.

        What the codes stand for already stays as it is: fresh scales would be others, and the codes with them.
        """
        if not torch.equal(value, self.dequantize(value.dtype)):
            self._take(*INT8.encode(value))

    def update_(self, value: Tensor, generator: torch.Generator | None = None) -> None:
        """Write what this has become by a small step: scales stay where they serve, so that what did not move stays.

        Args:
            value: Floating-point, of the same shape.
            generator: Rounds at random; None rounds to the nearest codes.
        """
        if generator is None:
            self._take(*INT8.encode(value, absmax=self.absmax))
        else:
            self._take(*INT8.encode_stochastically(value, generator, absmax=self.absmax))

    def _take(self, codes: Tensor, absmax: Tensor) -> None:
        self.codes.copy_(codes)
        self.absmax.copy_(absmax)
        # What autograd has saved of this tensor is another one now.
        torch.autograd.graph.increment_version(self)

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return ["codes", "absmax"], {"dtype": self.dtype}

    @classmethod
    def __tensor_unflatten__(
        cls, inner: Mapping[str, Tensor], meta: Mapping[str, Any], outer_size: Any, outer_stride: Any
    ) -> Self:
        return cls(inner["codes"], inner["absmax"], meta["dtype"])

    @override
    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    @override
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        function = _FUNCTIONS.get(func)
        if function is not None:
            return function(*args, **(kwargs or {}))
        # Not the parent's: it would dress up every result as this class.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    @override
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as no class method
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(*args, **kwargs)
        schema = enumerate(func._schema.arguments)
        written = [(i, arg.name) for i, arg in schema if arg.alias_info and arg.alias_info.is_write]
        plain: dict[int, Tensor] = {}

        def decoded(value: Int8Tensor) -> Tensor:
            return plain.setdefault(id(value), value.dequantize())

        results = func(*tree_map_only(Int8Tensor, decoded, args), **tree_map_only(Int8Tensor, decoded, kwargs))
        targets = [args[i] if i < len(args) else kwargs.get(name) for i, name in written]
        changed = [one for target in targets for one in _tensors(target)]
        for value in changed:
            value.store_(plain[id(value)])
        if not changed:
            return results
        wrapped = {id(plain[id(value)]): value for value in changed}
        return tree_map_only(Tensor, lambda value: wrapped.get(id(value), value), results)


def _tensors(arg: Any) -> list[Int8Tensor]:
    items = arg if isinstance(arg, (list, tuple)) else [arg]
    return [item for item in items if isinstance(item, Int8Tensor)]


def _detach(value: Int8Tensor) -> Int8Tensor:
    return Int8Tensor(value.codes, value.absmax, value.dtype)


def _clone(value: Int8Tensor, **kwargs: Any) -> Int8Tensor:
    return Int8Tensor(value.codes.clone(), value.absmax.clone(), value.dtype)


def _to_copy(value: Int8Tensor, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
    if dtype is not None and not dtype.is_floating_point:
        return _aten._to_copy.default(value.dequantize(), dtype=dtype, **kwargs)
    kwargs.pop("memory_format", None)
    codes, absmax = (_aten._to_copy.default(one, **kwargs) for one in (value.codes, value.absmax))
    return Int8Tensor(codes, absmax, dtype or value.dtype)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, Int8Tensor):
        assert isinstance(source, Int8Tensor)
        return target.copy_(source.dequantize(target.dtype), non_blocking=non_blocking)
    if isinstance(source, Int8Tensor):
        target._take(source.codes, source.absmax)
    else:
        target.store_(source.to(target.device).expand(target.shape))
    return target


_HANDLERS: dict[Any, Callable[..., Tensor]] = {
    _aten.detach.default: _detach,
    _aten.alias.default: _detach,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.copy_.default: _copy,
}


class _Linear(torch.autograd.Function):
    """``y = x W^T + b`` that saves the codes of ``W`` for backward, and decodes them there once more."""

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, weight: Int8Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        # As nn.Linear does: no more than what backward needs.
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return nn.functional.linear(x, weight.dequantize(dtype), bias)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            # Not dequantize: for the gradient of this gradient.
            grad @ weight.to(grad.dtype) if needs_x else None,
            rows.mT @ x.reshape(-1, x.shape[-1]) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
            None,
        )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Int8Tensor) or weight.dim() != 2:  # the input or the bias is one
        with torch._C.DisableTorchFunctionSubclass():
            return nn.functional.linear(input, weight, bias)
    device = input.device.type
    # As autocast itself, which leaves fp64 as it is.
    if torch.is_autocast_enabled(device) and torch.float64 not in (input.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(device)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
    else:
        dtype = weight.dtype
    return _Linear.apply(input, weight, bias, dtype)


def _set_item(target: Tensor, index: Any, value: Any) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        if isinstance(target, Int8Tensor):
            plain = target.dequantize()
            plain[index] = value
            target.copy_(plain)
        else:  # the value is one
            target[index] = value


def _set_data(target: Tensor, value: Tensor) -> None:
    """``target.data = value``, which otherwise would replace memory that this class does not have, and be lost."""
    same = (target.shape, target.dtype, target.device) == (value.shape, value.dtype, value.device)
    if not isinstance(target, Int8Tensor) or not same:
        given, held = (f"{type(t).__name__} {tuple(t.shape)}, {t.dtype}, {t.device}" for t in (value, target))
        raise ValueError(
            f"data={given} cannot replace {held}: int8 codes keep their place. Use copy_ under torch.no_grad(), or "
            "make another parameter."
        )
    _copy(target, value.detach())


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    nn.functional.linear: _linear,
    Tensor.__setitem__: _set_item,
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
}
