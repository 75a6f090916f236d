# SPDX-License-Identifier: Apache-2.0
"""Every cell of the feature matrix in ``docs/feature-matrix.md`` names a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "feature-matrix.md"
# In a cell: `file::test`; the file stands in tests/modes unless a folder is named.
NAMED = re.compile(r"`(?:([\w/]+\.py)::)?(test_\w+)`")
VERDICTS = ("works", "refused", "warns")


def table(text: str) -> list[list[str]]:
    """The rows of the matrix without its head: feature, then one cell a mode."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head = next(i for i, line in enumerate(lines) if line.startswith("| feature |"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[head + 2 :]]


def names_in(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def errors(rows: list[list[str]]) -> list[str]:
    """What is wrong with the cells."""
    found = []
    for feature, *cells in rows:
        if len(cells) != 3:
            found.append(f"{feature}: {len(cells)} cells")
        for cell in cells:
            names = NAMED.findall(cell)
            if not cell.startswith(VERDICTS) or not names:
                found.append(f"{feature}: {cell!r} says not {VERDICTS} or names no test")
            file = ""
            for named, test in names:
                file = named or file  # a second test of one cell may leave the file out
                path = ROOT / "tests" / (file if "/" in file else f"modes/{file}")
                if not path.is_file() or test not in names_in(path):
                    found.append(f"{feature}: there is no {file}::{test}")
    return found


def test_every_cell_names_a_test() -> None:
    rows = table(PAGE.read_text())
    assert len(rows) >= 25
    assert errors(rows) == []


@pytest.mark.parametrize(
    ("cell", "error"),
    [
        ("works `test_matrix.py::test_nothing`", "there is no test_matrix.py::test_nothing"),
        ("works `test_absent.py::test_matrix`", "there is no test_absent.py::test_matrix"),
        ("works", "names no test"),
        ("perhaps `test_matrix.py::test_every_cell_names_a_test`", "says not"),
    ],
)
def test_a_wrong_cell_is_found(cell: str, error: str) -> None:
    good = "works `test_matrix.py::test_every_cell_names_a_test`"
    assert errors([["clipping", good, good, good]]) == []
    (found,) = errors([["clipping", good, cell, good]])
    assert error in found
