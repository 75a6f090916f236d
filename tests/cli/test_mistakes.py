# SPDX-License-Identifier: Apache-2.0
"""A wrong option, key, class or file is named in a sentence, with what is near, and without a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_galore.cli import GaLoreCLI, main
from lightning_galore.cli.mistakes import check_checkpoint, close_to, explain
from lightning_galore.cli.parsers import Parser, without_marks

GAN = str(Path(__file__).parents[2] / "recipes" / "gan.yaml")


def said(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a command says that must end with status 2 and without a traceback."""
    try:
        status = main(args)
    except SystemExit as end:
        status = end.code  # type: ignore[assignment]
    err = capsys.readouterr().err
    assert status == 2
    assert "Traceback" not in err
    assert "Subtypes" not in err
    assert "<class" not in err
    assert len(err.splitlines()) <= 6
    return err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--trainer.strategy.rnak", "4"], "trainer.strategy (GaLoreStrategy): there is no option 'rnak'."),
        (["--trainer.strategy.rnak", "4"], "Did you mean 'rank'?"),
        (["--trainer.strategy.rank", "wide"], "trainer.strategy.rank (GaLoreStrategy)='wide': expected int, float, "),
        (["--trainer.strategy.mode", "layrwise"], "expected 'step', 'project', 'layerwise'. Did you mean 'layerwise'?"),
        (["--trainer.strategy", "galor"], "trainer.strategy='galor' is not known. Did you mean 'galore' or "),
        (["--trainer.strategy.rank", "0"], "rank=0 must be at least 1"),
        (["--trainer.max_epochs", "x"], "trainer.max_epochs='x': expected int, null."),
        (["--trainer.precision", "bf17"], "Did you mean 'bf16'?"),
        (["--trainer.callbacks", "MemryMonitor"], "there is no class 'MemryMonitor'. Did you mean 'MemoryMonitor'?"),
        (["--model", "RingGann"], "model: there is no class 'RingGann'. Did you mean 'RingGan'?"),
        (["--model.hiden", "3"], "model (RingGan): there is no option 'hiden'. Did you mean 'hidden'?"),
        (["--optimizer", "AdmW"], "Did you mean 'AdamW' or 'Adam'"),
        (["--trainer.max_epoch", "3"], "--trainer.max_epoch 3. Did you mean '--trainer.max_epochs'"),
        (["--trainer.max_epoch=3"], "Did you mean '--trainer.max_epochs'"),
        (["--print_confi"], "Did you mean '--print_config'"),
        (["--ckpt_path", "none.ckpt"], "none.ckpt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert sentence in said(capsys, "fit", "-c", GAN, "--trainer.default_root_dir", str(tmp_path), *options)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"trainer": {"max_epoch": 3}}, "'trainer.max_epoch'. Did you mean 'trainer.max_epochs'"),
        ({"trainr": {"max_epochs": 3}}, "'trainr.max_epochs'. Did you mean 'trainer.max_epochs'"),
        ({"model": {"class_path": "RingGann"}}, "there is no class 'RingGann'. Did you mean 'RingGan'?"),
        (
            {"model": "RingGan", "trainer": {"strategy": {"class_path": "GaLoreStrategy", "init_args": {"rnak": 8}}}},
            "there is no option 'rnak'. Did you mean 'rank'?",
        ),
        ([1, 2], "the configuration file must hold settings (`key: value`), not '- 1'."),
        ("", "the configuration file must hold settings"),
        ("a: [1\n b", "while parsing a flow sequence"),
    ],
    ids=["key", "top key", "class", "setting", "a list", "empty", "broken"],
)
def test_recipes(content: object, sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    assert sentence in said(capsys, "fit", "-c", str(path))


def test_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    # A file where a folder is needed stands for a folder that may not be written to, which root may always.
    into = ["--trainer.default_root_dir", str(tmp_path / "file")]
    assert "Not a directory" in said(capsys, "fit", "-c", GAN, *into, "--trainer.enable_model_summary=false")
    assert "is not a folder" in said(capsys, "report", str(tmp_path / "none"))
    assert "does not exist" in said(capsys, "convert", str(tmp_path / "none"), str(tmp_path / "new"))
    assert "does not exist" in said(capsys, "export", str(tmp_path / "none"), str(tmp_path / "new"))
    assert "llama-60m" in said(capsys, "plan", "llama-60")


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_that_is_not_there_is_missed_before_anything_is_made(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(self: object) -> None:
        raise AssertionError("made before the checkpoint was looked for")

    monkeypatch.setattr(GaLoreCLI, "instantiate_classes", unwanted)
    (tmp_path / "last.ckpt").touch()
    wrong = str(tmp_path / "lats.ckpt")
    err = said(capsys, command, "-c", GAN, "--ckpt_path", wrong)
    assert f"ckpt_path='{wrong}': there is no such file or folder. Did you mean '{tmp_path / 'last.ckpt'}'?" in err
    assert "There is " in said(capsys, command, "-c", GAN, "--ckpt_path", str(tmp_path / "epoch=9.ckpt"))
    assert "Nor is there a folder" in said(capsys, command, "-c", GAN, "--ckpt_path", str(tmp_path / "no" / "a.ckpt"))


@pytest.mark.parametrize("given", [None, "last", "best", "hpc", "registry:a:b", "s3://bucket/a.ckpt"])
def test_what_lightning_looks_for_itself_is_left_to_it(given: str | None) -> None:
    check_checkpoint(given)


def test_files_and_folders_of_checkpoints_pass(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").touch()
    check_checkpoint(tmp_path / "a.ckpt")
    check_checkpoint(str(tmp_path))  # of a run in parts


def test_targets_needs_no_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Though the configuration that a run has saved may name one, which is gone since."""
    (tmp_path / "saved.yaml").write_text(Path(GAN).read_text() + "\nckpt_path: gone.ckpt\n")
    assert main(["targets", "-c", str(tmp_path / "saved.yaml")]) == 0
    assert "gone.ckpt" in said(capsys, "validate", "-c", str(tmp_path / "saved.yaml"))


def test_a_recipe_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    err = said(capsys, "fit", "-c", str(Path(GAN).with_name("gann.yaml")))
    assert "there is no file" in err
    assert f"Did you mean '{GAN}'" in err


def test_parse_errors_have_a_traceback_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "-c", GAN, "--trainer.max_epochs", "x", "--traceback"])
    assert "Traceback" in capsys.readouterr().err


def test_an_account_of_another_form_is_shown_as_it_is() -> None:
    parser = Parser(prog="x")
    for message in ("something else", 'Parser key "a":', 'Parser key "a":\n  Errors:\n'):
        assert explain(message, parser) == message


def test_nothing_is_near() -> None:
    assert close_to("zzz", ["rank"]) == ""


def test_marks_are_taken_out_of_help() -> None:
    text = "See :paramref:`~lightning.pytorch.trainer.Trainer.callbacks` and `the notes <https://x.org>`_, ``True``."
    assert without_marks(text) == "See callbacks and the notes (https://x.org), True."
    listed = "known subclasses: torch.optim.SGD, lightning_galore.wrapper.OptimizerWrapper, a.B)"
    assert without_marks(listed) == "known subclasses: SGD, B)"


@pytest.mark.parametrize(
    "command", ["fit", "validate", "test", "predict", "targets", "plan", "convert", "export", "report", "completion"]
)
def test_help_leaks_no_internals(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = capsys.readouterr().out
    for leak in (
        "<class",
        "``",
        ":class:",
        "OptimizerWrapper",
        "NoneType",
        "Base class for",
        "usage: lightning-galore [",
    ):
        assert leak not in text, leak
    assert f"usage: lightning-galore {command}" in text


def test_help_of_the_strategy_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--trainer.strategy.help", "GaLoreStrategy"])
    text = capsys.readouterr().out
    assert "Optimizer steps between two refreshes" in text
    assert "``" not in text
