# SPDX-License-Identifier: Apache-2.0
"""Texts from local files or from the hub as streams of rows, and which of them are held out."""

import glob
import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lightning_galore.tasks.extras import require

Files: TypeAlias = str | list[str] | None
Documents = Literal["line", "paragraph", "document"]

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".text": "text"}
_LAYOUTS = {"json": "one JSON object a line", "parquet": "a Parquet table", "text": "plain text"}
_PACKED = (".gz", ".zst", ".xz", ".bz2")


def find_files(files: str | Sequence[str], *, argument: str) -> list[str]:
    """The files of paths, folders and glob patterns, sorted; each once, whatever leads to it.

    Args:
        files: Paths, folders or patterns.
        argument: What the user calls them.

    Raises:
        FileNotFoundError: If one of them leads to no file.
        ValueError: If the files are of several kinds, or of none that is known.
    """
    found: dict[str, str] = {}  # by their absolute paths
    for given in [files] if isinstance(files, str) else files:
        path = Path(given).expanduser()
        names = [str(path)] if path.is_file() else glob.glob(str(path / "*" if path.is_dir() else path), recursive=True)
        names = [name for name in names if Path(name).is_file() and _kind(name) is not None or name == str(path)]
        if not names:
            raise FileNotFoundError(
                f"{argument}={given!r} leads to no file ({', '.join(_BUILDERS)}, also packed as {', '.join(_PACKED)}). "
                "Give a path, a folder or a pattern in quotation marks such as 'c4/*.jsonl'."
            )
        for name in sorted(names):
            found.setdefault(os.path.abspath(name), name)
    kinds = sorted({str(_kind(name)) for name in found})
    if len(kinds) > 1 or kinds == ["None"]:
        raise ValueError(
            f"{argument}={files!r} holds files of the kinds {', '.join(kinds)}: all must be of one, and end in one of "
            f"{', '.join(_BUILDERS)} (also packed as {', '.join(_PACKED)})."
        )
    return list(found.values())


def _kind(name: str) -> str | None:
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    while suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return _BUILDERS.get(suffixes[-1]) if suffixes else None


def file_rows(files: str | Sequence[str], *, argument: str, sample_by: Documents = "document") -> Any:
    """The rows of local files, as a ``datasets.IterableDataset``: JSON lines, Parquet or plain text.

    Args:
        files: Paths, folders or glob patterns.
        argument: What the user calls them.
        sample_by: What is a document in a plain text file.
    """
    names = find_files(files, argument=argument)
    builder = _kind(names[0])
    options = {"sample_by": sample_by} if builder == "text" else {}
    datasets = require("datasets")
    try:
        return datasets.load_dataset(builder, data_files=names, split="train", streaming=True, **options)
    except Exception as error:  # an empty file is a StopIteration, and each parser has errors of its own
        raise ValueError(
            f"{argument}={files!r} cannot be read, or has no rows: {error or type(error).__name__}. A file ending in "
            f"{Path(names[0]).suffix} must hold {_LAYOUTS[str(builder)]}."
        ) from error


def hub_rows(dataset: str, name: str | None, split: str) -> Any:
    """The rows of a data set on the hub, as a ``datasets.IterableDataset``: read while it is used, not downloaded.

    Raises:
        ConnectionError: If it cannot be reached.
    """
    try:
        return require("datasets").load_dataset(dataset, name, split=split, streaming=True)
    except (OSError, ValueError) as error:  # no connection, offline mode, no such data set or split
        raise ConnectionError(
            f"Cannot read the {split} split of {dataset!r}, {name!r}, from the Hugging Face hub: "
            f"{str(error).rstrip('. ')}. "
            "Give local files with data.files=... (JSON lines, Parquet or text) instead."
        ) from error


def first_row(rows: Any, columns: Sequence[str], *, source: str) -> dict[str, Any]:
    """The first row, which must have some columns.

    Args:
        rows: A stream.
        columns: What is needed.
        source: Where the rows are from, for messages.

    Raises:
        ValueError: If there is no row, it cannot be read, or a column is missing.
    """
    try:
        row: dict[str, Any] | None = next(iter(rows), None)
    except Exception as error:  # datasets has an error for each parser
        raise ValueError(f"{source} cannot be read: {error}") from error
    if row is None:
        raise ValueError(f"{source} has no rows: there is nothing to train on.")
    missing = [name for name in columns if name not in row]
    if missing:
        raise ValueError(
            f"{source} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, row))}. Name the "
            "right one with data.text_column=... (data.prompt_column=..., data.response_column=...)."
        )
    return row


def is_held_out(text: str, *, share: float, seed: int) -> bool:
    """Whether a document is validated on instead of trained on.

    The text itself decides, by a hash: whatever the order of the files and the number of readers, and equal documents
    are on one side.

    Args:
        text: The document.
        share: Of the documents that are held out, on average.
        seed: Another seed holds out others.

    Example:
        >>> sum(is_held_out(str(i), share=0.25, seed=0) for i in range(1000))
        242
    """
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") < share * 2**64


class TextColumn:
    """The document in a row, or None where the row belongs to the other side.

    An object and no closure: it is pickled for the workers of a loader.

    Args:
        column: Holds the text.
        share: Held out; None where there is no such split.
        seed: Of the split.
        held_out: Which side this is.
    """

    def __init__(self, column: str, *, share: float | None = None, seed: int = 0, held_out: bool = False) -> None:
        self.column, self.share, self.seed, self.held_out = column, share, seed, held_out

    def __call__(self, row: dict[str, Any]) -> str | None:
        """The text; an empty one stands for no document."""
        text = row[self.column]
        if not text or self.share is None:
            return text or None
        return text if is_held_out(text, share=self.share, seed=self.seed) is self.held_out else None

    def documents(self, rows: Any, most: int | None = None) -> Iterator[str]:
        """The documents of a stream of rows.

        Args:
            rows: A stream.
            most: Documents at most.
        """
        return islice(filter(None, map(self, rows)), most)
