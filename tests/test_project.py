# SPDX-License-Identifier: Apache-2.0
"""The files around the package agree with each other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import metadata, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lightning_galore

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = ("bnb", "lora", "recipes", "test", "docs", "dist")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[0-9][^+*]*", str(pin.specifier)) for pin in found)
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in found}


def test_version_is_said_once_and_is_the_same_everywhere() -> None:
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", lightning_galore.__version__)
    assert version("lightning-galore") == lightning_galore.__version__, "run `make` again after a change of version"


def test_changelog_has_room_for_what_comes_next() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\]", text, flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    released = headings[1:]
    assert not released or released[0] == lightning_galore.__version__


def test_constraints_pin_plain_versions() -> None:
    assert pins()["torch"] == "2.13.0"  # no local build such as +cpu: not every index has it
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text
    assert " @ " not in text


def test_every_dependency_has_a_lower_bound_and_a_pin_within_it() -> None:
    names = pins()
    extras = PROJECT["optional-dependencies"]
    installed = [*PROJECT["dependencies"], *(line for name in EXTRAS for line in extras[name])]
    for requirement in map(Requirement, installed):
        assert any(bound.operator in (">=", "==") for bound in requirement.specifier), requirement
        assert requirement.marker is not None or requirement.specifier.contains(names[requirement.name]), requirement


def test_core_dependencies_stay_few() -> None:
    needed = {Requirement(line).name for line in requires("lightning-galore") or [] if "extra ==" not in line}
    assert needed == {"torch", "lightning", "torchmetrics", "jsonargparse"}  # typing-extensions comes with torch


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", ".ci/run", ".github/workflows/ci.yml"])
def test_make_targets_in_the_texts_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    code = re.findall(r"`(make[^`]*)`|^\s*(?:\$ |- run: |run: )?(make .*)$", text, flags=re.MULTILINE)
    words = [word for pair in code for word in "".join(pair).partition("#")[0].split()[1:]]
    named = {word for word in words if re.fullmatch(r"[a-z][a-z-]*", word)}
    assert named, f"{name} names no make target"
    assert named <= TARGETS, f"{sorted(named - TARGETS)} are not targets of the Makefile"


def test_every_target_says_what_it_does() -> None:
    named = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, flags=re.MULTILINE)[0].split()
    assert set(named) == TARGETS
    described = re.findall(r"^([a-z-]+):.*## \S", MAKEFILE, flags=re.MULTILINE)
    assert sorted(described) == sorted(named)


def test_ci_script_runs_lint_and_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make lint", "make test"]
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)


def test_package_is_typed_and_licensed() -> None:
    assert (ROOT / "lightning_galore" / "py.typed").exists()
    assert metadata("lightning-galore")["License-Expression"] == "Apache-2.0"
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
