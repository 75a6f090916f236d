# SPDX-License-Identifier: Apache-2.0
"""GLUE tasks from local files: CSV, TSV, JSON, JSON lines, Parquet and the layouts of the original releases."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from lightning_galore.tasks.demo_data import DEMO_ARCHIVE, download_command, read_demo_archive
from lightning_galore.tasks.extras import require
from lightning_galore.tasks.glue_tasks import COLUMN_ALIASES, GlueTask

Table: TypeAlias = Any  # a pandas.DataFrame; pandas ships no types and is imported when a file is read

UNLABELLED = -1  # what the hub's GLUE writes where the label is kept secret

_TABLES = (".tsv", ".txt", ".csv", ".json", ".jsonl", ".parquet")
# Each entry is one way to ship a split; the files of an entry belong together and are read one after the other.
_FILE_NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "train": (("train",), ("in_domain_train",), ("msr-para-train",), ("msr_paraphrase_train",)),
    "validation": (
        ("validation",),
        ("dev",),
        ("val",),
        ("in_domain_dev", "out_of_domain_dev"),
        ("msr-para-val",),
    ),
    "validation_matched": (("validation_matched",), ("dev_matched",)),
    "validation_mismatched": (("validation_mismatched",), ("dev_mismatched",)),
    "test": (("test",), ("msr-para-test",), ("msr_paraphrase_test",)),
    "test_matched": (("test_matched",),),
    "test_mismatched": (("test_mismatched",),),
}


def find_split(folder: Path, split: str, task: GlueTask) -> list[Path]:
    """Find the files of a split by their usual names; an empty list when there are none.

    Raises:
        ValueError: If several files could be the split.
    """
    archive = folder / DEMO_ARCHIVE
    if task.name == "demo" and split == "train" and archive.is_file():
        return [archive]
    found = []
    for stems in _FILE_NAMES[split]:
        paths = [path for stem in stems for suffix in _TABLES if (path := folder / f"{stem}{suffix}").is_file()]
        if paths:
            found.append((stems, paths))
    if len(found) > 1 or any(len(paths) > len(stems) for stems, paths in found):
        names = ", ".join(path.name for _, paths in found for path in paths)
        raise ValueError(
            f"data_dir={str(folder)!r} holds several files that could be the {split} split: {names}. "
            f"Name the ones to read with {split.partition('_')[0]}_file=..."
        )
    return found[0][1] if found else []


def missing_train_message(folder: Path, task: GlueTask) -> str:
    """What to tell a user whose ``data_dir`` holds no training file."""
    names = sorted(f"{stem}{_TABLES[0]}" for stems in _FILE_NAMES["train"] for stem in stems)
    remedy = f"Download the demo data with: {download_command(folder)}" if task.name == "demo" else ""
    return (
        f"data_dir={str(folder)!r} holds no training file for task={task.name!r}: looked for {', '.join(names)} "
        f"(also {', '.join(_TABLES[1:])}). {remedy or 'Name the file with train_file=...'}"
    )


def read_rows(paths: Sequence[Path], task: GlueTask, *, labelled: bool = True) -> Table:
    """Read one split into a table with the task's text columns and ``label``.

    Args:
        paths: The files, read one after the other.
        task: The task, which says what columns there are and which labels.
        labelled: Whether a missing label column is an error; without one every label is ``UNLABELLED``.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file cannot be read, lacks a column or holds an unknown label.
    """
    pandas = require("pandas")
    return pandas.concat([_read_file(path, task, labelled) for path in paths], ignore_index=True)


def _read_file(path: Path, task: GlueTask, labelled: bool) -> Table:
    pandas = require("pandas")
    if not path.is_file():
        remedy = f" Download it with: {download_command(path.parent)}" if path.name == DEMO_ARCHIVE else ""
        raise FileNotFoundError(f"The data file {str(path)!r} does not exist (task={task.name!r}).{remedy}")
    if path.name.endswith(".tar.gz"):
        if task.name != "demo":
            raise ValueError(f"{path} is an archive, which only task='demo' reads; unpack it for task={task.name!r}.")
        return pandas.DataFrame(read_demo_archive(path), columns=["sentence", "label"])
    table = _rename_columns(_read_table(path, task), task)
    wanted = (*task.text, "label") if labelled else task.text
    missing = [name for name in wanted if name not in table.columns]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(map(repr, missing))}, which task={task.name!r} needs; "
            f"it has {', '.join(map(repr, map(str, table.columns)))}. Rename the column, or choose another task."
        )
    labels = _parse_labels(table["label"], task, path, labelled) if "label" in table.columns else UNLABELLED
    return table[list(task.text)].astype(str).assign(label=labels)


def _read_table(path: Path, task: GlueTask) -> Table:
    pandas = require("pandas")
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return pandas.read_parquet(path)
        if suffix in (".json", ".jsonl"):
            return pandas.read_json(path, lines=suffix == ".jsonl", dtype=False, encoding="utf-8-sig")
        if suffix in (".tsv", ".txt"):
            # Quotation marks are text in GLUE's TSV files: read as quotes they merge rows without a word.
            options: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE}
        elif suffix == ".csv":
            options = {"sep": ","}
        else:
            raise ValueError(f"the suffix {suffix!r} is not one of {', '.join(_TABLES)}")
        # "NA" and "null" are words here, not missing values; a byte-order mark is not part of the first name.
        options |= {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
        first = pandas.read_csv(path, header=None, nrows=1, **options).iloc[0].tolist()
        if _is_header(first, task):
            return pandas.read_csv(path, **options)
        names = next((names for names in task.headerless if len(names) == len(first)), None)
        if names is None:
            raise ValueError(
                f"its first line {first} is no header of task={task.name!r} (columns {', '.join(task.text)}, label) and"
                f" no headerless layout of {len(first)} columns is known; add a header line"
            )
        return pandas.read_csv(path, header=None, names=list(names), **options)
    except ValueError as error:  # pandas' parser errors, bad JSON and bad UTF-8 are all ValueErrors
        raise ValueError(f"Cannot read {path}: {error}") from error


def _is_header(cells: list[str], task: GlueTask) -> bool:
    known = {name for column in (*task.text, "label") for name in (column, *COLUMN_ALIASES.get(column, ()))}
    return any(cell.strip().lower() in known for cell in cells)


def _rename_columns(table: Table, task: GlueTask) -> Table:
    lower = {str(name).strip().lower(): name for name in table.columns}
    renames = {}
    for wanted in (*task.text, "label"):
        names = (name for name in (wanted, *COLUMN_ALIASES.get(wanted, ())) if name in lower)
        if (found := next(names, None)) is not None:
            renames[lower[found]] = wanted
    return table.rename(columns=renames)


def _parse_labels(column: Any, task: GlueTask, path: Path, labelled: bool) -> list[int] | list[float]:
    """Turn labels as they are written (number, digit string or class name) into class indices or scores."""
    values = [str(value).strip().lower() for value in column]
    if task.is_regression:
        return _parse_scores(values, task, path, labelled)
    codes = {name: index for index, name in enumerate(task.labels)}
    codes |= {str(index): index for index in range(len(task.labels))}
    if not labelled:
        codes |= {"": UNLABELLED, str(UNLABELLED): UNLABELLED}
    for row, value in enumerate(values, start=1):
        if value not in codes:
            raise ValueError(
                f"{path}: unknown label {value[:40]!r} in data row {row}. task={task.name!r} has the labels "
                f"{', '.join(f'{index} ({name})' for index, name in enumerate(task.labels))}."
            )
    return [codes[value] for value in values]


def _parse_scores(values: list[str], task: GlueTask, path: Path, labelled: bool) -> list[float]:
    scores = []
    for row, value in enumerate(values, start=1):
        try:
            scores.append(float(value if value or labelled else UNLABELLED))
        except ValueError as error:
            raise ValueError(
                f"{path}: unknown label {value[:40]!r} in data row {row}. task={task.name!r} has numbers as labels."
            ) from error
    return scores
