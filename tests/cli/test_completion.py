# SPDX-License-Identifier: Apache-2.0
"""The completion scripts complete, in the shells that are installed."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from lightning_galore.cli import completion, main

pytest.importorskip("shtab", reason="completion scripts are made with shtab, of the extra `recipes`")


@pytest.fixture(scope="module")
def bash_script() -> str:
    return completion.script("bash")


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last of ``words``."""
    line = " ".join(f"'{word}'" for word in ("lightning-galore", *words))
    program = (
        f"{script}\nCOMP_WORDS=({line}); COMP_CWORD=${{#COMP_WORDS[@]}}; COMP_CWORD=$((COMP_CWORD - 1))\n"
        '_shtab_lightning_galore lightning-galore "${COMP_WORDS[$COMP_CWORD]}" "${COMP_WORDS[$((COMP_CWORD - 1))]}"\n'
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["pl"], "plan"),
        (["fit", "--trainer.max_ep"], "--trainer.max_epochs"),
        (["fit", "--trainer.strategy.update"], "--trainer.strategy.update_proj_gap"),
        (["fit", "--trainer.strategy.mode", "lay"], "layerwise"),
        (["fit", "--trainer.strategy", "galore_f"], "galore_fsdp2"),
        (["targets", "--model", "Glue"], "GlueModule"),
        (["fit", "--trainer.callbacks", "Subspace"], "SubspaceScheduler"),
        (["fit", "--optimizer", "NA"], "NAdam"),
        (["plan", "llama-7b", "--bud"], "--budget"),
        (["export", "--dtype", "b"], "bf16"),
        (["completion", "zs"], "zsh"),
    ],
    ids=" ".join,
)
def test_bash(words: list[str], offered: str, bash_script: str) -> None:
    assert offered in completed(bash_script, *words)


def test_every_shell_has_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("#compdef lightning-galore")
    assert "--trainer.strategy.update_proj_gap" in out
    assert "complete lightning-galore" in completion.script("tcsh")


def test_without_shtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(completion, "find_spec", lambda name: None)
    assert main(["completion", "bash"]) == 2
    assert 'pip install "lightning-galore[recipes]"' in capsys.readouterr().err
