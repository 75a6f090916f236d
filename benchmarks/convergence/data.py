# SPDX-License-Identifier: Apache-2.0
"""The text: sources of Python's standard library by default, as bytes, split into training and validation by file."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Written out, so that the text does not grow with what an interpreter happens to ship. It still differs between
# versions of Python: a table compares runs of one text only, and records its hash.
_MODULES = (
    "argparse ast asyncio base64 bdb calendar cmd code codecs collections concurrent configparser contextlib copy "
    "csv ctypes dataclasses difflib dis doctest email enum fileinput fnmatch fractions ftplib functools gettext "
    "glob graphlib gzip hashlib heapq html http imaplib importlib inspect ipaddress json linecache locale logging "
    "mailbox mimetypes multiprocessing ntpath optparse os pathlib pdb pickle pickletools pkgutil platform "
    "plistlib poplib posixpath pprint profile pstats pydoc queue random re sched selectors shelve shlex shutil "
    "site smtplib socket socketserver sqlite3 ssl statistics string subprocess symtable sysconfig tarfile "
    "tempfile textwrap threading timeit tokenize trace traceback tracemalloc turtle types typing unittest urllib "
    "uuid venv warnings wave weakref webbrowser wsgiref xml zipapp zipfile zipimport zoneinfo "
)
_TEST_FOLDERS = {"test", "tests", "idle_test", "__pycache__"}
_VALIDATION_SHARE = 10  # one file in ten, or the last tenth of a single file


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """Bytes to learn from and bytes to be judged by.

    Args:
        name: Where the text is from.
        train: uint8 ``(n,)``.
        validation: uint8 ``(k,)``, of other files than ``train``.
        sha256: Of both, in this order.
        files: How many files it was made of.
    """

    name: str
    train: Tensor
    validation: Tensor
    sha256: str
    files: int

    def facts(self) -> dict[str, str | int]:
        """What the results record of the text."""
        return {
            "name": self.name,
            "files": self.files,
            "train_bytes": self.train.numel(),
            "validation_bytes": self.validation.numel(),
            "sha256": self.sha256,
        }


def load_text(path: Path | None = None) -> Text:
    """Read the text.

    Args:
        path: A file, whose last tenth is for validation; or a folder, all files of which are read; or None for the
            standard library of the running interpreter, without its tests.

    Raises:
        ValueError: If there is nothing to read, or no file falls to validation.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        return _by_file(f"standard library of Python {platform.python_version()}", root, _library_files(root))
    if path.is_file():
        content = path.read_bytes()
        cut = len(content) - len(content) // _VALIDATION_SHARE
        return _text(path.name, [content[:cut]], [content[cut:]], files=1)
    return _by_file(path.name, path, [file for file in path.rglob("*") if file.is_file()])


def _library_files(root: Path) -> list[Path]:
    files = []
    for module in _MODULES.split():
        files += [root / f"{module}.py", *(root / module).rglob("*.py")]
    return [file for file in files if file.is_file() and not _TEST_FOLDERS & set(file.relative_to(root).parts)]


def _by_file(name: str, root: Path, files: Sequence[Path]) -> Text:
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    named = sorted((file.relative_to(root).as_posix(), file) for file in files)
    for relative, file in named:
        # By a checksum of the name: a file that comes or goes does not move the others to the other side.
        parts[zlib.crc32(relative.encode()) % _VALIDATION_SHARE == 0].append(file.read_bytes())
    return _text(name, parts[False], parts[True], files=len(named))


def _text(name: str, train: Sequence[bytes], validation: Sequence[bytes], *, files: int) -> Text:
    sides = b"\n".join(train), b"\n".join(validation)
    if not all(sides):
        raise ValueError(
            f"text={name!r} gives {len(sides[0])} bytes to train on and {len(sides[1])} for validation; "
            "name a file, or a folder of some dozens of files."
        )
    digest = hashlib.sha256(b"\0".join(sides)).hexdigest()
    tensors = [torch.frombuffer(bytearray(side), dtype=torch.uint8) for side in sides]
    return Text(name=name, train=tensors[0], validation=tensors[1], sha256=digest, files=files)


def windows(text: Tensor, *, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Random windows of the text, without end, the same for the same seed.

    Args:
        text: uint8 ``(n,)``.
        batch: Windows at once.
        length: Bytes to predict in each.
        seed: Of their places.

    Yields:
        int64 ``(batch, length + 1)``.

    Raises:
        ValueError: If the text is shorter than one window.
    """
    if text.numel() < length + 1:
        raise ValueError(f"text of {text.numel()} bytes is shorter than length={length} + 1; give a longer text.")
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length + 1)
    while True:
        starts = torch.randint(text.numel() - length, (batch, 1), generator=generator)
        yield text[starts + offsets].long()
