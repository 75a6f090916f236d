# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint that anybody may have made: nothing in it is run, and only what is listed here is built."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
_MODULE = "galore_torch.galore_projector"
_TENSOR_MODULE = "galore_torch.galore_projector_tensor"


class ConversionError(ValueError):
    """A checkpoint that cannot be converted: nothing was written, and the message says why and what to do."""


class InertProjector:
    """Stands for ``GaLoreProjector`` while a file is read: holds checked attributes and has no behaviour.

    The restricted unpickler may call the class and ``__setstate__`` with whatever the file says. So neither takes
    anything but the attributes that galore-torch writes, each of its type.
    """

    # 1.0 has the first six; later revisions on GitHub add the rest, for a 4-bit basis.
    _KNOWN = ("rank", "verbose", "update_proj_gap", "scale", "ortho_matrix", "proj_type")
    _QUANT = ("proj_quant", "quant_group_size", "quant_n_bit")
    _QUANT_DATA = ("ortho_matrix_scales", "ortho_matrix_zeros", "ortho_matrix_shape")

    def __new__(cls) -> InertProjector:
        """Take no arguments: a pickle may pass some."""
        return super().__new__(cls)

    def __init__(self) -> None:
        self.attributes: dict[str, Any] | None = None

    def __setstate__(self, state: object) -> None:
        self.attributes = check_projector(state)


class RefusedTensorProjector:
    """Stands for ``GaLoreProjectorTensor``, which is not converted."""

    def __new__(cls, *args: object) -> RefusedTensorProjector:
        """Refuse, whatever the file passes."""
        raise ConversionError(
            "The checkpoint projects weights of more than two dimensions (a GaLoreProjectorTensor of galore-torch). "
            "Their Tucker factors are not converted. Load the model's weights only and start a new optimizer."
        )


def check_projector(state: object) -> dict[str, Any]:
    """The attributes of a galore-torch projector, each checked for its type and range.

    Raises:
        ConversionError: If there is one too many, one too few, or one of another type than galore-torch writes.
    """
    if type(state) is not dict or not all(type(key) is str for key in state):
        raise _odd("its state", type(state).__name__, "a dictionary of attributes")
    known = InertProjector
    unknown = sorted(set(state) - {*known._KNOWN, *known._QUANT, *known._QUANT_DATA})
    missing = sorted(set(known._KNOWN) - set(state))
    if unknown or missing:
        raise _odd("its attributes", f"{unknown} added, {missing} missing", f"exactly {list(known._KNOWN)}")
    if state.get("proj_quant", False) is not False:
        raise ConversionError(
            f"proj_quant={state['proj_quant']!r}: a galore-torch projector has a 4-bit basis, which is not converted. "
            "Load the model's weights only and start a new optimizer."
        )
    for key in ("rank", "update_proj_gap"):
        if type(state[key]) is not int or state[key] < 1:
            raise _odd(key, repr(state[key]), "an integer from 1 on")
    if type(state["scale"]) not in (int, float) or not math.isfinite(state["scale"]):
        raise _odd("scale", repr(state["scale"]), "a finite number")
    if state["proj_type"] not in PROJ_TYPES:
        raise _odd("proj_type", repr(state["proj_type"]), f"one of {PROJ_TYPES}")
    _check_bases(state["ortho_matrix"], full=state["proj_type"] == "full")
    return {key: state[key] for key in known._KNOWN}


def _check_bases(bases: Any, *, full: bool) -> None:
    if full and (type(bases) not in (list, tuple) or len(bases) != 2):
        raise _odd("ortho_matrix", type(bases).__name__, "a list of two matrices, as proj_type='full' needs")
    for basis in bases if full else [bases]:
        check_matrix("ortho_matrix", basis)


def check_matrix(name: str, value: object) -> Tensor:
    """``value`` if it is an ordinary floating-point matrix.

    Raises:
        ConversionError: If it is anything else; ``name`` says where it stood.
    """
    if not isinstance(value, Tensor) or type(value) not in (Tensor, torch.nn.Parameter):
        raise _odd(name, type(value).__name__, "a tensor")
    if value.layout != torch.strided or not value.is_floating_point() or value.dim() != 2 or value.is_meta:
        raise _odd(name, f"{value.layout}, {value.dtype}, shape {tuple(value.shape)}", "a dense floating-point matrix")
    return value


def _odd(name: str, found: str, wanted: str) -> ConversionError:
    return ConversionError(
        f"The checkpoint is not galore-torch's, or was tampered with: {name} is {found} where {wanted} is expected. "
        "Do not load it with weights_only=False unless you know who wrote it."
    )


def load(path: Path) -> Any:
    """Read a checkpoint onto the CPU with torch's list of harmless types and our stand-in, and nothing else.

    ``galore_torch`` is not needed and never imported: its names are mapped onto :class:`InertProjector`.

    Raises:
        ConversionError: If the file names any other type or function, or is no checkpoint.
    """
    allowed: list[Any] = [
        (InertProjector, f"{_MODULE}.GaLoreProjector"),
        (RefusedTensorProjector, f"{_TENSOR_MODULE}.GaLoreProjectorTensor"),
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (ConversionError, OSError):
        raise
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} holds what is neither a tensor, a number nor a galore-torch projector, and was not loaded: "
            f"{_cause(error)}. If you wrote that class and trust the file, allow it around the call with "
            "torch.serialization.safe_globals([...]), or save the checkpoint again without it."
        ) from error
    except Exception as error:  # a broken or crafted file fails in a way of its own in each part of the reader
        raise ConversionError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {error}). "
            "Give a file that torch.save or Lightning wrote."
        ) from error


def _cause(error: Exception) -> str:
    """The line of torch's message that names the culprit, without its advice to load the file unsafely."""
    lines = [line.strip() for line in str(error).splitlines()]
    culprit = next((line for line in lines if "GLOBAL" in line or "WeightsUnpickler error" in line), lines[0])
    return culprit.removeprefix("WeightsUnpickler error: ").split(". Please use")[0].rstrip(".")
