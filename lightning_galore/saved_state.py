# SPDX-License-Identifier: Apache-2.0
"""A saved optimizer state: whether it fits the targets, and what torch's loading makes of its data types."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from lightning_galore import state_keys, storage
from lightning_galore.subspace import SIDE_CODES
from lightning_galore.target_table import Target


def check_loadable(
    state_dict: Mapping[str, Any],
    param_groups: Sequence[Mapping[str, Any]],
    targets: Mapping[Tensor, Target],
    *,
    adaptive: bool,
) -> None:
    """Refuse, before anything is changed, a state that does not fit the targets.

    Args:
        state_dict: What shall be loaded.
        param_groups: Where it shall be loaded into.
        targets: The projected weights.
        adaptive: Whether the rank of a target is only an upper bound.

    Raises:
        ValueError: With the weight's name, what was saved, what is wanted and what to do.
    """
    for param, saved in _saved_states(state_dict, param_groups):
        target = targets.get(param)
        if target is None and state_keys.BASIS in saved:
            raise ValueError(
                f"A weight of shape {tuple(param.shape)} was projected with rank {state_keys.saved_rank(saved)} in the "
                "checkpoint and is not now. Set rank, target_modules and ignore_modules as in that run, or load its "
                "weights only."
            )
        if target is None or not saved or _is_unused(saved, target):
            continue
        if "projector" in saved:
            raise ValueError(
                f"The checkpoint's state of {target.name} was written by galore_torch. "
                "Convert it first: lightning-galore convert OLD NEW."
            )
        if state_keys.BASIS not in saved:
            raise ValueError(
                f"The checkpoint holds no subspace for {target.name}: its optimizer state is full-rank. Load its "
                "weights only (Module.load_from_checkpoint) and start a new run, or resume it without GaLore."
            )
        _check_geometry(saved, target, adaptive=adaptive)


def _is_unused(saved: Mapping[str, Any], target: Target) -> bool:
    """Whether the state is from the optimizer's constructor (Adagrad) and its weight was never stepped."""
    shapes = {tuple(value.shape) for value in saved.values() if isinstance(value, Tensor) and value.ndim}
    return float(saved.get("step", 1)) == 0 and shapes <= {target.projection.low_shape}


def _check_geometry(saved: Mapping[str, Any], target: Target, *, adaptive: bool) -> None:
    projection = target.projection
    names = {code: side for side, code in SIDE_CODES.items()}
    side = names.get(saved.get(state_keys.SIDE, -1), "unknown")
    rank = state_keys.saved_rank(saved)
    fits = projection.with_rank(min(rank, projection.rank) if adaptive else projection.rank)
    keys = [key for key in state_keys.basis_keys(projection) if isinstance(saved.get(key), Tensor)]
    shapes = (
        projection.with_rank(rank).basis_shapes
        if isinstance(saved[state_keys.BASIS], int)
        else tuple(
            # Codes have the shape that their rank says, if there are as many as that takes.
            shape if storage.holds(saved[key], saved.get(key + state_keys.ABSMAX), shape) else tuple(saved[key].shape)
            for key, shape in zip(keys, projection.with_rank(rank).basis_shapes, strict=False)
        )
    )
    fits = fits.in_layout(saved.get(state_keys.LAYOUT, fits.layout))
    if side == projection.side and shapes == fits.basis_shapes and fits.layout == saved.get(state_keys.LAYOUT, ()):
        return
    if projection.side == "modes" and side == "modes":
        raise ValueError(
            f"The checkpoint's subspace of {target.name} has ranks {saved.get(state_keys.LAYOUT)}; this run has ranks "
            f"{projection.layout}. Set rank as in that run, or load its weights only (Module.load_from_checkpoint) and "
            "start a new run."
        )
    raise ValueError(
        f"The checkpoint's subspace of {target.name} has rank={rank}, side={side} and bases {shapes}; this run has "
        f"rank={projection.rank}, side={projection.side} and bases {projection.basis_shapes}. Set rank={rank} and the "
        "proj_type of that run, or load its weights only (Module.load_from_checkpoint) and start a new run."
    )


def stepped_only(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without the parameters of which the wrapped optimizer keeps nothing, and Adam would miss a ``step``.

    Such is a weight that has sat out its first step, because its gradient was not finite.
    """
    state = {index: saved for index, saved in state_dict["state"].items() if not _is_unstepped(saved)}
    return {**state_dict, "state": state}


def restore_unstepped(
    state_dict: Mapping[str, Any], param_groups: Sequence[Mapping[str, Any]], state: MutableMapping[Tensor, Any]
) -> None:
    """Load what :func:`stepped_only` has left out."""
    for param, saved in _saved_states(state_dict, param_groups):
        if _is_unstepped(saved):
            state[param] = {
                key: value.to(param.device, copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
                for key, value in saved.items()
            }


def _is_unstepped(saved: Mapping[str, Any]) -> bool:
    return bool(saved) and all(map(state_keys.is_ours, saved))


def restore_dtypes(
    state_dict: Mapping[str, Any], param_groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, dict[str, Any]]
) -> None:
    """Give each state tensor the dtype that it was saved in: torch casts all but ``step`` to the parameter's dtype.

    In place of cast values, which may have lost digits (fp32 moments of a bf16 weight) or their meaning (8-bit codes).
    """
    for param, saved in _saved_states(state_dict, param_groups):
        for key, value in saved.items():
            loaded = state[param].get(key)
            if (
                isinstance(value, Tensor)
                and isinstance(loaded, Tensor)
                and value.dtype != loaded.dtype
                and key != "step"
            ):
                state[param][key] = value.to(loaded.device, copy=True)


def _saved_states(
    state_dict: Mapping[str, Any], param_groups: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """Parameters with their saved state. Groups of other sizes are left to torch, which refuses them with a message."""
    for group, saved_group in zip(param_groups, state_dict["param_groups"], strict=False):
        for param, index in zip(group["params"], saved_group["params"], strict=False):
            saved = state_dict["state"].get(index)
            if saved:
                yield param, saved
