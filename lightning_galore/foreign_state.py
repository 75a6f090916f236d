# SPDX-License-Identifier: Apache-2.0
"""The optimizer state of ``galore_torch.GaLoreAdamW``, checked and rewritten in the layout of ``state_keys``.

Shapes: weight ``(m, n)``, rank ``r``; their right basis is ``(r, n)``, ours ``(n, r)``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_galore import state_keys
from lightning_galore.subspace import SIDE_CODES, Side, resolve_side
from lightning_galore.untrusted import ConversionError, InertProjector, check_matrix, check_projector

ACCEPTED = (
    "Give a Lightning checkpoint, a saved optimizer.state_dict(), a dictionary with one under 'optimizer', or a folder "
    "checkpoint-N of Transformers' Trainer, of a run with galore_torch.GaLoreAdamW."
)
# What torch.optim.AdamW keeps in a group and galore-torch does not.
_ADAMW_DEFAULTS: dict[str, Any] = {
    "amsgrad": False,
    "foreach": None,
    "maximize": False,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
_FRESH = "Load the model's weights only and start a new optimizer."


class Tally:
    """Counts what was converted."""

    def __init__(self) -> None:
        self.sides: Counter[str] = Counter()
        self.ranks: Counter[int] = Counter()
        self.plain = 0
        self.bytes_before = 0
        self.bytes_after = 0
        # A dict keeps the order and drops repetitions.
        self.warnings: dict[str, None] = {
            "galore-torch adds eps before it corrects the bias and decays a weight after its update; torch.optim.AdamW "
            "does both the other way round. Training goes on closely, not bit by bit.": None,
            'Resume with method="galore" and fix_signs=False to find each next basis, and keep the moments, as '
            "galore-torch does.": None,
        }


def has_projector(state_dict: object) -> bool:
    """Whether any parameter of an optimizer's state dict has a galore-torch projector."""
    states = state_dict.get("state") if isinstance(state_dict, dict) else None
    return isinstance(states, dict) and any(isinstance(one, dict) and "projector" in one for one in states.values())


def convert_state_dict(state_dict: object, tally: Tally) -> dict[str, Any]:
    """The state dict in our layout; what was done is counted in ``tally``."""
    states, groups = _check_state_dict(state_dict)
    group_of = {index: group for group in groups for index in group["params"]}
    storages: dict[int, int] = {}
    converted: dict[Any, dict[str, Any]] = {}
    for index, state in states.items():
        if index not in group_of:
            raise ConversionError(f"The state of parameter {index!r} belongs to no param group: the file is damaged.")
        _count_storages(state, storages)
        name = f"state of parameter {index}"
        if "projector" in state:
            converted[index] = _convert_projected(state, group_of[index], name, tally)
        else:
            converted[index] = _convert_plain(state, name)
            tally.plain += 1
    tally.bytes_before += sum(storages.values())
    storages = {}
    for one in converted.values():
        _count_storages(one, storages)
    tally.bytes_after += sum(storages.values())
    return {"state": converted, "param_groups": [_convert_group(group, tally) for group in groups]}


def _check_state_dict(state_dict: object) -> tuple[dict[Any, dict[str, Any]], list[dict[str, Any]]]:
    """The two halves of a state dict of ``GaLoreAdamW``, or an error that says what it is instead."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
        raise ConversionError(f"There is no optimizer state with 'state' and 'param_groups' in it. {ACCEPTED}")
    states, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(states, dict) or not all(isinstance(state, dict) for state in states.values()):
        raise ConversionError("'state' is not a dictionary of dictionaries: the file is damaged or no optimizer state.")
    if not isinstance(groups, list) or not all(_is_group(group) for group in groups):
        raise ConversionError("'param_groups' is not a list of groups with 'params': the file is damaged.")
    keys = {key for state in states.values() for key in state}
    if not states and groups and all(_is_dummy(group) for group in groups):
        raise ConversionError(
            "The optimizer state is empty: Transformers saves none with optim='galore_adamw_layerwise'. "
            f"{_FRESH} GaLoreStrategy(mode='layerwise') saves its own."
        )
    if "state1" in keys:
        raise ConversionError(
            "The optimizer state is 8-bit (galore_torch.GaLoreAdamW8bit, key 'state1'): codes depend on bitsandbytes' "
            f"version and layout and are not converted. {_FRESH} "
            "GaLoreOptimizer(bitsandbytes.optim.AdamW8bit(...)) keeps 8-bit states."
        )
    if "exp_avg_sq_row" in keys or "RMS" in keys:
        raise ConversionError(f"The optimizer state is galore_torch.GaLoreAdafactor's, not GaLoreAdamW's. {_FRESH}")
    if state_keys.BASIS in keys:
        raise ConversionError("The optimizer state is already in this package's layout: resume from it as it is.")
    if "projector" not in keys:
        raise ConversionError(
            "The optimizer state holds no projector: galore-torch did not write it, and the moments of a full-rank "
            f"optimizer have no low rank to go on from. {_FRESH} (A folder of Transformers' Trainer has the weights in "
            f"model.safetensors.) Else: {ACCEPTED[0].lower()}{ACCEPTED[1:]}"
        )
    return states, groups


def _convert_projected(state: dict[str, Any], group: Mapping[str, Any], name: str, tally: Tally) -> dict[str, Any]:
    projector = _read_projector(state["projector"], name)
    result = _convert_plain(state, name)
    for key in ("exp_avg", "exp_avg_sq"):
        check_matrix(f"{key} in the {name}", result[key])
    side, rank = _infer_side(projector, tuple(result["exp_avg"].shape), name)
    steps, gap = int(result["step"]), projector["update_proj_gap"]
    for key in ("rank", "update_proj_gap", "scale", "proj_type"):
        if key in group and group[key] != projector[key]:
            text = f"A projector has {key}={projector[key]!r}, its group {group[key]!r}: from now on the group's holds."
            tally.warnings[text] = None
    tally.sides[side] += 1
    tally.ranks[rank] += 1
    bases = projector["ortho_matrix"] if side == "full" else [projector["ortho_matrix"]]
    result[state_keys.BASIS] = _fresh(bases[0].mT if side == "right" else bases[0])
    if side == "full":
        result[state_keys.BASIS_RIGHT] = _fresh(bases[1].mT)
    # galore-torch refreshes at steps 0, gap, 2 gap, ..., counted before the increment.
    result[state_keys.SIDE] = SIDE_CODES[side]
    result[state_keys.STEP] = steps
    result[state_keys.REFRESHED_AT] = (steps - 1) // gap * gap
    result[state_keys.REFRESHES] = (steps - 1) // gap + 1
    result[state_keys.FAILURES] = 0
    result[state_keys.OVERLAP] = -1.0
    return result


def _read_projector(projector: object, name: str) -> dict[str, Any]:
    if isinstance(projector, InertProjector):
        if projector.attributes is None:
            raise ConversionError(f"The projector in the {name} is empty: the file is damaged or was tampered with.")
        return projector.attributes
    # In memory it is galore-torch's own object. Its name is compared, because that package need not be installed.
    if type(projector).__name__ == "GaLoreProjector":
        return check_projector(dict(vars(projector)))
    raise ConversionError(
        f"The projector in the {name} is a {type(projector).__name__}, not a GaLoreProjector. {_FRESH}"
    )


def _infer_side(projector: Mapping[str, Any], low_shape: tuple[int, ...], name: str) -> tuple[Side, int]:
    """The side that fits ``proj_type``, the rank and the shapes of basis and moments; never more than one does.

    Each candidate side says what the weight's shape would be; galore-torch's rule for it must agree.
    """
    basis, kind = projector["ortho_matrix"], projector["proj_type"]
    candidates: list[tuple[Side, tuple[int, int], int]] = []
    if kind == "full":
        (m, left_rank), (right_rank, n) = basis[0].shape, basis[1].shape
        if low_shape == (left_rank, right_rank) and left_rank == right_rank:
            candidates.append(("full", (m, n), left_rank))
    else:
        (rows, columns), (low_rows, low_columns) = basis.shape, low_shape
        if columns == low_rows:  # (m, r) and (r, n)
            candidates.append(("left", (rows, low_columns), columns))
        if rows == low_columns:  # (r, n) and (m, r)
            candidates.append(("right", (low_rows, columns), rows))
    for side, shape, rank in candidates:
        if resolve_side(kind, shape) == side and rank == min(projector["rank"], *shape):
            if rank < projector["rank"]:
                raise ConversionError(
                    f"rank={projector['rank']} in the {name} is more than its weight of shape {shape} has; it "
                    f"would stay full-rank here. {_FRESH}"
                )
            return side, rank
    shapes = [tuple(one.shape) for one in basis] if kind == "full" else tuple(basis.shape)
    raise ConversionError(
        f"The {name} does not fit together: proj_type={kind!r}, rank={projector['rank']}, basis {shapes} and moments "
        f"{low_shape} belong to no weight. The file is damaged or was tampered with."
    )


def _convert_plain(state: dict[str, Any], name: str) -> dict[str, Any]:
    """Step and moments as ``torch.optim.AdamW`` keeps them."""
    expected = {"step", "exp_avg", "exp_avg_sq"}
    if set(state) - {"projector"} != expected:
        raise ConversionError(
            f"The {name} has the keys {sorted(map(str, state))}, not {sorted(expected)} of galore_torch.GaLoreAdamW. "
            f"{_FRESH}"
        )
    step, moments = state["step"], (state["exp_avg"], state["exp_avg_sq"])
    if isinstance(step, Tensor) and step.numel() == 1:
        step = step.item()
    if type(step) not in (int, float) or step != int(step) or step < 1:
        raise ConversionError(f"The {name} has step={step!r}, not a count of updates from 1 on: the file is damaged.")
    if not all(type(one) in (Tensor, torch.nn.Parameter) and one.is_floating_point() for one in moments):
        raise ConversionError(f"The {name} has moments that are not floating-point tensors: the file is damaged.")
    if moments[0].shape != moments[1].shape:
        raise ConversionError(
            f"The {name} has moments of shapes {[tuple(one.shape) for one in moments]}, which differ."
        )
    return {
        "step": torch.tensor(float(step), dtype=torch.float32),
        "exp_avg": _fresh(moments[0]),
        "exp_avg_sq": _fresh(moments[1]),
    }


def _is_dummy(group: Mapping[str, Any]) -> bool:
    """Whether it is the group of LayerWiseDummyOptimizer, whose one parameter stands for none."""
    return len(group["params"]) == 1 and "rank" not in group


def _is_group(group: object) -> bool:
    return isinstance(group, dict) and isinstance(group.get("params"), list)


def _convert_group(group: Mapping[str, Any], tally: Tally) -> dict[str, Any]:
    if group.get("correct_bias", True) is not True:
        tally.warnings["correct_bias=False: torch.optim.AdamW always corrects the bias."] = None
    # dim, proj_quant: how later revisions of galore-torch choose the projector.
    dropped = ("correct_bias", "dim", "proj_quant")
    return {**_ADAMW_DEFAULTS, **{key: value for key, value in group.items() if key not in dropped}}


def _fresh(tensor: Tensor) -> Tensor:
    """A contiguous copy with a storage of its own: theirs may be a view that keeps a whole SVD factor alive."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _count_storages(state: Mapping[str, Any], storages: dict[int, int]) -> None:
    """Add the memory behind the tensors of ``state`` to ``storages``, each once however many views there are."""
    for value in state.values():
        attributes = value.attributes if isinstance(value, InertProjector) else getattr(value, "__dict__", None)
        nested = attributes["ortho_matrix"] if attributes and "ortho_matrix" in attributes else value
        for tensor in nested if isinstance(nested, (list, tuple)) else [nested]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
