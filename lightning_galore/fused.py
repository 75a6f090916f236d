# SPDX-License-Identifier: Apache-2.0
"""Layers whose backward makes the low-rank gradient itself; the weight's full gradient is never computed.

For ``Y = X W^T`` with ``X (t, n)``, ``W (m, n)`` the gradient is ``G = dY^T X``, and its coordinates follow without it:
right ``G Q = dY^T (X Q)``, left ``P^T G = (dY P)^T X``, both ``P^T G Q = (dY P)^T (X Q)``. That is ``2 t r (m + n)``
operations instead of ``2 t m n``, and on the right only ``X Q (t, r)`` is kept for backward instead of ``X (t, n)``
(related to CompAct, arXiv 2410.15352, which takes random bases). ``fused_functions.py`` computes it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_galore.bases import StoredBases
from lightning_galore.coordinates import Coordinates
from lightning_galore.fused_functions import ConvFunction, LinearFunction
from lightning_galore.linalg import without_autocast

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[FusedLinears]] = weakref.WeakKeyDictionary()


class Receiver(Protocol):
    """What the layers ask of the hooks that they report to."""

    def fuses(self, param: Tensor) -> bool:
        """Whether this window's step of a weight wants no more of its gradient than its low-rank coordinates."""

    def coordinates(self, param: Tensor) -> Coordinates:
        """What the weight is projected with in this window."""

    def on_low_grad(self, param: Tensor, low: Tensor) -> None:
        """Take a low-rank gradient, complete for this backward."""


class FusedLinears:
    """The layers of a model that make low-rank gradients, from :meth:`install` to :meth:`remove`.

    Args:
        receiver: Gets the gradients; held weakly, so that layers left alone do not keep an optimizer alive.
    """

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = weakref.ref(receiver)
        self._leaves: dict[Tensor, tuple[StoredBases, Tensor]] = {}  # with the bases that each is for
        self._installed: list[nn.Module] = []

    @property
    def weights(self) -> set[Tensor]:
        """The weights of the layers."""
        return {module.weight for module in self._installed if isinstance(module.weight, Tensor)}

    @property
    def bases(self) -> list[StoredBases]:
        """Those that the layers multiply with, unit vectors that stand in among them."""
        return [stored for stored, _ in self._leaves.values()]

    def install(self, model: nn.Module, params: Iterable[Tensor]) -> None:
        """Let the linear layers and convolutions that hold these weights report to the receiver, each once.

        Class, name, parameters, hooks and signature of a module stay as they are. A subclass with a ``forward`` of its
        own is left alone: nobody knows what it does with the weight.

        Args:
            model: Holds the modules.
            params: Their weights.
        """
        wanted = set(params)
        for module in model.modules():
            if _is_plain(module) and module.weight in wanted and _is_free(module):
                # A bound method: a deep copy binds it to the copy, and unpickling makes the class's own of it.
                module.forward = MethodType(forward, module)
                _OWNERS[module] = weakref.ref(self)
                self._installed.append(module)

    def remove(self) -> None:
        """Give all modules their own forward back."""
        for module in self._installed:
            owner = _OWNERS.get(module)
            if owner is not None and owner() is self:  # not another's that has come since
                vars(module).pop("forward", None)
                del _OWNERS[module]
        self._installed.clear()
        self._leaves.clear()

    def apply(self, module: Any, x: Tensor) -> Tensor | None:
        """What the layer gives for ``x``, for a linear one ``(..., n)``; None where its ordinary forward shall run."""
        receiver, weight = self._receiver(), module.weight
        if receiver is None or not torch.is_grad_enabled() or not weight.requires_grad:
            return None
        linear = isinstance(module, nn.Linear)
        if not linear and x.ndim != weight.ndim:  # no batch
            return None
        if not receiver.fuses(weight):
            self._leaves.pop(weight, None)  # with bases that are about to be old
            return None
        dtype = weight.dtype
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
        coordinates = receiver.coordinates(weight)
        with without_autocast(x.device):
            leaf = self._leaf(weight, coordinates)
            given = weight.detach(), module.bias, leaf, coordinates, dtype
            if linear:
                # Rows in and out, and the view made here: what a function of autograd gives must be no view, or nobody
                # could change it in place (nn.ReLU(inplace=True)).
                rows: Tensor = LinearFunction.apply(x.reshape(-1, x.shape[-1]), *given)
                return rows.view(*x.shape[:-1], rows.shape[-1])
            output: Tensor = ConvFunction.apply(x, *given, (module.stride, module.padding, module.dilation))
        return output

    def _leaf(self, weight: Tensor, coordinates: Coordinates) -> Tensor:
        """Stands for the weight in the graph: autograd adds up the low-rank gradients of all its uses, and says when.

        A tensor of one entry, seen in the low-rank shape; another one for each basis.
        """
        stored, before = coordinates.stored, self._leaves.get(weight)
        if before is not None and before[0].is_same(stored):
            return before[1]
        one = torch.zeros((), dtype=weight.dtype, device=weight.device)
        leaf = one.expand(coordinates.projection.low_shape).requires_grad_()
        owner, key = weakref.ref(self), weakref.ref(weight)

        def hook(leaf: Tensor) -> None:
            layers, param = owner(), key()
            receiver = layers._receiver() if layers is not None else None
            low, leaf.grad = leaf.grad, None
            if receiver is None or param is None or low is None:
                return
            if not receiver.coordinates(param).stored.is_same(stored):
                raise RuntimeError(
                    f"The basis of a weight of shape {tuple(param.shape)} was refreshed between a forward pass and its "
                    "backward, whose low-rank gradient is of the old one. Go backward before optimizer.step(), or set "
                    "fused_backward=False."
                )
            receiver.on_low_grad(param, low)

        leaf.register_post_accumulate_grad_hook(hook)
        self._leaves[weight] = stored, leaf
        return leaf


@torch.compiler.disable  # which path is taken changes from step to step, and the graph would be compiled anew each time
def forward(self: Any, input: Tensor) -> Tensor:  # torch's name of it
    """What shadows the ``forward`` of a module. In a copy of the module, which nobody knows, it is just that."""
    owner = _OWNERS.get(self)
    layers = owner() if owner is not None else None
    output = layers.apply(self, input) if layers is not None else None
    return type(self).forward(self, input) if output is None else output


def _is_free(module: nn.Module) -> bool:
    """Whether nothing shadows the ``forward`` of a module but what is left of ours, in a copy or without its owner."""
    owner = _OWNERS.get(module)
    if owner is not None and owner() is not None:
        return False
    own = vars(module).get("forward")
    return own is None or getattr(own, "__func__", None) in (forward, type(module).forward)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes what its class says: a linear layer or convolution of one group, padded with zeros."""
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    kind = next((kind for kind in _CONVOLUTIONS if isinstance(module, kind)), None)
    if kind is None or type(module).forward is not kind.forward or isinstance(module.padding, str):
        return False
    return bool(module.groups == 1 and module.padding_mode == "zeros")
