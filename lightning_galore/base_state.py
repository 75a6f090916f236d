# SPDX-License-Identifier: Apache-2.0
"""Reading and writing the tensors of a wrapped optimizer's state, whatever they are kept as.

Plain tensors of any dtype, the 8-bit codes of bitsandbytes (also paged), and torchao's quantised tensor classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_galore import dtensors

CODE_BLOCK = 256  # entries that share one scale in bitsandbytes' 8-bit optimizers


def read(state: Mapping[str, Any], key: str) -> Tensor:
    """An entry in fp32 at least, on the device where it is computed with; the entry itself where that changes nothing.

    Args:
        state: The wrapped optimizer's state of one parameter.
        key: Names a tensor in it.
    """
    value: Tensor = state[key]
    if _is_codes(value, state, key):
        return _decode(value, absmax=state[f"absmax{key[-1]}"], qmap=state[f"qmap{key[-1]}"])
    if _is_quantized(value):
        value = value.dequantize()
    return value.to(dtype=torch.promote_types(value.dtype, torch.float32), device=_device(value))


def write(base: Optimizer, state: Mapping[str, Any], key: str, value: Tensor) -> dict[str, Tensor]:
    """The entries that hold ``value`` as ``state[key]`` was held: of its dtype or its kind of code, rounded once.

    New tensors, never views. Only a paged buffer of the same size is written in place: bitsandbytes never frees what
    it has paged, so that a new one at each refresh would pile up.

    Args:
        base: The wrapped optimizer.
        state: Its state of one parameter, of which ``key`` is replaced.
        key: Names a tensor in it.
        value: New value; its shape may be another one.
    """
    old: Tensor = state[key]
    if _is_codes(old, state, key):
        codes, absmax = _encode(value, qmap=state[f"qmap{key[-1]}"], batched=state[f"absmax{key[-1]}"].ndim > 1)
        return {key: _settle(base, old, codes), f"absmax{key[-1]}": absmax}
    if _is_quantized(old):
        return {key: _like_quantized(old, value)}
    limit = torch.finfo(old.dtype).max  # half precision would round to infinity what fp32 still holds
    return {key: _settle(base, old, value.clamp(-limit, limit))}


def weight_sum(state: Mapping[str, Any], group: Mapping[str, Any], *, decay: str, sums: bool = False) -> float:
    """Sum of the weights with which an average holds its terms, what a correction of its bias divides by.

    ``1 - rate^step``; where no step is counted, as if it had run for long, which is too large at the start.

    Args:
        state: The wrapped optimizer's state of one parameter.
        group: Its param group.
        decay: ``beta1``, ``beta2`` or the name of the setting that is the rate.
        sums: Each term comes with its full weight, not with ``1 - rate`` of it.
    """
    rate = rate_of(group, decay)
    step = float(state.get("step", group.get("step", math.inf)))
    total = 1.0 - rate**step if step > 0 else 1.0
    if sums and rate < 1.0:
        # bitsandbytes, which counts steps, takes no notice of its dampening.
        total *= (1.0 if "step" in state else 1.0 - float(group.get("dampening") or 0.0)) / (1.0 - rate)
    return total or 1.0


def rate_of(group: Mapping[str, Any], decay: str) -> float:
    """Share of an average that is left after one more term.

    Args:
        group: A param group.
        decay: As in :func:`weight_sum`.
    """
    if decay in ("beta1", "beta2"):
        return float((group.get("betas") or (0.0, 0.0))[int(decay[-1]) - 1])
    return float(group.get(decay) or 0.0)


def is_paged(value: object) -> bool:
    """Whether bitsandbytes pages the tensor between the memories of device and host."""
    return getattr(value, "is_paged", False) is True


def _device(value: Tensor) -> torch.device:
    """Where to compute: torch takes a paged buffer for one of the host."""
    index = getattr(value, "page_deviceid", None)
    return torch.device("cuda", index) if index is not None else value.device


def _settle(base: Optimizer, old: Tensor, value: Tensor) -> Tensor:
    """``value`` in memory of the kind, dtype and device of ``old``."""
    if dtensors.is_sharded(old):
        assert dtensors.is_sharded(value)
        cast: Any = value.to(old.dtype)
        return cast.redistribute(placements=old.placements)
    if not is_paged(old):
        return torch.empty(value.shape, dtype=old.dtype, device=old.device).copy_(value)
    if old.shape != value.shape:
        pager: Any = base
        like = torch.empty(value.shape[-2:], device=_device(old))
        make = pager._get_state_double_buffer if value.ndim == 3 else pager.get_state_buffer  # AdEMAMix's two averages
        old = make(like, dtype=old.dtype)
    return old.copy_(value)


def _is_codes(value: Tensor, state: Mapping[str, Any], key: str) -> bool:
    return value.dtype == torch.uint8 and f"absmax{key[-1]}" in state


def _decode(codes: Tensor, *, absmax: Tensor, qmap: Tensor) -> Tensor:
    from bitsandbytes import functional

    codes = codes.to(qmap.device)
    if absmax.ndim > 1:  # AdEMAMix: each of its two averages has scales of its own
        return torch.stack([_decode(one, absmax=scales, qmap=qmap) for one, scales in zip(codes, absmax, strict=True)])
    return functional.dequantize_blockwise(codes, absmax=absmax, code=qmap, blocksize=CODE_BLOCK)


def _encode(value: Tensor, *, qmap: Tensor, batched: bool) -> tuple[Tensor, Tensor]:
    from bitsandbytes import functional

    if batched:
        pairs = [_encode(one, qmap=qmap, batched=False) for one in value]
        return torch.stack([codes for codes, _ in pairs]), torch.stack([absmax for _, absmax in pairs])
    codes, quantized = functional.quantize_blockwise(value.float().contiguous(), code=qmap, blocksize=CODE_BLOCK)
    return codes, quantized.absmax


def _is_quantized(value: Tensor) -> bool:
    """A tensor class that decodes itself, as torchao's."""
    return type(value).dequantize is not Tensor.dequantize


def _like_quantized(old: Any, value: Tensor) -> Tensor:
    """``value`` in the tensor class of ``old``, or plain where its blocks do not divide the new size (as torchao)."""
    if value.numel() % old.block_size:
        return value.to(old.dtype, copy=True)
    signed = {"signed": old.signed} if hasattr(old, "signed") else {}
    new = type(old).zeros(value.shape, block_size=old.block_size, device=old.device, dtype=old.dtype, **signed)
    return new.copy_(value.contiguous())
