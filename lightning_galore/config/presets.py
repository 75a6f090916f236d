# SPDX-License-Identifier: Apache-2.0
"""The words that settings are made of: the choices on each axis, and the presets, which are rows of such choices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

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
    "blend",
    "gaussian",
    "random_orthonormal",
    "columns",
    "coordinates",
    "block",
    "cross_head",
    "tucker",
    "tucker_warm",
]
#: Those that find a basis for each mode of a tensor.
BY_MODES = ("tucker", "tucker_warm")
ScheduleName = Literal["auto", "fixed", "adaptive", "cos", "energy"]
RankRuleName = Literal["auto", "fixed", "energy", "energy_shrink", "noise_edge"]
TransformName = Literal["auto", "none", "spam", "stable-spam", "natural"]
MomentsName = Literal["auto", "keep", "rotate", "rotate_first", "reset"]
LiftName = Literal[
    "auto",
    "project_back",
    "error_feedback",
    "sign_residual",
    "whiten",
    "channel_scale",
    "tensor_scale",
    "scaled_residual",
]
BasisStorage = Literal["auto", "param", "fp32", "bf16", "fp16", "int8", "int4", "seed"]
WeightStorage = Literal["auto", "param", "int8"]
MomentStorage = Literal["auto", "base", "8bit"]
AccumulatorStorage = Literal["param", "fp32", "bf16", "int8"]
BasisPlacement = Literal["replicate", "shard"]
Mode = Literal["step", "project", "layerwise"]
#: In a method's row: the user must say it, and why.
NEEDED = "needed"
WHY: dict[str, str] = {
    "random_after": "for how many steps the bases come from the gradient. The paper takes random ones for the last "
    "fifth of a run: of 10000 steps, random_after=8000",
}
#: What an axis is where neither the user nor a method says anything.
AUTO: dict[str, Any] = {
    "rank": 128,
    "scale": 0.25,
    "subspace": "randomized",
    "schedule": "fixed",
    "stagger": True,
    "moments": "rotate_first",
    "update_proj_gap": 200,
    "random_after": None,
    "tracking_rho": 0.7,
    "lift": "project_back",
    "basis_storage": "param",
    "weight_storage": "param",
    "moment_storage": "base",
    "stochastic_round": False,
    "rank_rule": "fixed",
    "transform": "none",
    "reset_gap": 0,
    "reset_warmup": 0,
}
#: Momentum reset as the papers have it: the gap and the warm-up that a transform comes with.
RESETS: dict[str, dict[str, int]] = {
    "spam": {"reset_gap": 500, "reset_warmup": 150},
    "stable-spam": {"reset_gap": 1000, "reset_warmup": 0},
}
# arXiv 2412.05270: random projections that nobody keeps, and the full gradient scaled by what a step in them does.
_APOLLO: dict[str, Any] = {
    "scale": 1.0,
    "subspace": "gaussian",
    "schedule": "fixed",
    "stagger": False,
    "moments": "keep",
    "lift": "channel_scale",
    "basis_storage": "seed",
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
    "apollo": _APOLLO,
    "apollo-mini": {**_APOLLO, "rank": 1, "scale": 128**0.5, "lift": "tensor_scale"},
    "apollo-svd": {**_APOLLO, "subspace": "svd", "basis_storage": "param"},
    "q-apollo": {**_APOLLO, "weight_storage": "int8", "stochastic_round": True},
    # arXiv 2410.01623
    "fira": {"subspace": "svd", "schedule": "fixed", "stagger": False, "moments": "keep", "lift": "scaled_residual"},
    # arXiv 2410.16103, algorithm 1.
    "ldadam": {
        "subspace": "blend",
        "schedule": "fixed",
        "stagger": False,
        "moments": "rotate",
        "update_proj_gap": 1,
        "tracking_rho": 0.908,
        "lift": "error_feedback",
        "scale": 1.0,
    },
    # arXiv 2411.07837, algorithm 1, with columns (or rows) drawn at random.
    "frugal": {
        "subspace": "coordinates",
        "schedule": "fixed",
        "stagger": False,
        "moments": "reset",
        "lift": "sign_residual",
        "scale": 1.0,
    },
    # arXiv 2410.11289
    "golore": {
        "subspace": "svd",
        "schedule": "fixed",
        "stagger": False,
        "moments": "rotate_first",
        "random_after": NEEDED,
    },
    # After arXiv 2412.13148, in the subspace and over SGD.
    "swan": {"subspace": "randomized", "schedule": "fixed", "stagger": False, "lift": "whiten", "scale": 1.0},
    # arXiv 2501.06842 and 2502.17055, over the defaults of this package.
    "spam": {"transform": "spam"},
    "stable-spam": {"transform": "stable-spam"},
    # arXiv 2410.16029
    "natural-galore": {
        "subspace": "svd",
        "schedule": "fixed",
        "stagger": False,
        "moments": "keep",
        "transform": "natural",
    },
    # Related to arXiv 2410.17881: ranks that only shrink, moments in the new coordinates; refreshed at fixed gaps.
    "adarankgrad": {
        "subspace": "randomized",
        "schedule": "fixed",
        "stagger": False,
        "moments": "rotate",
        "rank_rule": "energy_shrink",
    },
    # arXiv 2412.19820 without its sparsely coded residual.
    "galore-plus": {"subspace": "cross_head", "schedule": "fixed", "stagger": False, "moments": "keep"},
    # arXiv 2501.02379: weights of order > 2 in Tucker's coordinates.
    "tensor-galore": {"subspace": "tucker_warm", "schedule": "fixed", "stagger": False, "moments": "keep"},
}
# Of the rows, so that a new one needs no second line; a type checker takes any string.
if TYPE_CHECKING:
    Method: TypeAlias = str
else:
    Method = Literal[tuple(METHODS)]
#: The subspaces whose bases can be drawn again from a number.
DRAWN = ("gaussian", "random_orthonormal")
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

#: Modules whose weights have heads along their rows: queries, keys and values, as models name them.
HEADED = r"(?:.*\.)?(?:[qkv]_proj|[qkv]_lin|query|key|value|to_[qkv]|w[qkv])"
CLASS_PREFIX = "class:"  # how a module class is written as a string: "class:torch.nn.Linear"
#: Those of them that are written None while they are open.
NONE_IS_OPEN = (
    "update_proj_gap",
    "stagger",
    "stochastic_round",
    "random_after",
    "tracking_rho",
    "scale",
    "reset_gap",
    "reset_warmup",
)
#: The words of each axis.
CHOICES: dict[str, Any] = {
    "proj_type": ProjType,
    "mode": Mode,
    "subspace": SubspaceName,
    "schedule": ScheduleName,
    "moments": MomentsName,
    "rank_rule": RankRuleName,
    "lift": LiftName,
    "transform": TransformName,
    "basis_storage": BasisStorage,
    "basis_placement": BasisPlacement,
    "weight_storage": WeightStorage,
    "moment_storage": MomentStorage,
    "accumulator_storage": AccumulatorStorage,
}
