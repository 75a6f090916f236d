# SPDX-License-Identifier: Apache-2.0
"""Weights that are kept as int8 codes: putting them into a model, into its state dict, and back into floating point.

In a state dict a weight is two plain tensors, ``weight`` (int8 codes of its shape) and ``weight_absmax`` (one scale for
each 256 entries): any torch loads such a file with ``weights_only=True``.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_galore.storage import INT8, Int8Tensor, holds

ABSMAX = "_absmax"  # appended to a weight's key


def quantize(model: nn.Module | None, chosen: Collection[Tensor]) -> None:
    """Keep weights of ``nn.Linear`` modules as int8 codes from now on. Each stays the same parameter object.

    Args:
        model: Holds them.
        chosen: Which parameters. Those of other modules stay as they are, with a warning: only ``nn.Linear`` decodes
            its weight anew in backward, another module would keep the decoded one until then.

    Raises:
        ValueError: If there is no model, or a parameter is in use by a graph.
    """
    if model is None:
        raise ValueError("weight_storage='int8' needs the model whose modules hold the weights; pass model=...")
    others = []
    for param in chosen:
        owners = [(name, module) for name, module, _ in _owners(model, param)]
        if isinstance(param, Int8Tensor):
            pass
        elif owners and all(isinstance(module, nn.Linear) for _, module in owners):
            _swap(param, Int8Tensor.quantized(param), owners[0][0])
        else:
            others.append(owners[0][0] if owners else "a weight outside the model")
            continue
        for _, module in owners:
            _install(module)
    if others:
        warnings.warn(
            f"weight_storage='int8' keeps weights of nn.Linear modules only: {', '.join(others[:4])}"
            f"{', ...' if len(others) > 4 else ''} stay as they are.",
            stacklevel=3,
        )


def dequantize(model: nn.Module, chosen: Collection[Tensor] | None = None) -> None:
    """Keep weights of a model in floating point again: the inverse of :func:`quantize`, in their own dtype.

    Args:
        model: Holds them.
        chosen: Which parameters; None for all that are codes.

    Raises:
        ValueError: If a parameter is in use by a graph.
    """
    wanted = None if chosen is None else set(chosen)
    for name, module in model.named_modules():
        for key, param in module._parameters.items():
            if isinstance(param, Int8Tensor) and (wanted is None or param in wanted):
                _swap(param, param.dequantize(), f"{name}.{key}".lstrip("."))


def coded_weights(model: nn.Module) -> dict[str, Int8Tensor]:
    """The weights of a model that are kept as int8 codes, by name."""
    return {name: param for name, param in model.named_parameters() if isinstance(param, Int8Tensor)}


def prepare_to_load(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Give int8 codes to just those weights of a model that have them in a state dict; then it can be loaded.

    Args:
        model: Whose ``load_state_dict`` comes next.
        state_dict: What it will load.
    """
    modules = dict(model.named_modules())
    chosen = []
    for key in _coded(state_dict):
        path, _, name = key.rpartition(".")
        param = modules[path]._parameters.get(name) if path in modules else None
        if param is not None:
            chosen.append(param)
    if chosen:
        quantize(model, list(dict.fromkeys(chosen)))


def plain_state_dict(state_dict: Mapping[str, Any], *, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A model's state dict with floating-point weights in place of int8 codes, for any loader.

    Args:
        state_dict: As a model with int8 weights gives it.
        dtype: Of the weights that were codes.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> quantize(model, [model.weight])
        >>> sorted(model.state_dict()), sorted(plain_state_dict(model.state_dict()))
        (['bias', 'weight', 'weight_absmax'], ['bias', 'weight'])
    """
    coded = _coded(state_dict)
    plain = {key: value for key, value in state_dict.items() if key.removesuffix(ABSMAX) not in coded or key in coded}
    for key in coded:
        codes, absmax = state_dict[key], state_dict[key + ABSMAX]
        plain[key] = INT8.decode(codes, absmax, codes.shape, dtype)
    return plain


def holds_codes(state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict has int8 weights."""
    return bool(_coded(state_dict))


def damaged_codes(state_dict: Mapping[str, Any]) -> list[str]:
    """Keys of int8 weights in a state dict whose scales are not of their size, or are no finite numbers from 0 up."""
    damaged = []
    for key, value in state_dict.items():
        absmax = state_dict.get(f"{key}{ABSMAX}")
        if not isinstance(value, Tensor) or value.dtype != torch.int8 or absmax is None:
            continue
        sound = isinstance(absmax, Tensor) and absmax.is_floating_point() and holds(value, absmax, value.shape)
        if not sound or not bool((torch.isfinite(absmax) & (absmax >= 0)).all()):
            damaged.append(key)
    return damaged


def _coded(state_dict: Mapping[str, Any]) -> set[str]:
    pairs = ((key.removesuffix(ABSMAX), value) for key, value in state_dict.items() if key.endswith(ABSMAX))
    return {
        key
        for key, absmax in pairs
        if isinstance(state_dict.get(key), Tensor)
        and state_dict[key].dtype == torch.int8
        and holds(state_dict[key], absmax, state_dict[key].shape)
    }


def _owners(model: nn.Module, param: Tensor) -> Iterator[tuple[str, nn.Module, str]]:
    for path, module in model.named_modules():
        for name, own in module._parameters.items():
            if own is param:
                yield f"{path}.{name}".lstrip("."), module, name


def _swap(param: Tensor, value: Tensor, name: str) -> None:
    """Put another tensor into a parameter object, so that whoever holds it (an optimizer, a list) holds the new one."""
    new = nn.Parameter(value, requires_grad=param.requires_grad)
    extra = {key: entry for key, entry in vars(param).items() if key not in ("codes", "absmax", "_is_param")}
    vars(new).update(extra)
    grad = param.grad
    try:
        torch.utils.swap_tensors(param, new)
    except RuntimeError as error:
        raise ValueError(
            f"{name} cannot change how it is kept, because something else refers to it ({error}). Wrap the optimizer "
            "before the first forward pass, and before anything takes a weak reference to the weights."
        ) from error
    # The swap leaves the gradient behind, and the hooks known by name only: set anew, they are registered anew.
    param.grad = grad
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        registered = getattr(param, hooks)
        if registered:
            setattr(param, hooks, None)
            setattr(param, hooks, registered)


def _install(module: nn.Module) -> None:
    """Let a module's state dict have plain tensors, and those of its copies too. Twice does no harm."""
    if _split not in module._state_dict_hooks.values():
        module._register_state_dict_hook(_split)
        module.register_load_state_dict_pre_hook(_join)


def _split(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in module._parameters:
        value = state_dict.get(prefix + name)
        if isinstance(value, Int8Tensor):
            state_dict[prefix + name] = value.codes
            state_dict[prefix + name + ABSMAX] = value.absmax


def _join(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name, param in module._parameters.items():
        key = prefix + name
        if isinstance(param, Tensor) and key in _coded(
            {k: state_dict[k] for k in (key, key + ABSMAX) if k in state_dict}
        ):
            value = Int8Tensor(state_dict[key], state_dict.pop(key + ABSMAX), param.dtype)
            state_dict[key] = value if isinstance(param, Int8Tensor) else value.dequantize()
