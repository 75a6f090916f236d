# SPDX-License-Identifier: Apache-2.0
"""What the README shows works: its Python is run. tests/docs/test_commands.py runs its commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    lines = (line for block in blocks("bash") for line in block.splitlines())
    parts = (part for line in lines for part in line.split("#")[0].split("&&"))
    return [shlex.split(part) for part in parts if part.strip()]


class Model(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 16)


@pytest.mark.parametrize("block", blocks("python"))
@pytest.mark.filterwarnings("ignore")
def test_python_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the Trainer logs and saves where it runs
    scope = {"model": Model(), "train_loader": DataLoader(torch.randn(8, 32))}
    exec(block, scope)
    assert "trainer" in scope or "optimizer" in scope


def test_there_is_something_to_check() -> None:
    assert len(blocks("python")) == 2
    assert {command[0] for command in commands()} >= {"make", "lightning-galore", "pip"}


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_the_tree_is_the_tree() -> None:
    (tree,) = (block for block in blocks("text") if "optimizer.py" in block)
    shown = set(re.findall(r"^  (\S+)\s", tree, flags=re.MULTILINE))
    package = {path.name + ("/" if path.is_dir() else "") for path in (ROOT / "lightning_galore").iterdir()}
    read = {"foreign_state.py", "trainer_folder.py", "untrusted.py", "checkpoint_files.py"}
    folded = {"__init__.py", "__pycache__/", "py.typed"} | read
    assert shown == package - folded
