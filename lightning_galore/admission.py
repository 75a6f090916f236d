# SPDX-License-Identifier: Apache-2.0
"""What is looked at before an optimizer is wrapped, and what is refused then: nothing has been changed yet."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_galore import base_probe, base_rules, dtensors, foreign_shards, saved_state, sharded_state, state_keys
from lightning_galore.config import GaLoreConfig
from lightning_galore.lift import LIFTS, warn_of_idle_rounding
from lightning_galore.sharding import common_shards
from lightning_galore.shards import Shards
from lightning_galore.storage import CODECS
from lightning_galore.subspace import SUBSPACES
from lightning_galore.target_table import Target
from lightning_galore.transforms import check_transform


def check_params(base: Optimizer, model: nn.Module | None) -> None:
    """Refuse parameters that another engine has cut or holds, before targets are looked for among them.

    Raises:
        TypeError: If ``base`` is no optimizer.
        ValueError: With the engine and what to use instead.
    """
    if not isinstance(base, Optimizer):
        raise TypeError(f"base={base!r} must be a torch.optim.Optimizer over the model's parameters.")
    foreign_shards.check_model(model)
    foreign_shards.check_parameters(param for group in base.param_groups for param in group["params"])


def check(base: Optimizer, targets: Mapping[Tensor, Target], config: GaLoreConfig) -> None:
    """Refuse what cannot be wrapped, or not with these settings.

    Raises:
        ValueError: With the argument, its value and the remedy.
    """
    base_rules.check_base(base)
    shards = shards_of(base, targets, config)
    check_lift(config, targets, sharded=shards is not None)
    if shards is not None and config.transform != "none":
        raise ValueError(
            f"transform={config.transform!r} with sharded weights (FSDP2): it looks at whole gradients. Use "
            "transform='none', or GaLoreDDPStrategy, where weights are whole."
        )
    if any(state_keys.BASIS in state for state in base.state.values()):  # base was wrapped before
        saved_state.check_loadable(base.state_dict(), base.param_groups, targets, adaptive=config.adaptive_rank)
    base_probe.check_moves(base, targets)
    if config.moment_storage == "8bit":
        base_probe.check_moment_bits(base, targets)
    check_transform(base, targets, config)


def warn(base: Optimizer, config: GaLoreConfig) -> None:
    """Say what settings do nothing for these parameters."""
    warn_of_idle_rounding(config, [param for group in base.param_groups for param in group["params"]])


def shards_of(base: Optimizer, targets: Mapping[Tensor, Target], config: GaLoreConfig) -> Shards | None:
    """Among whom the weights are divided, if they are.

    Raises:
        ValueError: If something cannot be done on parts.
    """
    shards = common_shards({target.name: param for param, target in targets.items()})
    if shards is not None:
        base_rules.check_sharded(base)
        _check_sharded_settings(config)
    return shards


def shrink_state(base: Optimizer, param: Tensor, target: Target) -> None:
    """Give the state of a weight that ``base`` made in its constructor the low-rank shape."""
    if not base.state.get(param):
        return
    if dtensors.is_sharded(param):
        base.state[param] = {
            key: dtensors.whole(value) if isinstance(value, Tensor) else value
            for key, value in base.state[param].items()
        }
    base_rules.shrink_eager_state(base, param, target.projection.low_shape)
    base.state[param] = sharded_state.placed(base.state[param], param, target)


def check_lift(config: GaLoreConfig, targets: Mapping[Tensor, Target], *, sharded: bool) -> None:
    """Refuse a lift where it has not what it needs.

    Args:
        config: Names the lift, the mode and the subspace.
        targets: The projected weights.
        sharded: Whether each process holds a part of them.

    Raises:
        ValueError: With what to use instead.
    """
    lift = LIFTS[config.lift]
    if lift.needs_orthonormal and not SUBSPACES[config.subspace].orthonormal:
        raise ValueError(
            f"lift={config.lift!r} with subspace={config.subspace!r}: what a basis leaves out of a gradient is known "
            "for orthonormal bases only. Use subspace='random_orthonormal' or another one."
        )
    if lift.per_channel and any(target.projection.side == "full" for target in targets.values()):
        raise ValueError(
            f"lift={config.lift!r} with proj_type='full': it compares channels, and a gradient that is projected on "
            "both sides has none left. Use proj_type='std', or lift='tensor_scale'."
        )
    if lift.needs_grad and config.mode == "project":
        raise ValueError(
            f"lift={config.lift!r} with mode='project': it needs the full gradient, which that mode frees in backward. "
            "Use mode='layerwise', which frees each as soon as its weight has moved, or mode='step'."
        )
    if lift.needs_grad and config.fused_backward:
        raise ValueError(
            f"fused_backward=True with lift={config.lift!r}: it needs the full gradient, which would not be computed. "
            "Set fused_backward=False."
        )
    if sharded and (lift.needs_grad or lift.needs_whole):
        raise ValueError(
            f"lift={config.lift!r} with sharded weights (FSDP2): it needs whole gradients or updates. Use "
            "lift='project_back', or GaLoreDDPStrategy, where weights are whole."
        )
    if sharded and config.fused_backward:
        raise ValueError(
            "fused_backward=True with sharded weights (FSDP2), whose gradients FSDP2 adds up itself. Set "
            "fused_backward=False, or use GaLoreDDPStrategy."
        )


def _check_sharded_settings(config: GaLoreConfig) -> None:
    """Refuse what cannot be done on parts of weights.

    Raises:
        ValueError: With the setting, its value and what to use instead.
    """
    if config.weight_storage == "int8":
        raise ValueError(
            "weight_storage='int8' with sharded weights (FSDP2): its blocks of codes would be cut. Set "
            "weight_storage='param' (method='q-galore' too), or use GaLoreDDPStrategy, where weights are whole."
        )
    if config.basis_placement == "shard" and config.basis_storage in CODECS:
        raise ValueError(
            f"basis_placement='shard' with basis_storage={config.basis_storage!r}: its blocks of codes would be cut. "
            "Set basis_placement='replicate', or keep the basis in bf16."
        )
    if SUBSPACES[config.subspace].uses_momentum:
        raise ValueError(
            f"subspace={config.subspace!r} with sharded weights (FSDP2) would gather every gradient and moment at "
            "every step. Use 'randomized' or 'power', or GaLoreDDPStrategy."
        )
