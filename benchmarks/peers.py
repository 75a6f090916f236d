# SPDX-License-Identifier: Apache-2.0
"""The packages that we are compared with: optional, and named when they are not there."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

GALORE_TORCH, BITSANDBYTES = "galore-torch", "bitsandbytes"
APOLLO_TORCH, Q_GALORE_TORCH = "apollo-torch", "q-galore-torch"
_INSTALL = {
    GALORE_TORCH: ("galore_torch", "pip install galore-torch==1.0"),
    APOLLO_TORCH: ("apollo_torch", "pip install --no-deps apollo-torch==1.0.3"),
    Q_GALORE_TORCH: ("q_galore_torch", "pip install --no-deps q-galore-torch==1.0"),
    BITSANDBYTES: ("bitsandbytes", "pip install lightning-galore[bnb]"),
}


def peer(name: str, module: str) -> ModuleType | None:
    """A module of the peer ``name``, or None where it is not installed: its rows are left out then."""
    try:
        return import_module(module)
    except ModuleNotFoundError:
        return None


def galore_torch() -> ModuleType | None:
    """The package of the GaLore paper's authors (its optimizers and, below it, ``galore_projector``)."""
    return peer(GALORE_TORCH, "galore_torch")


def required(name: str) -> ModuleType:
    """The module of the peer ``name``.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    module = peer(name, _INSTALL[name][0])
    if module is None:
        raise ModuleNotFoundError(f"{name} is not installed: {_INSTALL[name][1]}", name=_INSTALL[name][0])
    return module


def missing(*names: str) -> list[str]:
    """A line for each of the packages that is left out; of galore-torch, unless others are named."""
    return [
        f"{name} is not installed, so its rows are left out: {_INSTALL[name][1]}"
        for name in names or (GALORE_TORCH,)
        if peer(name, _INSTALL[name][0]) is None
    ]
