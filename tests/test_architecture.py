# SPDX-License-Identifier: Apache-2.0
"""The rooms of the package: imports point one way, files and functions stay short. CONTRIBUTING.md says why."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "lightning_galore"

# From the user's side down. A room may import rooms of its own line and of lines below.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"cli", "tasks"}),
    frozenset({"__init__"}),  # the public names: what the command line and the tasks use, like any user
    frozenset({"callbacks", "strategies"}),
    frozenset({"planner", "report"}),
    frozenset({"optimizer"}),
    frozenset({"admission", "backward", "fused", "stepping", "watch", "wrapper"}),
    frozenset({"projector", "proxies"}),
    frozenset({"fused_functions", "grad_norms"}),
    frozenset({"low_grad"}),
    frozenset({"agreement"}),
    frozenset({"memory", "refresh", "saved_state", "sharded_state", "turns"}),
    frozenset({"checkpoint_files", "convert", "export", "foreign_state", "state_keys", "trainer_folder", "untrusted"}),
    frozenset({"targets"}),
    frozenset({"transforms"}),
    frozenset({"geometry", "target_table"}),
    frozenset({"coordinates", "lift", "moments", "weights"}),
    frozenset({"change"}),
    frozenset({"sharding"}),
    frozenset({"base_probe", "base_state", "bases", "rank", "schedule", "subspace"}),
    frozenset({"base_rules", "foreign_shards", "named_optimizers"}),
    frozenset({"shards", "storage"}),
    frozenset({"distributed", "linalg"}),
    frozenset({"dtensors", "gemm"}),
)
ANYONE = frozenset({"config"})  # a leaf: may be read from everywhere and imports no other room
DEPTH = {room: depth for depth, rooms in enumerate(LAYERS) for room in rooms} | dict.fromkeys(ANYONE, 99)

# Who may import what from outside. An empty set: nobody.
OUTSIDE: dict[str, frozenset[str]] = {
    "lightning": frozenset({"__init__", "cli", "tasks", "callbacks", "strategies"}),
    "pytorch_lightning": frozenset(),  # the same thing under its old name; the two do not mix
    "transformers": frozenset({"cli", "planner", "tasks"}),
    "datasets": frozenset({"cli", "tasks"}),
    "rich": frozenset({"cli", "planner", "tasks"}),
    "matplotlib": frozenset({"report"}),
    "tensorboard": frozenset({"report"}),
    "bitsandbytes": frozenset({"base_state", "named_optimizers"}),
    "torchao": frozenset({"named_optimizers"}),
    "galore_torch": frozenset(),
}

MAX_FILE, LONG_FILE, MAX_FUNCTION = 400, 300, 80
HEADER = "# SPDX-License-Identifier: Apache-2.0"
# Paths of somebody's machine, in a file that everybody gets.
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:work|opt|tmp|root|home|Users)/|\.\./shared\b|file:///")
TEXT_FILES = ("*.py", "*.toml", "*.md", "*.yaml", "*.yml", "*.txt", "*.cfg", "Makefile", "run", ".gitignore")


def sources() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def tracked_texts() -> list[Path]:
    hidden = {".git", ".venv", ".venv-oldest", "data", "runs", "build", "dist", "site", "__pycache__"}
    return sorted(
        path
        for pattern in TEXT_FILES
        for path in ROOT.rglob(pattern)
        if path.is_file()
        and not any(part in hidden or part.endswith("_cache") for part in path.relative_to(ROOT).parts)
    )


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def imported(source: str) -> Iterator[tuple[str, int]]:
    """Every dotted name that a file imports, wherever the import stands, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def rooms_imported(source: str) -> Iterator[tuple[str, int]]:
    for name, line in imported(source):
        parts = name.split(".")
        if parts[0] == PACKAGE:
            yield (parts[1] if len(parts) > 1 and (parts[1] in DEPTH or len(parts) > 2) else "__init__"), line


def import_errors(source: str, room: str) -> list[str]:
    """What is wrong with the imports of a file that stands in ``room``."""
    if room not in DEPTH:
        return [f"{room} has no place yet: add it to LAYERS in this test and to CONTRIBUTING.md"]
    errors = [
        f"line {line}: {room} imports {other}, which is not below it"
        for other, line in rooms_imported(source)
        if other != room and (DEPTH.get(other, -1) < DEPTH[room] or room in ANYONE)
    ]
    for name, line in imported(source):
        top = name.split(".")[0]
        if not top:
            errors.append(f"line {line}: {room} imports {name} relatively; write the whole name")
        elif top in OUTSIDE and room not in OUTSIDE[top]:
            errors.append(f"line {line}: {room} imports {top}; only {sorted(OUTSIDE[top]) or 'nobody'} may")
    return errors


def long_functions(source: str) -> list[str]:
    return [
        f"line {node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    ]


def prints(source: str) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A cycle of ``graph``, or an empty list."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        done.add(node)
        return next((found for after in sorted(graph.get(node, ())) if (found := visit(after, [*path, node]))), [])

    return next((found for start in sorted(graph) if (found := visit(start, []))), [])


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_keeps_to_its_room(path: Path) -> None:
    source = path.read_text()
    assert import_errors(source, room_of(path)) == []
    assert long_functions(source) == []
    assert prints(source) == [], "use logging, rank_zero_info or, in the command line, sys.stdout.write"


def test_rooms_form_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in sources():
        room = room_of(path)
        graph.setdefault(room, set()).update(other for other, _ in rooms_imported(path.read_text()) if other != room)
    graph["tasks"].discard("cli")  # tasks/demo.py is a script that runs the command line; nothing imports it
    assert cycle(graph) == []


@pytest.mark.filterwarnings("default:.*consider splitting it:UserWarning")
def test_files_are_short() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in sources()}
    for name, length in lengths.items():
        if length > LONG_FILE:
            warnings.warn(f"{name} has {length} lines; consider splitting it", stacklevel=1)
    assert {name: length for name, length in lengths.items() if length > MAX_FILE} == {}


def test_every_python_file_names_its_licence() -> None:
    files = [path for path in tracked_texts() if path.suffix == ".py"]
    assert len(files) > 20
    assert [str(path.relative_to(ROOT)) for path in files if not path.read_text().startswith(HEADER)] == []


def test_no_file_names_a_path_of_one_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked_texts()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


# -- each of these rules can fail --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "room", "error"),
    [
        ("from lightning_galore.optimizer import GaLoreOptimizer", "subspace", "optimizer, which is not below"),
        ("from lightning_galore import optimizer", "lift", "optimizer, which is not below"),
        ("import lightning_galore.strategies.base", "memory", "strategies, which is not below"),
        ("from lightning_galore import GaLoreOptimizer", "strategies", "__init__, which is not below"),
        ("def f():\n    from lightning_galore.cli import main", "linalg", "line 2: linalg imports cli"),
        ("from lightning_galore.linalg import overlap", "config", "linalg, which is not below"),
        ("from lightning_galore.novelty import x", "cli", "novelty, which is not below"),
        ("from . import linalg", "storage", "relatively"),
        ("import lightning", "optimizer", "imports lightning"),
        ("from lightning.pytorch import Trainer", "convert", "imports lightning"),
        ("import transformers.models", "strategies", "imports transformers"),
        ("try:\n    import bitsandbytes\nexcept ImportError:\n    pass", "cli", "bitsandbytes; only ['base_state', "),
        ("from galore_torch import GaLoreAdamW", "convert", "imports galore_torch"),
        ("x = 1", "novelty", "has no place"),
    ],
)
def test_a_wrong_import_is_found(source: str, room: str, error: str) -> None:
    errors = import_errors(source, room)
    assert len(errors) == 1
    assert error in errors[0]


@pytest.mark.parametrize(
    ("source", "room"),
    [
        ("from lightning_galore.config import GaLoreConfig", "linalg"),
        ("from lightning_galore import linalg, storage", "subspace"),
        ("from lightning_galore.subspace.base import Subspace", "subspace"),
        ("from lightning_galore.targets import Target", "optimizer"),
        ("from lightning_galore import GaLoreStrategy", "cli"),
        ("import lightning", "strategies"),
        ("import torch", "linalg"),
    ],
)
def test_a_right_import_is_not(source: str, room: str) -> None:
    assert import_errors(source, room) == []


def test_the_other_rules_can_fail() -> None:
    assert long_functions("def f():\n" + "    x = 1\n" * MAX_FUNCTION) == ["line 1: f has 81 lines"]
    assert prints("def f():\n    print(1)") == [2]
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}}) == []
    for bad in ("cd /tmp/x", "`/home/me/data`", "see ../shared/notes", "file:///x", '"/root/.cache"'):
        assert MACHINE_PATH.search(bad)
    for good in ("https://example.org/home/x", "work/opt", "torch.opt/tmp/", "~/tmp/x"):
        assert not MACHINE_PATH.search(good)
