# SPDX-License-Identifier: Apache-2.0
"""Every setting of low-rank training: names, defaults, ranges and their error messages. Holds primitives only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

ProjType = Literal["std", "reverse_std", "left", "right", "full"]
SubspaceName = Literal["auto", "randomized", "svd", "gaussian", "random_orthonormal"]
ScheduleName = Literal["fixed"]
LiftName = Literal["project_back"]
BasisStorage = Literal["param", "fp32", "bf16", "fp16"]
Mode = Literal["step", "project", "layerwise"]
Method = Literal["galore", "galore2"]

# A named method is nothing but a row of choices; it fills the axes that the user left at "auto".
METHODS: dict[str, dict[str, str]] = {
    "galore": {"subspace": "svd"},  # arXiv 2403.03507
    "galore2": {"subspace": "randomized"},  # arXiv 2504.20437
}
AUTO: dict[str, str] = {"subspace": "randomized"}

# Keys of a param group that override the configuration for the weights of that group (galore-torch's own words).
GROUP_KEYS = ("rank", "update_proj_gap", "scale", "proj_type")

CLASS_PREFIX = "class:"  # how a module class is written as a string: "class:torch.nn.Linear"


@dataclass(frozen=True, kw_only=True)
class GaLoreConfig:
    """How gradients are projected, which weights are, and how often the subspace is refreshed.

    Args:
        rank: Width ``r`` of the gradient subspace. A weight with ``min(m, n) <= rank`` would save nothing and stays
            full-rank.
        update_proj_gap: Optimizer steps between two refreshes of a weight's subspace (``T`` in the paper).
        scale: Factor on the projected-back update (``alpha`` in the paper).
        proj_type: Which side is projected. ``std``: the shorter dimension; ``reverse_std``: the longer one; ``left``:
            rows; ``right``: columns; ``full``: both (the low-rank gradient is ``r x r``).
        mode: When gradients are projected and weights move. ``step``: both in ``optimizer.step``. ``project``:
            gradients in backward, where each full one is freed at once. ``layerwise``: weights in backward too, and no
            gradient outlives it.
        target_modules: Which modules' weights are projected: ``"all-linear"`` (every ``nn.Linear`` but the output head
            and what is tied to an embedding), a regular expression that must match the whole module name, or a list of
            substrings, expressions and module classes (``torch.nn.Linear``, or ``"class:torch.nn.Linear"`` in YAML).
        ignore_modules: Modules to leave out, written like a list for ``target_modules``.
        method: A preset by name: ``galore`` (exact SVD) or ``galore2`` (randomized). Settings you name win over it.
        subspace: How a basis is found: ``randomized`` (range finder, the default), ``svd`` (exact), ``gaussian``
            (random, not orthonormal), ``random_orthonormal``. ``auto`` is what ``method`` says, else ``randomized``.
        schedule: When a basis is refreshed. ``fixed``: at steps 0, gap, 2 gap, ...
        lift: How the low-rank update becomes a weight update. ``project_back``: basis times update times ``scale``.
        basis_storage: Data type in which a basis is kept: that of the weight (``param``), or a type of its own.
        clip_weight_norm: Clip the gradient of each parameter by itself to this norm, in every mode. Clipping by the
            global norm is the Trainer's ``gradient_clip_val``, which ``mode="layerwise"`` cannot honour.
        fix_signs: Fix the arbitrary signs of singular vectors, so that runs repeat across machines. ``False`` keeps
            LAPACK's signs, for parity with galore-torch.
        dense_lr_factor: Factor on the learning rate of the weights that are *not* projected. They get no ``scale``, so
            at GaLore's usual learning rates they move ``1 / scale`` times as fast as the projected ones.
        seed: Seed of the random subspaces. Each weight and refresh draws its own numbers from it.

    Raises:
        ValueError: If a value is out of range; the message names the argument, the value and the remedy.
        TypeError: If a value has the wrong type.

    Example:
        >>> GaLoreConfig(rank=8, scale=2.0).subspace
        'randomized'
        >>> GaLoreConfig(rank=8, method="galore").subspace
        'svd'
    """

    rank: int = 128
    update_proj_gap: int = 200
    scale: float = 0.25
    proj_type: ProjType = "std"
    mode: Mode = "step"
    target_modules: str | type | Sequence[str | type] = "all-linear"
    ignore_modules: str | type | Sequence[str | type] = ()
    method: Method | None = None
    subspace: SubspaceName = "auto"
    schedule: ScheduleName = "fixed"
    lift: LiftName = "project_back"
    basis_storage: BasisStorage = "param"
    clip_weight_norm: float | None = None
    fix_signs: bool = True
    dense_lr_factor: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_int("rank", self.rank, minimum=1, remedy="the paper uses a quarter of the hidden size, e.g. rank=128")
        _check_int(
            "update_proj_gap", self.update_proj_gap, minimum=1, remedy="the paper uses 200, or 500 for fine-tuning"
        )
        _check_int("seed", self.seed, minimum=0, remedy="use any integer from 0 on")
        _check_positive("scale", self.scale, remedy="the paper uses 0.25 for pre-training, 2 or 4 for GLUE")
        _check_positive("dense_lr_factor", self.dense_lr_factor, remedy="1.0 leaves the learning rate as it is")
        if self.clip_weight_norm is not None:
            _check_positive("clip_weight_norm", self.clip_weight_norm, remedy="None clips nothing")
        _check_choice("proj_type", self.proj_type, get_args(ProjType))
        _check_choice("mode", self.mode, get_args(Mode))
        _check_choice("method", self.method, (None, *METHODS))
        _check_choice("subspace", self.subspace, get_args(SubspaceName))
        _check_choice("schedule", self.schedule, get_args(ScheduleName))
        _check_choice("lift", self.lift, get_args(LiftName))
        _check_choice("basis_storage", self.basis_storage, get_args(BasisStorage))
        if not isinstance(self.fix_signs, bool):
            raise TypeError(f"fix_signs={self.fix_signs!r} must be True or False.")
        axes = {**AUTO, **(METHODS[self.method] if self.method else {})}
        for axis, choice in axes.items():
            if getattr(self, axis) == "auto":
                object.__setattr__(self, axis, choice)
        target = self.target_modules
        if not isinstance(target, str):
            object.__setattr__(self, "target_modules", _as_patterns("target_modules", target))
        if not self.target_modules:
            raise ValueError(
                f'target_modules={target!r} selects nothing; use "all-linear", a regular expression or a list.'
            )
        object.__setattr__(self, "ignore_modules", _as_patterns("ignore_modules", self.ignore_modules))

    @classmethod
    def from_galore_torch(cls, group: Mapping[str, Any], **overrides: Any) -> GaLoreConfig:
        """Map a param group of ``galore_torch`` (keys ``rank``, ``update_proj_gap``, ``scale``, ``proj_type``).

        Missing keys get galore-torch's own defaults (gap 200, scale 1.0, ``std``), and the subspace is its exact SVD
        with unfixed signs. Other keys of the group (``params``, ``lr``, ...) are the optimizer's and are left alone.

        Args:
            group: The param group as it was given to ``galore_torch.GaLoreAdamW``.
            **overrides: Any argument of this class; wins over the group.

        Raises:
            ValueError: If the group has no ``rank`` (galore-torch would not project it), or asks for ``dim > 2``.

        Example:
            >>> GaLoreConfig.from_galore_torch({"params": [], "rank": 4, "scale": 4.0}).update_proj_gap
            200
        """
        if group.get("rank") is None and "rank" not in overrides:
            raise ValueError(f"group={sorted(group)} has no 'rank', so galore-torch trains it full-rank; add rank=...")
        if group.get("dim", 2) != 2:
            raise ValueError(
                f"group['dim']={group['dim']!r}: only matrices (dim=2) can be mapped; leave this group full-rank."
            )
        legacy = {"update_proj_gap": 200, "scale": 1.0, "proj_type": "std", "subspace": "svd", "fix_signs": False}
        named = {key: group[key] for key in GROUP_KEYS if group.get(key) is not None}
        return cls(**{**legacy, **named, **overrides})

    def for_group(self, group: Mapping[str, Any]) -> GaLoreConfig:
        """This configuration with the keys of one param group applied (those in ``GROUP_KEYS``).

        Args:
            group: A param group of the wrapped optimizer.

        Raises:
            ValueError: If a key's value is out of range.
        """
        named = {key: group[key] for key in GROUP_KEYS if group.get(key) is not None}
        return dataclasses.replace(self, **named) if named else self

    def with_settings(self, **settings: Any) -> GaLoreConfig:
        """This configuration with some arguments changed; a ``method`` among them fills its axes anew.

        Args:
            **settings: Any argument of this class.

        Example:
            >>> GaLoreConfig(rank=8).with_settings(method="galore").subspace
            'svd'
        """
        axes = dict.fromkeys(AUTO, "auto") if "method" in settings else {}
        return dataclasses.replace(self, **{**axes, **settings})


def _check_int(name: str, value: object, *, minimum: int, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an integer; {remedy}.")
    if value < minimum:
        raise ValueError(f"{name}={value!r} must be at least {minimum}; {remedy}.")


def _check_positive(name: str, value: object, *, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} must be a number; {remedy}.")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r} must be positive and finite; {remedy}.")


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(repr(c) for c in choices)}.")


def _as_patterns(name: str, value: str | type | Sequence[str | type]) -> tuple[str, ...]:
    """Write module classes as strings, so that a configuration is made of primitives and can be saved."""
    if not isinstance(value, (str, type, Sequence)):
        raise TypeError(f"{name}={value!r} must hold module names, expressions or classes, not be {value!r}.")
    items = [value] if isinstance(value, (str, type)) else list(value)
    patterns = []
    for item in items:
        if isinstance(item, type):
            item = f"{CLASS_PREFIX}{item.__module__}:{item.__qualname__}"
        if not isinstance(item, str) or not item:
            raise TypeError(f"{name}={value!r} must hold module names, expressions or classes, not {item!r}.")
        patterns.append(item)
    return tuple(patterns)
