# SPDX-License-Identifier: Apache-2.0
"""``lightning-galore export``: int8 weights of a checkpoint, decoded for any program; wrong files change nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_galore.cli import main
from lightning_galore.export import ExportReport, export_weights
from lightning_galore.untrusted import ConversionError
from tests.strategies.modules import BATCHES, PROJECTED, Tiny, adamw, fit, galore, loader, make_trainer
from tests.strategies.test_resume import Wide

from .common import INT8_INT4, assert_same_states, decoded

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")

NAME = "epoch=0-step=6.ckpt"


class Loadable(Wide):
    """As users write it: everything that it needs is saved with it."""

    def __init__(self, width: int = 3) -> None:
        super().__init__(adamw)
        self.save_hyperparameters()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    fit(Loadable(), galore(**INT8_INT4), callbacks=[ModelCheckpoint(folder)], enable_checkpointing=True)
    return folder


@pytest.fixture
def source(run_folder: Path) -> Path:
    return run_folder / NAME


def read(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True))


def test_weights_are_decoded_exactly_and_the_rest_is_copied(source: Path, tmp_path: Path) -> None:
    report = export_weights(source, tmp_path / "new.ckpt")
    old, new = read(source), read(tmp_path / "new.ckpt")
    assert old.keys() == new.keys()
    before, after = old.pop("state_dict"), new.pop("state_dict")
    assert set(after) == {key for key in before if not key.endswith("_absmax")}
    for key, value in after.items():
        assert torch.equal(value, decoded(before, key) if key in PROJECTED else before[key])
        assert value.dtype == torch.float32
    assert str(old) == str(new)
    entries = 256 * 8 + 12 * 256
    rest = sum(value.numel() for value in after.values()) - entries
    scales = 2 * (256 * 8 + 12 * 256) // 256
    expected = ExportReport(decoded=2, bytes_before=entries + scales + 4 * rest, bytes_after=4 * (entries + rest))
    assert report == expected
    assert str(report) == f"2 int8 weights decoded; weights: {report.bytes_before:,} bytes before, 21,856 after"


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_dtypes(name: Any, dtype: torch.dtype, source: Path, tmp_path: Path) -> None:
    export_weights(source, tmp_path / "new.ckpt", dtype=name)
    before, after = read(source)["state_dict"], read(tmp_path / "new.ckpt")["state_dict"]
    assert torch.equal(after[PROJECTED[0]], decoded(before, PROJECTED[0], dtype))
    assert after["head.weight"].dtype == torch.float32


def test_the_exported_file_is_a_checkpoint_like_any_other(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Loadable.load_from_checkpoint(source)
    export_weights(source, tmp_path / "new.ckpt")
    loaded = Loadable.load_from_checkpoint(tmp_path / "new.ckpt")
    assert_same_states(loaded.state_dict(), read(tmp_path / "new.ckpt")["state_dict"])
    (ours,) = make_trainer("auto").validate(loaded, loader(2), verbose=False)
    (theirs,) = make_trainer(galore(**INT8_INT4)).validate(Loadable(), loader(2), ckpt_path=source, verbose=False)
    assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_training_goes_on_from_the_exported_file(source: Path, tmp_path: Path) -> None:
    export_weights(source, tmp_path / "new.ckpt")
    runs = []
    for path in (source, tmp_path / "new.ckpt"):  # the strategy decodes the former by itself
        model = Loadable()
        saver: dict[str, Any] = {"callbacks": [ModelCheckpoint(tmp_path / "next")], "enable_checkpointing": True}
        trainer = fit(model, galore(basis_storage="int4"), max_epochs=2, ckpt_path=path, **saver)
        assert trainer.global_step == 2 * BATCHES
        runs.append(model.state_dict())
        assert len(model.losses) == BATCHES
    assert_same_states(*runs)


@pytest.mark.parametrize("key", [None, "model"])
def test_other_files_that_hold_a_state_dict(key: str | None, source: Path, tmp_path: Path) -> None:
    state = read(source)["state_dict"]
    torch.save(state if key is None else {key: state, "step": 3}, tmp_path / "old.pt")
    export_weights(tmp_path / "old.pt", tmp_path / "new.pt")
    new = read(tmp_path / "new.pt")
    assert torch.equal((new if key is None else new[key])[PROJECTED[1]], decoded(state, PROJECTED[1]))
    assert key is None or new["step"] == 3


# -- what is refused ---------------------------------------------------------------------------------------------------


def damage(**changes: Any) -> Callable[[dict[str, Any]], object]:
    key = PROJECTED[0]

    def change(checkpoint: dict[str, Any]) -> object:
        state = checkpoint["state_dict"]
        state.update({f"{key}{name}": value(state[f"{key}{name}"]) for name, value in changes.items()})
        return checkpoint

    return change


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "too few scales": (damage(_absmax=lambda old: old[:-1]), r"is damaged: the int8 codes of body\.0\.weight"),
    "scales of another type": (damage(_absmax=lambda old: old.int()), "is damaged"),
    "NaN": (damage(_absmax=lambda old: old * torch.nan), "is damaged"),
    "a negative scale": (damage(_absmax=lambda old: -old), "is damaged"),
    "codes cut off": (lambda ckpt: damage(**{"": lambda old: old[:5]})(ckpt), "is damaged"),
    "no codes": (lambda ckpt: Tiny().state_dict(), "has no int8 weights, so there is nothing to export"),
    "no dictionary": (lambda ckpt: [1, 2], "holds a list, not a dictionary"),
    "a model": (lambda ckpt: {"model": nn.Linear(2, 2)}, "was not loaded"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_wrong_files_are_one_line_and_nothing_is_written(
    kind: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = DAMAGES[kind]
    path, target = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    torch.save(change(read(source)), path)
    with pytest.raises(ConversionError, match=message) as caught:
        export_weights(path, target)
    assert "\n" not in str(caught.value)
    target.write_bytes(b"mine")
    assert main(["export", str(path), str(target), "--overwrite=true"]) == 2
    assert capsys.readouterr().err.startswith(f"lightning-galore: error: {caught.value}"[:60])
    assert target.read_bytes() == b"mine"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["new.ckpt", "old.ckpt"]


def test_a_file_that_is_cut_off(source: Path, tmp_path: Path) -> None:
    whole = source.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1000):
        (tmp_path / "old.ckpt").write_bytes(whole[:size])
        with pytest.raises(ConversionError, match="cannot be read|was not loaded"):
            export_weights(tmp_path / "old.ckpt", tmp_path / "new.ckpt")
    assert [one.name for one in tmp_path.iterdir()] == ["old.ckpt"]


def test_paths_that_cannot_be(source: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken.ckpt"
    taken.write_bytes(b"mine")
    cases: list[tuple[Path, Path, type[Exception], str]] = [
        (tmp_path / "none.ckpt", tmp_path / "new.ckpt", FileNotFoundError, "does not exist"),
        (tmp_path, tmp_path / "new.ckpt", ConversionError, "is a folder"),
        (source, tmp_path, ConversionError, "give the name of a file in it"),
        (source, tmp_path / "none" / "new.ckpt", FileNotFoundError, "make it first"),
        (source, taken, FileExistsError, "overwrite=True"),
    ]
    for old, new, error, message in cases:
        with pytest.raises(error, match=message):
            export_weights(old, new)
        assert main(["export", str(old), str(new)]) == 2
    assert taken.read_bytes() == b"mine"
    assert [one.name for one in tmp_path.iterdir()] == ["taken.ckpt"]


def test_a_write_that_fails_leaves_the_old_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "new.ckpt"
    target.write_bytes(b"mine")
    save = torch.save

    def full(obj: Any, file: Any) -> None:
        save(obj, file)
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        export_weights(source, target, overwrite=True)
    assert target.read_bytes() == b"mine"
    assert [one.name for one in tmp_path.iterdir()] == ["new.ckpt"]


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new.ckpt"
    assert main(["export", str(source), str(target), "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out.startswith("2 int8 weights decoded; weights: ")
    assert read(target)["state_dict"][PROJECTED[0]].dtype == torch.bfloat16
    assert main(["export", str(source), str(target)]) == 2
    assert "exists. Choose another name" in capsys.readouterr().err
    other_name = tmp_path / "other.ckpt"
    os.link(target, other_name)
    assert main(["export", str(source), str(target), "--overwrite", "true"]) == 0
    # The old file was replaced as a whole, not written over.
    assert read(other_name)["state_dict"][PROJECTED[0]].dtype == torch.bfloat16
    assert read(target)["state_dict"][PROJECTED[0]].dtype == torch.float32
    assert source.stat().st_mode == target.stat().st_mode


def test_help_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["export", "--help"], ["--help"]):
        with pytest.raises(SystemExit) as end:
            main(args)
        assert end.value.code == 0
        said = capsys.readouterr().out
        assert "export" in said
    with pytest.raises(SystemExit) as end:
        main(["export", "--help"])
    said = capsys.readouterr().out
    assert all(word in said for word in ("source", "target", "--dtype", "--overwrite", "fp32"))
    with pytest.raises(SystemExit) as end:
        main(["export", "a", "b", "--dtype", "int3"])
    assert end.value.code == 2
