# SPDX-License-Identifier: Apache-2.0
"""What fused layers compute: an ordinary forward, and a backward that makes the low-rank gradient itself.

For a linear layer ``Y = X W^T``: right ``G Q = dY^T (X Q)``, left ``P^T G = (dY P)^T X``, both ``(dY P)^T (X Q)``. A
convolution is the same in the patches that its kernel sees, none of which is ever unfolded: ``X Q`` is a convolution
with the columns of ``Q`` as kernels, and ``(dY P)^T X`` the weight gradient for the output gradient ``dY P``.

Bases that are kept as codes are decoded where they are needed, the right one in forward and the left one in backward,
and held in neither: else those of all layers would be there at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_galore import gemm
from lightning_galore.coordinates import Coordinates
from lightning_galore.storage import Int8Tensor
from lightning_galore.subspace import FoldedProjection

_LEFT, _RIGHT = ("left", "full"), ("right", "full")  # sides on which there is such a basis


class LinearFunction(torch.autograd.Function):
    """``y = x W^T + b`` with a gradient for ``leaf``, in the low-rank coordinates of ``W``, and none for ``W``."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        x: Tensor,  # (t, n)
        weight: Tensor,  # (m, n)
        bias: Tensor | None,
        leaf: Tensor,  # low_shape
        coordinates: Coordinates,
        dtype: torch.dtype,  # of the weight as it is multiplied
    ) -> Tensor:
        kept = x
        if coordinates.projection.side in _RIGHT:
            kept = _times(x, coordinates.bases[-1])
            coordinates.let_go()
        ctx.save_for_backward(kept, weight if ctx.needs_input_grad[0] else None)
        ctx.coordinates = coordinates
        ctx.low_dtype = leaf.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return nn.functional.linear(x, _dense(weight, dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _check_once()
        kept, weight = ctx.saved_tensors
        coordinates: Coordinates = ctx.coordinates
        if coordinates.projection.side in _LEFT:  # the narrow factor stands first
            low = gemm.product(kept.mT, _times(grad, coordinates.bases[0]).to(kept.dtype)).mT
            coordinates.let_go()
        else:
            low = gemm.product(grad.to(kept.dtype).mT, kept)
        return (
            None if weight is None else grad @ _dense(weight, grad.dtype),
            None,
            grad.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None,
            low.to(ctx.low_dtype).contiguous(),
            None,
            None,
        )


class ConvFunction(torch.autograd.Function):
    """A convolution of one group, padded with zeros, with a gradient for ``leaf`` and none for its weight."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        x: Tensor,  # (N, i, ...)
        weight: Tensor,  # (o, i, ...)
        bias: Tensor | None,
        leaf: Tensor,  # low_shape
        coordinates: Coordinates,
        dtype: torch.dtype,  # of the weight as it is multiplied
        geometry: tuple[tuple[int, ...], ...],  # stride, padding, dilation
    ) -> Tensor:
        kept, projection = x, coordinates.projection
        assert isinstance(projection, FoldedProjection)
        if projection.side in _RIGHT:
            kernels = projection.fold(coordinates.bases[-1].mT.to(x.dtype))
            coordinates.let_go()
            kept = _convolve(x, kernels, None, geometry)
        ctx.save_for_backward(kept, weight if ctx.needs_input_grad[0] else None)
        ctx.coordinates, ctx.geometry, ctx.shape = coordinates, geometry, x.shape
        ctx.low_dtype = leaf.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _convolve(x, weight.to(dtype), None if bias is None else bias.to(dtype), geometry)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _check_once()
        kept, weight = ctx.saved_tensors
        coordinates: Coordinates = ctx.coordinates
        projection, narrow = coordinates.projection, grad
        assert isinstance(projection, FoldedProjection)
        if projection.side in _LEFT:
            left = coordinates.bases[0].to(grad.dtype)
            coordinates.let_go()
            narrow = torch.einsum("no...,or->nr...", grad, left)
        if projection.side in _RIGHT:
            low = torch.einsum("no...,nr...->or", narrow, kept)
        else:
            kernels = grad.new_empty(1).expand(narrow.shape[1], *projection.sizes[1:])
            low = projection.unfold_rows(_backward(narrow, kept, kernels, ctx.geometry, inputs=False))
        dx = None
        if weight is not None:
            unread = grad.new_empty(1).expand(ctx.shape)
            dx = _backward(grad, unread, weight.to(grad.dtype), ctx.geometry, inputs=True)
        bias = grad.flatten(2).sum((0, 2)).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, None, bias, low.to(ctx.low_dtype).contiguous(), None, None, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[tuple[int, ...], ...]) -> Tensor:
    stride, padding, dilation = geometry
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), 1)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple[tuple[int, ...], ...], *, inputs: bool
) -> Tensor:
    """The gradient of a convolution's input, or of its weight; of the other of the two only the shape is read."""
    stride, padding, dilation = geometry
    wanted, zeros = [inputs, not inputs, False], [0] * len(stride)
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, zeros, 1, wanted
    )
    result: Tensor = found[0 if inputs else 1]
    return result


def _check_once() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "A backward with create_graph=True (a gradient penalty, for example) reached a layer with "
            "fused_backward=True, whose backward cannot be differentiated. Set fused_backward=False, or name its "
            "module in ignore_modules."
        )


def _times(
    rows: Tensor,  # (t, d)
    basis: Tensor,  # (d, r)
) -> Tensor:
    """``rows @ basis`` in the wider dtype of the two where that is one of full precision, else in that of ``rows``."""
    wide = torch.promote_types(rows.dtype, basis.dtype)
    dtype = rows.dtype if rows.dtype in (torch.bfloat16, torch.float16) else wide
    return gemm.product(rows.to(dtype), basis.to(dtype))


def _dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.dequantize(dtype) if isinstance(weight, Int8Tensor) else weight.to(dtype)
