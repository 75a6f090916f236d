# SPDX-License-Identifier: Apache-2.0
"""Wheel and sdist hold what is needed and nothing else, and the README's programs run from the wheel alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import lightning_galore
from tests.test_project import PROJECT, ROOT
from tests.test_readme import blocks

pytestmark = pytest.mark.wheel
# What a README block finds there: a model and data, as a reader has them.
PREPARE = """
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader

class Model(BoringModel):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(32, 32)

    def forward(self, inputs):
        return self.layer(self.body(inputs))

model, train_loader = Model(), DataLoader(torch.randn(8, 32))
before = model.body.weight.detach().clone()
"""
CHECK = """
import sys
import lightning_galore
assert lightning_galore.__file__.startswith(sys.prefix), lightning_galore.__file__
assert "transformers" not in sys.modules
"""


def run(*command: str | Path, cwd: Path, timeout: int = 1800) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, made from the sdist, and the sdist."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return folder


def wheel_of(dist: Path) -> Path:
    (wheel,) = dist.glob("*.whl")
    return wheel


def test_the_registry_would_take_them(dist: Path) -> None:
    pytest.importorskip("twine")
    run(sys.executable, "-m", "twine", "check", "--strict", *sorted(dist.iterdir()), cwd=dist)


def test_the_wheel_is_the_package(dist: Path) -> None:
    with zipfile.ZipFile(wheel_of(dist)) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        head = HeaderParser().parsestr(archive.read(metadata).decode())
    package = ROOT / "lightning_galore"
    ours = {f"lightning_galore/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    assert set(files) == ours | {"lightning_galore/py.typed"}
    assert head["Version"] == lightning_galore.__version__
    assert head["Requires-Python"] == PROJECT["requires-python"]


def test_the_sdist_is_the_tree_without_what_runs_leave(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers()}
    assert path.stat().st_size < 4e6
    assert {"README.md", "LICENSE", "SECURITY.md", "Makefile", "constraints.txt", "mkdocs.yml", "PKG-INFO"} <= names
    assert {name.partition("/")[0] for name in names if "/" in name} == {
        *("lightning_galore", "tests", "docs", "recipes", "benchmarks", "examples")
    }
    left = re.compile(r"__pycache__|\.pyc$|\.ckpt$|lightning_logs|(^|/)\.(?!gitignore)|\.egg-info")
    assert [name for name in names if left.search(name)] == []


def test_the_readme_runs_from_the_wheel(dist: Path, tmp_path: Path) -> None:
    """In an environment of its own, outside of the clone, with the pinned versions and no extra."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, "-c", ROOT / "constraints.txt", wheel_of(dist), cwd=tmp_path)
    programs = blocks("python")
    assert len(programs) == 2
    for number, program in enumerate(programs):
        script = tmp_path / f"readme_{number}.py"
        step = "model(torch.randn(4, 32)).sum().backward(); optimizer.step()" if "optimizer" in program else ""
        moved = "assert not torch.equal(before, model.body.weight)"
        script.write_text("\n".join([PREPARE, program, step, moved, CHECK]), encoding="utf8")
        run(python, script, cwd=tmp_path)
    command = tmp_path / "venv" / "bin" / "lightning-galore"
    assert "fit" in run(command, "--help", cwd=tmp_path)
