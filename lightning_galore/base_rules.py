# SPDX-License-Identifier: Apache-2.0
"""What is known of the optimizers that can be wrapped: how they decay, what they read, which are refused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

Decay = Literal["decoupled", "coupled", "none"]
StateKind = Literal["first", "second", "centered", "magnitude", "maximum", "step_size", "rows", "columns", "other"]


@dataclass(frozen=True, kw_only=True)
class BaseRule:
    """How one family of optimizers behaves.

    Args:
        decay: ``decoupled`` shrinks the weight, ``coupled`` adds ``weight_decay * W`` to the gradient (L2 penalty).
        reads_rms: The step is relative to the weight's root mean square, which a zero proxy does not have.
    """

    decay: Decay
    reads_rms: bool = False


@dataclass(frozen=True, kw_only=True)
class StateRule:
    """What one entry of an optimizer's state is, hence what becomes of it when the coordinates change.

    Args:
        kind: ``first`` is linear in the gradient and follows its coordinates; ``second`` averages its square;
            ``centered`` is a second moment from which the optimizer subtracts the square of its mean;
            ``magnitude`` stands where the root of a second moment would; ``maximum`` is the largest ``second`` so far;
            ``step_size`` is a learning rate of its own for each coordinate; ``rows`` and ``columns`` are the two
            averages of a factored second moment; ``other`` knows of no coordinates.
        beside: Key that it goes with: of the mean (second, centered, magnitude), of what it is the maximum of, of the
            columns.
        decay: Setting by which the average forgets, if it is one of gradients or of their squares.
        sums: It adds gradients up, each with its full weight, instead of averaging them.
    """

    kind: StateKind
    beside: str = ""
    decay: str = ""
    sums: bool = False


COUPLED, DECOUPLED = BaseRule(decay="coupled"), BaseRule(decay="decoupled")
# By class name; a subclass follows its parent. torch's Adam family also says in the group which of the two it does.
RULES: dict[str, BaseRule] = {
    "Adadelta": COUPLED,
    "Adafactor": BaseRule(decay="decoupled", reads_rms=True),
    "Adagrad": COUPLED,
    "Adam": COUPLED,
    "AdamW": DECOUPLED,
    "Adamax": COUPLED,
    "AdEMAMix": DECOUPLED,
    "Lion": DECOUPLED,
    "Muon": DECOUPLED,
    "NAdam": COUPLED,
    "RAdam": COUPLED,
    "RMSprop": COUPLED,
    "Rprop": BaseRule(decay="none"),
    "SGD": COUPLED,
}
# bitsandbytes' kernels decay Adam's weights as AdamW does.
BITSANDBYTES_DECOUPLED = {"Adam", "AdamW", "Lion", "AdEMAMix"}

_FIRST, _OTHER = StateRule(kind="first"), StateRule(kind="other")
# By key, as torch names them and others after it.
STATE_RULES: dict[str, StateRule] = {
    "exp_avg": StateRule(kind="first", decay="beta1"),
    "exp_avg_slow": _FIRST,
    "exp_avg_sq": StateRule(kind="second", beside="exp_avg", decay="beta2"),
    "max_exp_avg_sq": StateRule(kind="maximum", beside="exp_avg_sq"),
    "exp_inf": StateRule(kind="magnitude", beside="exp_avg"),
    "momentum_buffer": _FIRST,
    "grad_avg": StateRule(kind="first", decay="alpha"),
    "square_avg": StateRule(kind="centered", beside="grad_avg", decay="alpha"),
    "acc_delta": StateRule(kind="second"),
    "sum": StateRule(kind="second"),
    "prev": _FIRST,
    "step_size": StateRule(kind="step_size"),
    "row_var": StateRule(kind="rows", beside="col_var"),
    "col_var": StateRule(kind="columns"),
    "exp_avg_sq_row": StateRule(kind="rows", beside="exp_avg_sq_col"),
    "exp_avg_sq_col": StateRule(kind="columns"),
    **dict.fromkeys(["step", "mu_product", "qmap1", "qmap2", "absmax1", "absmax2", "unorm_vec", "RMS"], _OTHER),
}
_NUMBERED = {  # bitsandbytes numbers its buffers; AdEMAMix's first holds the fast and the slow average
    "state1": StateRule(kind="first", decay="beta1"),
    "state2": StateRule(kind="second", beside="state1", decay="beta2"),
}
# Where a family means something of its own by a key.
FAMILY_STATE_RULES: dict[str, dict[str, StateRule]] = {
    "Adafactor": {"exp_avg": _FIRST},  # of updates
    "Adagrad": {"state1": StateRule(kind="second")},
    "Adam": _NUMBERED,
    "AdamW": _NUMBERED,
    "AdEMAMix": _NUMBERED,
    "Lion": dict.fromkeys(["exp_avg", "state1"], StateRule(kind="first", decay="beta2")),
    "Muon": {"momentum_buffer": StateRule(kind="first", decay="momentum")},
    "RMSprop": {"state1": StateRule(kind="second")},  # its momentum_buffer averages updates
    "SGD": {
        "momentum_buffer": StateRule(kind="first", decay="momentum", sums=True),
        "state1": StateRule(kind="first", decay="beta1", sums=True),
    },
}

_READS_VALUE = "it reads the weight's value, which a low-rank update does not have"
_READS_NORM = "it scales its step by the weight's norm, which a low-rank update does not have"
REFUSED: dict[str, str] = {
    "LBFGS": "it evaluates the loss several times in one step",
    "SparseAdam": "it takes row-sparse gradients, which have no matrix to project",
    "ASGD": _READS_VALUE,
    "AdamWScheduleFree": _READS_VALUE,
    "SGDScheduleFree": _READS_VALUE,
    "RAdamScheduleFree": _READS_VALUE,
    "Prodigy": _READS_VALUE,
    "DAdaptAdam": _READS_VALUE,
    "DAdaptSGD": _READS_VALUE,
    "LAMB": _READS_NORM,
    "LARS": _READS_NORM,
    "Lamb": _READS_NORM,
    "Lars": _READS_NORM,
    "PytorchLARS": _READS_NORM,
    "SAM": "it evaluates the loss twice in one step",
}
# Its norms of rows and columns raise on DTensors (torch 2.13).
_WHOLE_ONLY = {"Adafactor"}
LOW_RANK_PACKAGES = ("galore_torch", "q_galore_torch", "apollo_torch", "ldadamw_torch")


def families(base: Optimizer) -> list[str]:
    """Class names along the MRO, without the words that say only how the state is kept."""
    names = [cls.__name__ for cls in type(base).__mro__]
    for word in ("Paged", "8bit", "32bit", "4bit", "Fp8"):
        names = [name.replace(word, "") for name in names]
    return names


def check_sharded(base: Optimizer) -> None:
    """Refuse an optimizer whose kernels take whole tensors only, where each process holds a part.

    Raises:
        ValueError: With what to use instead.
    """
    for cls in type(base).__mro__:
        package = cls.__module__.split(".")[0]
        if package in ("bitsandbytes", "torchao"):
            raise ValueError(
                f"base={type(base).__name__} of {package} cannot step weights that are sharded over processes (FSDP2): "
                "its kernels take whole tensors. Use torch.optim.AdamW or another one of torch, or GaLoreDDPStrategy."
            )
    if _WHOLE_ONLY & set(families(base)):
        raise ValueError(
            f"base={type(base).__name__} cannot step weights that are sharded over processes (FSDP2): torch cannot do "
            "its arithmetic on sharded tensors. Use torch.optim.AdamW or SGD, or GaLoreDDPStrategy."
        )


def check_base(base: Optimizer) -> None:
    """Refuse, by name, what cannot be wrapped; warn of what is not known.

    Raises:
        ValueError: If it is one that low-rank updates would silently break.
    """
    name = type(base).__name__
    for known in families(base):
        if known in REFUSED:
            raise ValueError(
                f"base={name} cannot be wrapped: {REFUSED[known]}. Use torch.optim.AdamW, SGD or another one."
            )
    if type(base).__module__.split(".")[0] in LOW_RANK_PACKAGES and any("rank" in group for group in base.param_groups):
        raise ValueError(
            f"base={name} of {type(base).__module__} projects by itself where a param group has a rank. "
            "Give the same groups to torch.optim.AdamW instead; their keys keep their meaning here."
        )
    for group in base.param_groups:
        for key in ("capturable", "differentiable"):
            if group.get(key):
                raise ValueError(
                    f"base={name} with {key}=True cannot be wrapped: proxies are made anew. Set {key}=False."
                )
        check_decay(base, group)
    max_unorm = getattr(getattr(base, "args", None), "max_unorm", 0.0)
    if max_unorm and max_unorm > 0:
        raise ValueError(f"base={name} with max_unorm={max_unorm} cannot be wrapped: {_READS_NORM}. Set max_unorm=0.")
    if rule(base) is None:
        warnings.warn(
            f"base={name} is not among the optimizers known to work with low-rank gradients "
            f"({', '.join(RULES)}). Its step must depend on gradients only, never on the weight's value.",
            stacklevel=3,
        )


def rule(base: Optimizer) -> BaseRule | None:
    """What is known of ``base``'s family, or None."""
    return next((RULES[name] for name in families(base) if name in RULES), None)


def state_rule(base: Optimizer, key: str) -> StateRule | None:
    """What is known of an entry of ``base``'s state, or None."""
    known = (FAMILY_STATE_RULES[name] for name in families(base) if name in FAMILY_STATE_RULES)
    return next((family[key] for family in known if key in family), STATE_RULES.get(key))


def reads_rms(base: Optimizer) -> bool:
    """Whether the step is relative to the weight's root mean square (Adafactor, arXiv 1804.04235, algorithm 4)."""
    known = rule(base)
    return known is not None and known.reads_rms


def decay_kind(base: Optimizer, group: Mapping[str, Any]) -> Decay | None:
    """How ``base`` applies the group's ``weight_decay``, or None when that is not known."""
    if "decoupled_weight_decay" in group:
        return "decoupled" if group["decoupled_weight_decay"] else "coupled"
    from_bitsandbytes = any(cls.__module__.startswith("bitsandbytes") for cls in type(base).__mro__)
    if from_bitsandbytes and BITSANDBYTES_DECOUPLED & set(families(base)):
        return "decoupled"
    known = rule(base)
    return known.decay if known else None


def check_decay(base: Optimizer, group: Mapping[str, Any]) -> None:
    """Refuse a weight decay of which nobody can say whether it acts on the weight or on the gradient.

    Raises:
        ValueError: If the kind is unknown, or the learning rate that it needs is not in the group.
    """
    decay = group.get("weight_decay")
    if not decay:
        return
    kind = decay_kind(base, group)
    if kind is None:
        raise ValueError(
            f"weight_decay={decay!r}: whether {type(base).__name__} decouples it from the gradient is not known. "
            "Add decoupled_weight_decay=True or False to its param groups, or set weight_decay=0."
        )
    if kind == "decoupled" and group.get("lr") is None:
        raise ValueError(
            f"lr=None with weight_decay={decay!r}: the decay of the full weight needs a learning rate. Set lr."
        )


def lift_factor(group: Mapping[str, Any], shape: tuple[int, int], low_shape: tuple[int, int]) -> float:
    """Factor that corrects a learning rate adjusted to the shape of the proxy, not to the weight's (torch's Muon).

    Args:
        group: The param group; only Muon's has ``adjust_lr_fn``.
        shape: ``(m, n)`` of the weight.
        low_shape: Shape of its proxy.
    """
    if "adjust_lr_fn" not in group:
        return 1.0
    # The two rules of torch.optim.Muon: "original" and "match_rms_adamw".
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return math.sqrt(max(shape) / max(low_shape))
    return math.sqrt(max(1.0, shape[0] / shape[1]) / max(1.0, low_shape[0] / low_shape[1]))


def shrink_eager_state(base: Optimizer, param: Tensor, low_shape: tuple[int, int]) -> None:
    """Give state that an optimizer made in its constructor (Adagrad) the low-rank shape.

    Raises:
        ValueError: If the state is not constant: the optimizer has already been stepped at full rank.
    """
    state = base.state.get(param) or {}
    if float(state.get("step") or 0) > 0:
        raise ValueError(
            f"base={type(base).__name__} has already been stepped: it counts {int(state['step'])} full-rank steps. "
            "Wrap a fresh optimizer, or load a checkpoint after wrapping."
        )
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == param.shape and not bool((value == value.flatten()[0]).all()):
            raise ValueError(
                f"base={type(base).__name__} has already been stepped: its state {key!r} of shape "
                f"{tuple(value.shape)} is full-rank. Wrap a fresh optimizer, or load a checkpoint after wrapping."
            )
    if state:
        base.state[param] = resized_constants(state, tuple(param.shape), low_shape)


def resized_constants(state: Mapping[str, Any], shape: tuple[int, ...], new_shape: tuple[int, int]) -> dict[str, Any]:
    """The state with each tensor of ``shape``, all whose entries are alike, at ``new_shape``."""
    return {
        key: value.flatten()[0].expand(new_shape).clone()
        if isinstance(value, Tensor) and value.shape == shape
        else value
        for key, value in state.items()
    }
