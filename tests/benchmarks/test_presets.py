# SPDX-License-Identifier: Apache-2.0
"""The comparison of presets: each is in it as it comes, a GLUE task is learnt, tables are what the runs say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks import choosing, presets
from benchmarks.convergence import __main__ as command
from benchmarks.convergence import glue
from benchmarks.convergence.model import matrices
from benchmarks.convergence.runner import Schedule, Spec
from benchmarks.convergence.variants import PRESETS, VARIANTS, config_of, why_not
from benchmarks.options import Options
from lightning_galore.config import AUTO, METHODS
from tests.tasks.tiny import build_tiny_model, write_pairs

ROOT = Path(__file__).parents[2]
#: What a run of some hundred steps must say otherwise than a preset.
SCALED = {"update_proj_gap", "random_after", "reset_gap", "reset_warmup", "head_size"}


def test_every_preset_is_compared() -> None:
    assert set(METHODS) - {"tensor-galore"} == set(PRESETS) - {"adamw", "adamw-8bit", "default"}
    assert all(VARIANTS[name].settings.get("method", name) == name for name in PRESETS if name in METHODS)


@pytest.mark.parametrize("method", [name for name in PRESETS if name in METHODS])
def test_a_preset_is_compared_as_it_comes(method: str) -> None:
    variant = VARIANTS[method].of_length(400)
    config = config_of(variant, rank=32)
    assert config is not None
    for axis, wanted in {**AUTO, **METHODS[method]}.items():
        if axis not in SCALED | ({"rank", "scale"} - METHODS[method].keys()):
            assert getattr(config, axis) == wanted, axis
    if "update_proj_gap" in METHODS[method]:
        assert config.update_proj_gap == METHODS[method]["update_proj_gap"]
    assert variant.moments_in_8bit == (METHODS[method].get("moment_storage") == "8bit")


def test_what_goes_with_the_length_of_a_run_is_scaled() -> None:
    short, long = (VARIANTS["golore"].of_length(steps).settings["random_after"] for steps in (50, 400))
    assert (short, long) == (40, 320)
    assert VARIANTS["spam"].of_length(400).settings["reset_gap"] == 200
    assert "random_after" in (why_not(VARIANTS["golore"], rank=4) or "")  # before it knows
    assert VARIANTS["plain"].of_length(7) == VARIANTS["plain"]


# -- a GLUE task -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A tiny model, and a folder that has a task's."""
    root = tmp_path_factory.mktemp("glue")
    (root / "sst2-sentence").mkdir()
    write_pairs(root / "sst2-sentence", "sst2")
    return build_tiny_model(tmp_path_factory.mktemp("tiny")), root


@pytest.fixture
def tiny(folders: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    from transformers import RobertaForSequenceClassification

    def model(**config: Any) -> nn.Module:
        made: nn.Module = RobertaForSequenceClassification.from_pretrained(folders[0], **config)
        return made

    monkeypatch.setattr(glue, "minilm_as_roberta", model)
    monkeypatch.setattr(glue, "tokenizer_source", lambda name: folders[0])
    monkeypatch.setenv(glue.FOLDER_VARIABLE, str(folders[1]))
    return folders[1]


def plan_of(**changes: Any) -> glue.Fine:
    return glue.Fine(**{"rank": 4, "steps": 6, "batch": 8, "length": 12, "layers": 2, **changes})


def spec(plan: Schedule, rows: glue.Rows, variant: str = "galore", **changes: Any) -> Spec:
    chosen = VARIANTS[variant].of_length(plan.steps)
    return Spec(**{"experiment": plan, "variant": chosen, "lr": 1e-3, "seed": 0, "text_sha256": rows.sha256, **changes})


def test_a_task_is_read_and_learnt(tiny: Path) -> None:
    plan = plan_of()
    rows = glue.load_rows(glue.folder_of("sst2", None), plan)
    assert rows.facts() == {"name": "sst2", "train_rows": 24, "validation_rows": 24, "sha256": rows.sha256}
    assert rows.train["input_ids"].shape == (24, 12)
    first, again = (glue.train(spec(plan, rows), rows) for _ in range(2))
    assert (first.loss, first.score, first.train_curve) == (again.loss, again.score, again.train_curve)
    assert first.loss is not None
    assert first.score is not None
    assert (24 * first.score) == pytest.approx(round(24 * first.score))
    assert [step for step, _ in first.curve] == [6]
    assert first.refreshes == 3
    assert glue.train(spec(plan, rows, seed=1), rows).loss != first.loss
    still = [glue.train(spec(plan, rows, name, lr=0.0), rows).loss for name in ("adamw", "galore", "swan")]
    assert still[0] == still[1] == still[2] != first.loss  # all else is alike: weights, rows, dropout, the dense rate


def test_the_matrices_are_those_of_the_encoder(tiny: Path) -> None:
    rows = glue.load_rows(glue.folder_of("sst2", None), plan_of())
    seen: dict[str, tuple[int, ...]] = {}

    def watch(step: int, gradients: dict[str, Tensor]) -> None:
        seen.update({name: tuple(grad.shape) for name, grad in gradients.items()})

    glue.train(spec(plan_of(steps=1, layers=1), rows), rows, watch=watch)
    assert len(seen) == 6
    assert all(name.startswith("roberta.encoder.layer.0.") for name in seen)


def test_batches_go_through_all_rows_and_are_cut() -> None:
    lengths = torch.tensor([3, 5, 4, 2, 5, 1])
    mask = (torch.arange(5) < lengths[:, None]).long()
    rows = {"input_ids": torch.arange(30).view(6, 5), "attention_mask": mask, "labels": torch.arange(6)}
    stream = glue.batches(rows, size=3, seed=0)
    epochs = [[next(stream) for _ in range(2)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(torch.cat([batch["labels"] for batch in epoch]).tolist()) == list(range(6))
        for batch in epoch:
            longest = int(lengths[batch["labels"]].max())
            assert torch.equal(batch["input_ids"], rows["input_ids"][batch["labels"]][:, :longest])
    assert not torch.equal(epochs[0][0]["labels"], epochs[1][0]["labels"])
    with pytest.raises(ValueError, match="batch=7 is more than the 6 rows"):
        next(glue.batches(rows, size=7, seed=0))


def test_judging_counts_every_row_once(tiny: Path) -> None:
    model: Any = glue.minilm_as_roberta(num_labels=2)
    rows = glue.load_rows(tiny / "sst2-sentence", plan_of()).validation
    loss, right = glue._judge(model, rows)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    assert right == (logits.argmax(-1) == rows["labels"]).float().mean().item()
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, rows["labels"]).item(), abs=1e-6)


def test_files_that_are_not_there_are_said(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert glue.folder_of("mrpc", None) == tiny / "mrpc"
    assert glue.folder_of("mrpc", tmp_path) == tmp_path
    with pytest.raises(ValueError, match="holds no train file of task='sst2'"):
        glue.load_rows(tmp_path, plan_of())
    monkeypatch.delenv(glue.FOLDER_VARIABLE)
    with pytest.raises(ValueError, match=f"say where with --text, or set {glue.FOLDER_VARIABLE}"):
        glue.folder_of("sst2", None)
    with pytest.raises(ValueError, match="task='stsb' is not one of those that are compared"):
        plan_of(task="stsb")
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        plan_of(batch=0)


def test_the_command_compares_on_a_task(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    shared = ["--runs", str(tmp_path / "runs.jsonl"), "--out", str(tmp_path), "--rank", "4", "--layers", "1"]
    names = ["--variants", "adamw", "fira", "--seeds", "0", "1", "2"]
    assert command.main(["--presets", "--task", "sst2", "--steps", "2", "--extra", "0", *names, *shared]) == 0
    torch.set_num_threads(threads)
    assert "minus adamw" in capsys.readouterr().out
    (written,) = tmp_path.glob("*-presets-sst2.json")
    report = json.loads(written.read_text())
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(runs) == 2 * (2 + 2)  # two rates at the first seed, none beyond them; the best at two others
    row = next(row for row in report["measurements"] if row["variant"] == "fira")
    scores = {name: {str(run["seed"]): run["result"]["score"] for run in runs if run["variant"] == name and run["seed"]}
              for name in ("fira", "adamw")}  # fmt: skip
    assert row["scores"] == scores["fira"]
    assert row["score"] == pytest.approx(sum(scores["fira"].values()) / 2)
    gaps = [scores["fira"][seed] - scores["adamw"][seed] for seed in ("1", "2")]
    assert row["score_difference"] == pytest.approx(sum(gaps) / 2)
    assert row["score_difference_error"] == pytest.approx(abs(gaps[0] - gaps[1]) / 2)
    assert report["settings"]["baseline"] == "adamw"


# -- times and tables --------------------------------------------------------------------------------------------------


def test_steps_of_presets_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "PRESETS", ("adamw", "galore", "apollo-mini", "ldadam"))
    made: list[Any] = []
    real = presets._made
    monkeypatch.setattr(presets, "_made", lambda *given: made.append(real(*given)) or made[-1])
    report, _ = presets.measure(Options(quick=True))
    (held,) = report.measurements
    assert list(held["presets"]) == ["adamw", "galore", "apollo-mini", "ldadam"]
    shapes, rank = presets.QUICK_CASES[0].layer, presets.QUICK_CASES[0].rank
    assert held["presets"]["adamw"]["state_bytes"] == sum(2 * 4 * m * n + 4 for m, n in shapes)
    galore = held["presets"]["galore"]["state_bytes"]
    assert 0 <= galore - sum(4 * rank * (2 * m + n) for m, n in shapes) <= 100 * len(shapes)
    assert held["presets"]["adamw"]["times_adamw"]["ordinary"] == {"median": 1.0, "p10": 1.0, "p90": 1.0}
    steps = 1 + presets.GAP * presets.GAPS
    for (optimizer,), refreshes in zip(made[1:], (1 + presets.GAPS, 1 + presets.GAPS, steps), strict=True):
        for weight in optimizer.targets:
            assert optimizer.state[weight]["galore_step"] == steps
            assert optimizer.state[weight]["galore_refreshes"] == refreshes


def test_the_page_has_the_table_of_the_committed_results() -> None:
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    table = choosing.of_results()
    assert table in page
    assert all(f"| `{name}` |" in table for name in METHODS if name in PRESETS)
    other = table.replace("| AdamW, full rank |", "| something |")
    assert other != table
    assert choosing.written(choosing.written(page, other), table) == page
    with pytest.raises(ValueError, match="page has 0 tables"):
        choosing.written("", table)


def test_a_table_is_computed_from_reports(tmp_path: Path) -> None:
    row: dict[str, Any] = {"deviation": 0.2, "difference": None, "error": None, "lr": 1e-3, "lr_at_edge": False}
    language = {
        "measurements": [
            {**row, "variant": "galore", "mean": 1.0, "losses": dict.fromkeys("1234", 1.0), "state_bytes": 30,
             "difference": -0.5, "error": 0.01, "lr_at_edge": True},
            {**row, "variant": "adamw", "mean": 1.5, "losses": {"1": 1.5}, "deviation": None, "state_bytes": 120},
        ]
    }  # fmt: skip
    times = {"ordinary": {"median": 3.0}, "amortised": {"median": 4.5}}
    steps = {"measurements": [{"rank": 8, "presets": {"galore": {"times_adamw": times}}}]}
    told = choosing.table(language, steps).splitlines()
    assert told[2] == "| `galore` | 1.000 ± 0.100 | -0.500 ± 0.010 | 4 | 0.001* | 0.25 | 3.0 (4.5) |"
    assert told[3] == "| AdamW, full rank | 1.500 | - | 1 | 0.001 | 1.00 | - |"
    tuned = {"variant": "galore", "score": 0.75, "score_error": 0.02, "scores": {"1": 0.7, "2": 0.8}, "lr": 2.0}
    fine = {"settings": {"text": {"name": "sst2"}}, "measurements": [{**tuned, "lr_at_edge": False}]}
    told = choosing.table(language, steps, fine).splitlines()
    assert told[2].endswith("| 3.0 (4.5) | 0.750 ± 0.020 | - | 2 | 2 |")
    assert told[3].endswith("| - | - | - | 0 | - |")


def test_a_report_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no report 'presets'; run the benchmark"):
        choosing.of_results(tmp_path)
    for day in ("2020-01-02", "2020-01-01"):
        (tmp_path / f"{day}-presets.json").write_text(json.dumps({"day": day}))
    (tmp_path / "2020-01-03-presets-sst2.json").write_text("{}")
    assert choosing.newest("presets", tmp_path) == {"day": "2020-01-02"}


def test_matrices_leave_heads_out(tiny: Path) -> None:
    names = matrices(glue.minilm_as_roberta(num_labels=2))
    assert names
    assert not any(name.startswith("classifier") for name in names)
    assert dataclasses.is_dataclass(plan_of())
