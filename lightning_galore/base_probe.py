# SPDX-License-Identifier: Apache-2.0
"""Letting a shadow of the wrapped optimizer step a made-up parameter, to see what it would do to a proxy."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_galore import base_rules, storage

SMALL = (8, 16)  # fewer entries than the 4,096 from which 8-bit optimizers keep codes
LARGE = (64, 128)  # more of them, and a multiple of any usual block
TRIES = 3  # steps in which a parameter must have moved: some optimizers warm up
MIN_LR = 1e-3  # schedulers begin at 0, and a tiny step could round to nothing in half precision
MAX_8BIT = 1.1  # bytes an entry: a code, and its share of a block's scale

# What keeps its moments in 8 bits, by the family of what does not.
_IN_8BIT = {
    "AdamW": "bitsandbytes.optim.AdamW8bit",
    "Adam": "bitsandbytes.optim.Adam8bit",
    "AdEMAMix": "bitsandbytes.optim.AdEMAMix8bit",
    "Lion": "bitsandbytes.optim.Lion8bit",
    "SGD": "bitsandbytes.optim.SGD8bit",
    "RMSprop": "bitsandbytes.optim.RMSprop8bit",
    "Adagrad": "bitsandbytes.optim.Adagrad8bit",
}


def probe_state(base: Optimizer, group: Mapping[str, Any], shape: tuple[int, int], like: Tensor) -> int:
    """Bytes of the state that ``base`` keeps for a parameter of ``shape``, found by stepping one and looking.

    Args:
        base: The wrapped optimizer.
        group: The param group whose settings hold.
        shape: Shape of the proxy.
        like: Gives the dtype and the device.
    """
    return storage.nbytes(stepped(base, group, torch.zeros(shape, dtype=like.dtype, device=like.device))[1])


def check_moves(base: Optimizer, params: Iterable[Tensor]) -> None:
    """Let ``base`` step a proxy of each kind among ``params``: it must move, or training would silently do nothing.

    The fault that this is for: arguments that shifted between versions of bitsandbytes left parameters of fewer than
    4,096 entries without any update. So a smaller proxy and a larger one are tried, of each dtype and device.

    Args:
        base: The wrapped optimizer; it notices nothing.
        params: The projected weights.

    Raises:
        ValueError: If a proxy with a gradient does not move or gets an entry that is not finite, or the step fails.
            For an optimizer of which nothing is known this is a warning, because it may have its reasons.
    """
    for group, like in _kinds(base, params):
        for shape in (SMALL, LARGE):
            trouble = _trouble(base, group, shape, like)
            if trouble is None:
                continue
            message = (
                f"base={type(base).__name__} ({type(base).__module__}) fails its self-check: of a parameter of shape "
                f"{shape} in {like.dtype} on {like.device}, {trouble}. {_remedy(group)}"
            )
            if base_rules.rule(base) is not None:
                raise ValueError(message)
            warnings.warn(message, stacklevel=3)
            return


def check_moment_bits(base: Optimizer, params: Iterable[Tensor]) -> None:
    """Refuse an optimizer whose moments take more than 8 bits an entry, where 8 bits were asked for.

    Args:
        base: The wrapped optimizer; it notices nothing.
        params: The projected weights.

    Raises:
        ValueError: With the entry of the state that is larger, and what to use instead.
    """
    for group, like in _kinds(base, params):
        # Large enough that the tables which a tensor class carries along (1 KiB) do not count.
        shape = (256, 512)
        _, state = stepped(base, group, torch.zeros(shape, dtype=like.dtype, device=like.device))
        for key, value in state.items():
            if not isinstance(value, Tensor) or tuple(value.shape[-2:]) != shape:
                continue
            width = storage.nbytes(value) / value.numel()
            if width > MAX_8BIT:
                raise ValueError(
                    f"moment_storage='8bit' with base={type(base).__name__}: its state {key!r} takes {width:.1f} bytes "
                    f"an entry, not 1. {_remedy_8bit(base)}"
                )


def stepped(
    base: Optimizer, group: Mapping[str, Any], value: Tensor, grad: Tensor | None = None, *, steps: int = 1
) -> tuple[Tensor, dict[str, Any]]:
    """What a shadow of ``base`` makes of a parameter, and the state that it keeps for it.

    The shadow shares the settings, but has its own groups, state, counters and hooks; random numbers that it draws are
    put back. So the user's object notices nothing.

    Args:
        base: The wrapped optimizer.
        group: The param group whose settings hold.
        value: Where the parameter starts.
        grad: Its gradient at each step, of the same shape; zero if not given.
        steps: How often it is stepped.

    Returns:
        The parameter after it, and its state.
    """
    proxy = nn.Parameter(value.clone())
    shadow = _shadow(base, {**group, "params": [proxy]})
    if "initial_accumulator_value" in group:  # Adagrad of older torch makes its state in its constructor only
        start = torch.full_like(proxy, group["initial_accumulator_value"])
        step = torch.zeros((), device=value.device if group.get("fused") else None)
        shadow.state[proxy] = {"step": step, "sum": start}
    # Neither through a scheduler's patch of the object, which counts steps, nor through torch's wrapper of each step,
    # which calls the hooks for all optimizers: those are there for real steps only.
    step_once = type(base).step
    step_once = getattr(step_once, "__wrapped__", step_once) if getattr(step_once, "hooked", False) else step_once
    accelerators = [] if value.device.type in ("cpu", "meta") else [value.device]
    kind = value.device.type if accelerators else "cuda"
    # One step is not worth compiling (torchao's step is compiled for each shape).
    with (
        torch.random.fork_rng(accelerators, device_type=kind),
        torch.compiler.set_stance("force_eager"),
        torch.no_grad(),
    ):
        for _ in range(steps):
            proxy.grad = torch.zeros_like(proxy) if grad is None else grad.clone()
            step_once(shadow, closure=None)
    return proxy.detach(), shadow.state[proxy]


def _shadow(base: Optimizer, group: dict[str, Any]) -> Any:
    """An optimizer of ``base``'s class and settings that shares nothing which a step changes."""
    shadow: Any = object.__new__(type(base))
    shadow.__dict__.update({key: _own(value) for key, value in base.__dict__.items()})
    for key in ("grad_scale", "found_inf"):  # what a GradScaler leaves for the next step
        shadow.__dict__.pop(key, None)
    shadow.state = defaultdict(dict)
    shadow.param_groups = [group]
    shadow._optimizer_step_pre_hooks, shadow._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    if hasattr(shadow, "is_paged"):  # bitsandbytes never frees what it pages; ordinary tensors of the same size will do
        shadow.is_paged = False
    if hasattr(shadow, "mng"):  # what bitsandbytes' manager keeps by position and by id is meant for other parameters
        shadow.mng = copy.copy(shadow.mng)
        vars(shadow.mng).update(index2config={}, pid2config={}, module_weight_config_triple=[])
    return shadow


def _own(value: Any) -> Any:
    """A copy of what a step may change in place: containers and counters."""
    if isinstance(value, Tensor):
        return value.clone() if value.numel() == 1 and not isinstance(value, nn.Parameter) else value
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value


def _kinds(base: Optimizer, params: Iterable[Tensor]) -> list[tuple[Mapping[str, Any], Tensor]]:
    """One parameter of each dtype and device, with its group."""
    wanted = set(params)
    kinds: dict[tuple[torch.dtype, torch.device], tuple[Mapping[str, Any], Tensor]] = {}
    for group in base.param_groups:
        for param in group["params"]:
            if param in wanted and not param.is_meta:
                kinds.setdefault((param.dtype, param.device), (group, param))
    return list(kinds.values())


def _trouble(base: Optimizer, group: Mapping[str, Any], shape: tuple[int, int], like: Tensor) -> str | None:
    """What is wrong with ``base``'s step of a proxy, in words, or None."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    grad = (noise.sign() * (noise.abs() + 0.5)).to(dtype=like.dtype, device=like.device)
    settings = _lively(base, group)
    moved = None
    for steps in range(1, TRIES + 1):
        try:
            moved, _ = stepped(base, settings, torch.zeros_like(grad), grad, steps=steps)
        except Exception as error:  # whatever it is, the real step would meet it too
            return f"its step raises {type(error).__name__}: {error}"
        if not bool(torch.isfinite(moved).all()):
            bad = int((~torch.isfinite(moved)).sum())
            return f"{bad} of {moved.numel()} entries are not finite after step {steps}"
        if bool((moved != 0).all()):
            return None
    assert moved is not None
    return f"{int((moved == 0).sum())} of {moved.numel()} entries do not move in {TRIES} steps with a gradient"


def _lively(base: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """The group's settings with a learning rate that moves something."""
    settings = dict(group)
    lr = settings.get("lr")
    if isinstance(lr, Tensor):
        settings["lr"] = lr.detach().clamp(min=MIN_LR)  # a new tensor: some optimizers take no number
    elif lr is not None:
        settings["lr"] = max(float(lr), MIN_LR)
    eps = settings.get("eps")
    if base_rules.reads_rms(base) and isinstance(eps, (tuple, list)):
        settings["eps"] = (eps[0], max(eps[1], 1.0))  # a zero proxy has no RMS: a real step lets it see its weight's
    return settings


def _remedy(group: Mapping[str, Any]) -> str:
    # torch 2.13's fused SGD on the CPU, for one, leaves half-precision parameters as they are.
    first = "Set fused=False" if group.get("fused") else "Give its settings by keyword"
    return (
        f"So it would not train the projected weights. {first}, move the model to the device that it is trained on "
        "before wrapping, try another version of the optimizer's package, or use torch.optim.AdamW."
    )


def _remedy_8bit(base: Optimizer) -> str:
    names = [name.removeprefix("_") for name in base_rules.families(base)]
    instead = next((_IN_8BIT[name] for name in names if name in _IN_8BIT), None)
    if instead is None:
        return (
            "No 8-bit form of it is known: wrap bitsandbytes.optim.AdamW8bit(...) or another 8-bit optimizer, or set "
            "moment_storage='base'."
        )
    name = instead.rpartition(".")[2].lower()
    return (
        f"Wrap {instead}(...) with the same arguments ({name!r} where an optimizer is given by name), or set "
        "moment_storage='base'."
    )
