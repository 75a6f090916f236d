# SPDX-License-Identifier: Apache-2.0
"""Which values the settings may have, alone and together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_galore.config.checks import check_int, check_positive, check_share
from lightning_galore.config.presets import BY_MODES, DRAWN

if TYPE_CHECKING:
    from lightning_galore.config.settings import GaLoreConfig


#: Subspaces that know no singular values of the gradient.
_BLIND = (
    "gaussian",
    "random_orthonormal",
    "columns",
    "coordinates",
    "block",
    "track",
    "blend",
    "cross_head",
    *BY_MODES,
)


def check_numbers(config: GaLoreConfig) -> None:
    """Refuse ranks, factors and shares out of range."""
    check_int("seed", config.seed, minimum=0, remedy="use any integer from 0 on")
    check_int("min_rank", config.min_rank, minimum=1, remedy="1 is the least")
    if isinstance(config.rank, int) and config.min_rank > config.rank:
        raise ValueError(f"min_rank={config.min_rank} is above rank={config.rank}, the upper bound; lower it.")
    check_int("head_size", config.head_size, minimum=1, remedy="LLaMA-7B has 128 rows a head, RoBERTa-base 64")
    check_int("natural_history", config.natural_history, minimum=1, remedy="each costs a low-rank gradient's memory")
    check_positive("natural_damping", config.natural_damping, remedy="1.0 weighs the identity like one gradient")
    check_share("rank_energy", config.rank_energy, remedy="0.9 holds nine tenths of the gradient's energy")
    check_share("tracking_rho", config.tracking_rho, below_one=True, remedy="0.7 follows the first moment mostly")
    check_positive("scale", config.scale, remedy="the paper uses 0.25 for pre-training, 2 or 4 for GLUE")
    check_positive("residual_scale", config.residual_scale, remedy="1.0 suits pre-training, 0.1 fine-tuning")
    check_positive("dense_lr_factor", config.dense_lr_factor, remedy="1.0 leaves the learning rate as it is")
    if config.clip_weight_norm is not None:
        check_positive("clip_weight_norm", config.clip_weight_norm, remedy="None clips nothing")
    if config.state_budget is not None:
        check_int("state_budget", config.state_budget, minimum=1, remedy="give bytes, or None for no cap")
        if config.rank_rule == "fixed":
            raise ValueError(
                f"state_budget={config.state_budget} caps an adaptive rank, and rank_rule='fixed' has none; choose "
                "rank_rule='energy', 'energy_shrink' or 'noise_edge'."
            )


def check_schedule(config: GaLoreConfig) -> None:
    """Refuse gaps and thresholds out of range, or that contradict each other."""
    check_int("update_proj_gap", config.update_proj_gap, minimum=1, remedy="the paper uses 200, or 500 for fine-tuning")
    check_int("refresh_warmup", config.refresh_warmup, minimum=0, remedy="0 is no warm-up")
    check_positive("refresh_share", config.refresh_share, remedy="0.5 adds half of a step")
    for name in ("min_gap", "max_gap"):
        if getattr(config, name) is not None:
            check_int(name, getattr(config, name), minimum=1, remedy="None follows update_proj_gap")
    low, high = config.gap_bounds(config.gap)
    if not low <= config.gap <= high:
        raise ValueError(
            f"update_proj_gap={config.gap} must lie between min_gap={low} and max_gap={high}; move the bounds."
        )
    for name in ("grow_above", "shrink_below", "refresh_below"):
        check_share(name, getattr(config, name), remedy="it is a share of what a fresh basis is worth")
    if config.shrink_below >= config.grow_above:
        raise ValueError(
            f"shrink_below={config.shrink_below} must be less than grow_above={config.grow_above}; lower it."
        )


def check_resets(config: GaLoreConfig) -> None:
    """Refuse a threshold of spikes or momentum resets out of range."""
    check_positive("spam_theta", config.spam_theta, remedy="the paper uses 5000")
    check_int("reset_gap", config.reset_gap, minimum=0, remedy="the paper uses 500; 0 never resets")
    check_int("reset_warmup", config.reset_warmup, minimum=0, remedy="the paper uses 150; 0 is no warm-up")
    assert config.reset_gap is not None
    assert config.reset_warmup is not None
    if config.reset_warmup > config.reset_gap:
        raise ValueError(
            f"reset_warmup={config.reset_warmup} is longer than reset_gap={config.reset_gap}: the learning rate would "
            "never be whole. Lower it."
        )


def check_subspace(config: GaLoreConfig) -> None:
    """Refuse what a subspace cannot do."""
    if config.basis_storage == "seed" and config.subspace not in DRAWN:
        raise ValueError(
            f"basis_storage='seed' with subspace={config.subspace!r}, whose bases come from gradients: only those of "
            f"{' and '.join(map(repr, DRAWN))} can be drawn again. Use one of these, or basis_storage='param'."
        )
    if config.subspace == "gaussian" and config.schedule != "fixed":
        raise ValueError(
            f"schedule={config.schedule!r} compares bases, and those of subspace='gaussian' are drawn at random and "
            "not orthonormal; use schedule='fixed' or another subspace."
        )
    if config.subspace == "gaussian" and config.moments in ("rotate", "rotate_first"):
        raise ValueError(
            f"moments={config.moments!r} turns moments from one orthonormal basis to the next, and those of "
            "subspace='gaussian' are not orthonormal; use moments='keep' or 'reset'."
        )
    if config.random_after is not None:
        check_int("random_after", config.random_after, minimum=0, remedy="None never takes random bases")
        if config.subspace == "gaussian" or config.adaptive_rank:
            raise ValueError(
                f"random_after={config.random_after} draws orthonormal bases of a fixed rank; "
                f"subspace={config.subspace!r} with rank_rule={config.rank_rule!r} has others. Use rank_rule='fixed' "
                "and another subspace than 'gaussian', or leave random_after out."
            )
    if config.adaptive_rank and config.subspace in _BLIND:
        raise ValueError(
            f"rank_rule={config.rank_rule!r} looks at singular values of the gradient, which "
            f"subspace={config.subspace!r} does not find; use rank_rule='fixed', or a subspace such as 'randomized'."
        )
    _check_modes(config)


def _check_modes(config: GaLoreConfig) -> None:
    """Refuse what has no meaning along the modes of a tensor, or along them only."""
    if config.by_modes and config.lift != "project_back":
        raise ValueError(
            f"lift={config.lift!r} with subspace={config.subspace!r}: it is defined for matrices. Use "
            "lift='project_back', or another subspace, with which a weight of order > 2 is folded into a matrix."
        )
    if not config.by_modes:
        for rank in (config.rank, *(rank for _, rank in config.rank_patterns)):
            if isinstance(rank, tuple):
                raise ValueError(
                    f"rank={rank} names a rank for each mode, which subspace={config.subspace!r} does not know; use "
                    "subspace='tucker', or one rank."
                )


def check_fused(config: GaLoreConfig) -> None:
    """Refuse layers that make low-rank gradients themselves where somebody needs full ones, or the other side."""
    if config.fused_backward and config.mode == "step":
        raise ValueError(
            "fused_backward=True with mode='step': that mode keeps full gradients, which would not be computed. "
            "Use mode='project' or 'layerwise'."
        )
    if config.compress_activations and not config.fused_backward:
        raise ValueError(
            "compress_activations=True with fused_backward=False: whole gradients need whole inputs. Set "
            "fused_backward=True (mode='project' or 'layerwise')."
        )
    if config.compress_activations and config.proj_type in ("left", "reverse_std"):
        raise ValueError(
            f"compress_activations=True with proj_type={config.proj_type!r}: gradients that are projected on the left "
            "need whole inputs. Use proj_type='std' (then 'right' for every nn.Linear), 'right' or 'full'."
        )
