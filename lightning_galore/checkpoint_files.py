# SPDX-License-Identifier: Apache-2.0
"""Files that hold a checkpoint: where they may be, and how one is written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from lightning_galore.untrusted import ConversionError


def check_paths(source: Path, target: Path, *, overwrite: bool, accepted: str) -> None:
    """Refuse, before anything is read, what cannot be read or written.

    Args:
        source: A file that exists.
        target: A file in a folder that exists.
        overwrite: Whether ``target`` may exist.
        accepted: Says which files can be read.

    Raises:
        ConversionError: If either is a folder.
        FileNotFoundError: If ``source`` or the folder of ``target`` does not exist.
        FileExistsError: If ``target`` exists and may not.
    """
    if source.is_dir():
        raise ConversionError(f"source={source} is a folder (a sharded checkpoint?); give a single file. {accepted}")
    if not source.is_file():
        raise FileNotFoundError(f"source={source} does not exist.")
    if target.is_dir():
        raise ConversionError(f"target={target} is a folder; give the name of a file in it.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"The folder of target={target} does not exist; make it first.")
    if target.exists() and not overwrite:
        raise FileExistsError(f"target={target} exists. Choose another name, or pass overwrite=True (--overwrite).")


def write_whole(checkpoint: Any, target: Path, *, like: Path, overwrite: bool, trouble: str) -> None:
    """Write beside the target, read it back as weights only, then move it into place: never half a file under its name.

    Args:
        checkpoint: What is written.
        target: Where.
        like: Gives the file's permissions.
        overwrite: Whether ``target`` may exist.
        trouble: What is wrong, and the remedy, where the file cannot be read back.

    Raises:
        ConversionError: If it cannot be read back.
        FileExistsError: If ``target`` exists and may not.
    """
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        try:
            torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise ConversionError(trouble) from error
        shutil.copymode(like, temporary)
        if target.exists() and not overwrite:
            raise FileExistsError(
                f"target={target} has appeared meanwhile. Choose another name or pass overwrite=True."
            )
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
