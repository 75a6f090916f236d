# SPDX-License-Identifier: Apache-2.0
"""What the guides show works: their Python is run in order, their pictures are drawn anew."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GUIDES = ("index", "layerwise", "resuming", "extending")


class Model(BoringModel):
    """A module with projected weights and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential()
        self.body = nn.Linear(32, 32)
        self.head = nn.Linear(32, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf8"), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.filterwarnings("ignore")
def test_python_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # the Trainer logs and saves where it runs
    torch.manual_seed(0)
    model = Model()
    batches = [(torch.randn(4, 32), torch.randn(4, 2)) for _ in range(3)]
    scope: dict[str, Any] = {"model": model, "train_loader": DataLoader(torch.randn(8, 32)), "batches": batches}
    before = model.body.weight.detach().clone()
    found = blocks(DOCS / f"{name}.md", "python")
    assert found
    for block in found:
        model.float()  # each block has its own precision
        exec(compile(block, name, "exec"), scope)
    assert not torch.equal(model.body.weight.detach().to(before.dtype), before)
    if name == "extending":
        assert "step 0: body.weight has rank" in capsys.readouterr().out
    if name == "resuming":
        assert scope["trainer"].global_step == 16


@pytest.mark.parametrize("script", sorted((DOCS / "pictures").glob("*.py")), ids=lambda path: path.stem)
def test_pictures_are_what_their_scripts_draw(script: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location(f"picture_{script.stem}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = tmp_path / "picture.svg"
    module.draw().savefig(path, metadata={"Date": None})
    assert script.with_suffix(".svg").stat().st_size > 10_000
    words = set(re.findall(r"<!-- (.+?) -->", path.read_text("utf8")))
    assert words == set(re.findall(r"<!-- (.+?) -->", script.with_suffix(".svg").read_text("utf8")))
