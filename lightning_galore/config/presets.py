# SPDX-License-Identifier: Apache-2.0
"""The words that settings are made of: the choices on each axis, and the presets, which are rows of such choices."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

#: A width, a fraction, or (of a tensor) a width for each mode.
Rank: TypeAlias = int | float | tuple[int, ...]
ProjType = Literal["std", "reverse_std", "left", "right", "full"]
SubspaceName = Literal[
    "auto",
    "randomized",
    "svd",
    "gram",
    "power",
    "track",
    "gaussian",
    "random_orthonormal",
    "columns",
    "tucker",
    "tucker_warm",
]
#: Those that find a basis for each mode of a tensor.
BY_MODES = ("tucker", "tucker_warm")
ScheduleName = Literal["auto", "fixed", "adaptive", "cos", "energy"]
RankRuleName = Literal["fixed", "energy", "noise_edge"]
MomentsName = Literal["auto", "keep", "rotate", "rotate_first", "reset"]
LiftName = Literal["project_back"]
BasisStorage = Literal["auto", "param", "fp32", "bf16", "fp16", "int8", "int4"]
WeightStorage = Literal["auto", "param", "int8"]
MomentStorage = Literal["auto", "base", "8bit"]
AccumulatorStorage = Literal["param", "fp32", "bf16", "int8"]
BasisPlacement = Literal["replicate", "shard"]
Mode = Literal["step", "project", "layerwise"]
Method = Literal["galore", "galore2", "galore-track", "galore-8bit", "q-galore", "tensor-galore"]

#: What an axis is where neither the user nor a method says anything.
AUTO: dict[str, Any] = {
    "subspace": "randomized",
    "schedule": "fixed",
    "stagger": True,
    "moments": "rotate_first",
    "update_proj_gap": 200,
    "basis_storage": "param",
    "weight_storage": "param",
    "moment_storage": "base",
    "stochastic_round": False,
}
#: A named method is nothing but a row of choices; it fills the axes that the user left open.
METHODS: dict[str, dict[str, Any]] = {
    # arXiv 2403.03507
    "galore": {"subspace": "svd", "schedule": "fixed", "stagger": False, "moments": "keep"},
    # arXiv 2504.20437
    "galore2": {"subspace": "randomized", "schedule": "fixed", "stagger": False, "moments": "keep"},
    # The basis follows the gradient instead of being replaced (related to LDAdam, arXiv 2410.16103).
    "galore-track": {
        "subspace": "track",
        "schedule": "fixed",
        "stagger": False,
        "moments": "rotate_first",
        "update_proj_gap": 1,
    },
    # arXiv 2403.03507, section 4.3: the published method over an optimizer with 8-bit moments.
    "galore-8bit": {
        "subspace": "svd",
        "schedule": "fixed",
        "stagger": False,
        "moments": "keep",
        "moment_storage": "8bit",
    },
    # arXiv 2407.08296, with the gap judged by whole bases instead of one vector.
    "q-galore": {
        "subspace": "randomized",
        "schedule": "adaptive",
        "basis_storage": "int4",
        "weight_storage": "int8",
        "moment_storage": "8bit",
        "stochastic_round": True,
    },
    # arXiv 2501.02379: weights of order > 2 in Tucker's coordinates.
    "tensor-galore": {"subspace": "tucker_warm", "schedule": "fixed", "stagger": False, "moments": "keep"},
}
#: How an axis is written that is left open.
OPEN = ("auto", None)

#: Keys of a param group that override the configuration for the weights of that group (galore-torch's own words).
GROUP_KEYS = ("rank", "update_proj_gap", "scale", "proj_type")

#: The settings that say when a subspace is refreshed; ``SubspaceScheduler`` may own them.
SCHEDULE_SETTINGS = (
    "schedule",
    "update_proj_gap",
    "stagger",
    "refresh_share",
    "refresh_warmup",
    "min_gap",
    "max_gap",
    "grow_above",
    "shrink_below",
    "refresh_below",
)

CLASS_PREFIX = "class:"  # how a module class is written as a string: "class:torch.nn.Linear"
