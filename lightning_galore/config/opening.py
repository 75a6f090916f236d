# SPDX-License-Identifier: Apache-2.0
"""The axes that a user leaves open, and what a method and the defaults make of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_galore.config.presets import AUTO, DRAWN, METHODS, NEEDED, OPEN, RESETS, WHY

if TYPE_CHECKING:
    from lightning_galore.config.settings import GaLoreConfig


def opened_axes(config: GaLoreConfig) -> dict[str, Any]:
    """What each axis becomes that ``config`` leaves open.

    Raises:
        ValueError: If the method has no default for one of them.
    """
    choices = {**AUTO, **(METHODS[config.method] if config.method else {})}
    if config.subspace == "gaussian":
        choices["moments"] = "keep"  # there is no change of coordinates between bases that are not orthonormal
    if config.weight_storage == "int8":
        choices["stochastic_round"] = True
    transform = choices["transform"] if config.transform in OPEN else config.transform
    choices |= RESETS.get(transform, {})
    subspace = choices["subspace"] if config.subspace in OPEN else config.subspace
    if choices["basis_storage"] == "seed" and subspace not in DRAWN:  # APOLLO with an SVD, for example
        choices["basis_storage"] = "param"
    opened = {axis: choice for axis, choice in choices.items() if getattr(config, axis) in OPEN}
    if "reset_warmup" in opened and isinstance(gap := opened.get("reset_gap", config.reset_gap), int):
        opened["reset_warmup"] = min(opened["reset_warmup"], gap)
    for axis, choice in opened.items():
        if choice == NEEDED:
            raise ValueError(f"method={config.method!r} with {axis}={getattr(config, axis)!r}: say {WHY[axis]}.")
    return opened
