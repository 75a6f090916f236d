# SPDX-License-Identifier: Apache-2.0
"""Turns a checkpoint with int8 weights into one with floating-point weights, which any code loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from typing_extensions import override

from lightning_galore import weights
from lightning_galore.checkpoint_files import check_paths, write_whole
from lightning_galore.storage import DTYPES, nbytes
from lightning_galore.untrusted import ConversionError, load

_ACCEPTED = "Accepted are a Lightning checkpoint, a model's state dict, and a dictionary with one under 'model'."


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What :func:`export_weights` did.

    Args:
        decoded: Weights that were codes.
        bytes_before: Of all weights in the source.
        bytes_after: Of all weights in the target.
    """

    decoded: int
    bytes_before: int
    bytes_after: int

    @override
    def __str__(self) -> str:
        """One line for a terminal."""
        sizes = f"{self.bytes_before:,} bytes before, {self.bytes_after:,} after"
        return f"{self.decoded} int8 weights decoded; weights: {sizes}"


def export_weights(
    source: Path, target: Path, *, dtype: Literal["fp32", "bf16", "fp16"] = "fp32", overwrite: bool = False
) -> ExportReport:
    """Decode the int8 weights of a checkpoint, so that ``load_from_checkpoint`` and other programs load it.

    Everything else is copied as it is, so a run without int8 weights can resume from the result. The source may be
    anybody's: no code of it is run. The target is written whole or not at all.

    Args:
        source: A Lightning checkpoint, a model's state dict, or a dictionary that holds one under ``model``.
        target: Where to write.
        dtype: Of the decoded weights. fp32 holds them exactly.
        overwrite: Replace ``target`` if it exists.

    Raises:
        ConversionError: If the file is none of these, is damaged, or has no int8 weights.
        FileNotFoundError: If ``source`` or the folder of ``target`` does not exist.
        FileExistsError: If ``target`` exists and ``overwrite`` is False.
    """
    source, target = Path(source), Path(target)
    check_paths(source, target, overwrite=overwrite, accepted=_ACCEPTED)
    try:
        checkpoint = load(source)
    except OSError as error:  # of a file that was cut off, too
        raise ConversionError(f"source={source} cannot be read ({error}); it may be cut off. {_ACCEPTED}") from error
    key, state = _model_state(checkpoint)
    damaged = weights.damaged_codes(state)
    if damaged:
        names = f"{', '.join(damaged[:4])}{', ...' if len(damaged) > 4 else ''}"
        raise ConversionError(
            f"source={source} is damaged: the int8 codes of {names} have no scales that fit them. "
            "Use another checkpoint of the run."
        )
    if not weights.holds_codes(state):
        raise ConversionError(f"source={source} has no int8 weights, so there is nothing to export. {_ACCEPTED}")
    wanted = DTYPES[dtype]
    assert wanted is not None
    plain = weights.plain_state_dict(state, dtype=wanted)
    whole = plain if key is None else {**checkpoint, key: plain}
    write_whole(whole, target, like=source, overwrite=overwrite, trouble=f"target={target} could not be read back.")
    return ExportReport(decoded=len(state) - len(plain), bytes_before=nbytes(state), bytes_after=nbytes(plain))


def _model_state(checkpoint: object) -> tuple[str | None, dict[str, Any]]:
    """Where the model's state dict stands, and it."""
    if not isinstance(checkpoint, dict):
        raise ConversionError(f"The file holds a {type(checkpoint).__name__}, not a dictionary. {_ACCEPTED}")
    for key in ("state_dict", "model"):
        if isinstance(checkpoint.get(key), dict):
            return key, checkpoint[key]
    return None, checkpoint
