# SPDX-License-Identifier: Apache-2.0
"""Turns a checkpoint of ``galore_torch.GaLoreAdamW`` into one for ``GaLoreOptimizer(torch.optim.AdamW(...))``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_galore import trainer_folder
from lightning_galore.checkpoint_files import check_paths, write_whole
from lightning_galore.foreign_state import ACCEPTED, Tally, convert_state_dict, has_projector
from lightning_galore.untrusted import ConversionError, load

__all__ = ["ConversionError", "ConversionReport", "convert_checkpoint", "convert_optimizer_state"]


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What :func:`convert_checkpoint` did.

    Args:
        projected: Weights with a subspace.
        plain: Other parameters with optimizer state.
        sides: How many projected weights have their basis on the ``left``, ``right`` or both (``full``).
        ranks: How many projected weights have each rank.
        bytes_before: Memory of the optimizer states as galore-torch held them, whole SVD factors behind views included.
        bytes_after: Memory of the converted states.
        warnings: What differs when training goes on.
    """

    projected: int
    plain: int
    sides: dict[str, int]
    ranks: dict[int, int]
    bytes_before: int
    bytes_after: int
    warnings: tuple[str, ...]

    @override
    def __str__(self) -> str:
        """A few lines for a terminal."""
        sides = ", ".join(f"{count} {side}" for side, count in sorted(self.sides.items()))
        ranks = ", ".join(f"{count} of rank {rank}" for rank, count in sorted(self.ranks.items()))
        lines = [
            f"{self.projected} projected weights ({sides}; {ranks}), {self.plain} plain parameters",
            f"optimizer state: {self.bytes_before:,} bytes before, {self.bytes_after:,} after",
            *(f"note: {text}" for text in self.warnings),
        ]
        return "\n".join(lines)


def convert_checkpoint(source: Path, target: Path, *, prefix: str = "", overwrite: bool = False) -> ConversionReport:
    """Convert the galore-torch optimizer states of a checkpoint and write the result to a file.

    The source is untrusted: only tensors, numbers and the attributes of a projector are read from it, no code of it is
    run, and ``galore_torch`` need not be installed. The target is written whole or not at all.

    Args:
        source: A Lightning checkpoint, a saved ``optimizer.state_dict()``, a dictionary that holds one under
            ``optimizer``, or a folder ``checkpoint-N`` of Transformers' Trainer with ``optim="galore_adamw"``.
        target: Where to write. Everything but the optimizer states is copied as it is; a folder becomes one Lightning
            checkpoint with its weights, optimizer, scheduler and step.
        prefix: Of a folder: put before the name of each weight, as ``model.`` for a LightningModule that keeps the
            network in ``self.model``.
        overwrite: Replace ``target`` if it exists.

    Returns:
        What was converted, and what will differ.

    Raises:
        ConversionError: If the file is none of these, holds anything unexpected, or cannot be converted.
        FileNotFoundError: If ``source`` or the folder of ``target`` does not exist.
        FileExistsError: If ``target`` exists and ``overwrite`` is False.
    """
    source, target = Path(source), Path(target)
    folder = source if source.is_dir() else None
    if folder is not None:
        source = trainer_folder.optimizer_file(folder)
    elif prefix:
        raise ConversionError(f"prefix={prefix!r} is for a folder of Transformers' Trainer; source={source} is none.")
    check_paths(source, target, overwrite=overwrite, accepted=ACCEPTED)
    checkpoint = load(source) if folder is None else trainer_folder.read_folder(folder, prefix=prefix)
    tally = Tally()
    converted = _convert_container(checkpoint, tally)
    # Whoever resumes from it reads it as weights only; a projector outside of the optimizer states would show there.
    trouble = "The checkpoint holds a galore-torch projector outside of its optimizer states. Save it again without."
    write_whole(converted, target, like=source, overwrite=overwrite, trouble=trouble)
    return _report(tally)


def convert_optimizer_state(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Convert ``GaLoreAdamW(...).state_dict()``, as it is in memory, for ``GaLoreOptimizer.load_state_dict``.

    Groups keep their ``rank``, ``update_proj_gap``, ``scale`` and ``proj_type``: GaLoreOptimizer reads the same keys.

    Args:
        state_dict: Left as it is. Tensors of the result share nothing with it.

    Returns:
        A state dict of tensors, numbers and strings only.

    Raises:
        ConversionError: If it is not a state of ``galore_torch.GaLoreAdamW``; the message says which and what to do.
    """
    return convert_state_dict(state_dict, Tally())


def _report(tally: Tally) -> ConversionReport:
    return ConversionReport(
        projected=sum(tally.sides.values()),
        plain=tally.plain,
        sides=dict(tally.sides),
        ranks=dict(tally.ranks),
        bytes_before=tally.bytes_before,
        bytes_after=tally.bytes_after,
        warnings=tuple(tally.warnings),
    )


def _convert_container(checkpoint: object, tally: Tally) -> dict[str, Any]:
    """Find the optimizer states in a file and convert those."""
    if not isinstance(checkpoint, dict):
        raise ConversionError(
            f"The file holds a {type(checkpoint).__name__} where a dictionary is expected. {ACCEPTED}"
        )
    if "optimizer_states" in checkpoint:
        states = checkpoint["optimizer_states"]
        if not isinstance(states, list):
            raise ConversionError(f"optimizer_states is a {type(states).__name__}, not a list. {ACCEPTED}")
        if not states:
            raise ConversionError("optimizer_states is empty, so there is nothing to convert.")
        # A second optimizer of the module may be an ordinary one, which stays as it is.
        ordinary_may_stay = any(has_projector(state) for state in states)
        converted = [
            state if ordinary_may_stay and not has_projector(state) else convert_state_dict(state, tally)
            for state in states
        ]
        return {**checkpoint, "optimizer_states": converted}
    if "optimizer" in checkpoint:
        return {**checkpoint, "optimizer": convert_state_dict(checkpoint["optimizer"], tally)}
    return convert_state_dict(checkpoint, tally)
