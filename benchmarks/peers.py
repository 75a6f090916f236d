# SPDX-License-Identifier: Apache-2.0
"""The packages that we are compared with: optional, and named when they are not there."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

GALORE_TORCH = "galore-torch"
_INSTALL = {GALORE_TORCH: "pip install galore-torch==1.0"}


def peer(name: str, module: str) -> ModuleType | None:
    """A module of the peer ``name``, or None where it is not installed: its rows are left out then."""
    try:
        return import_module(module)
    except ModuleNotFoundError:
        return None


def galore_torch() -> ModuleType | None:
    """The package of the GaLore paper's authors (its optimizers and, below it, ``galore_projector``)."""
    return peer(GALORE_TORCH, "galore_torch")


def missing() -> list[str]:
    """A line for every peer that is left out."""
    if galore_torch() is not None:
        return []
    return [f"{GALORE_TORCH} is not installed, so its rows are left out: {_INSTALL[GALORE_TORCH]}"]
