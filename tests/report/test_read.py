# SPDX-License-Identifier: Apache-2.0
"""Which logs are taken, and what is kept of a file that is not whole."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from lightning_galore.report.find import ReportError, locate
from lightning_galore.report.read import Series, read_log
from lightning_galore.report.series import (
    MOST_COLUMNS,
    by_weight,
    drift_in_time,
    history,
    natural,
    quantiles,
    raster,
    running_mean,
    thinned,
)
from tests.report.synthetic import REFRESH_COLUMNS, write_csv, write_run

HEADER = ",".join(REFRESH_COLUMNS) + "\r\n"


def refreshes(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "galore_refreshes.csv").write_text(HEADER + text, encoding="utf-8", newline="")
    return folder


def metrics(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_text(text, encoding="utf-8", newline="")
    return folder


# -- which files -------------------------------------------------------------------------------------------------------


def test_the_highest_version_is_taken_also_if_an_older_one_was_touched_later(tmp_path: Path) -> None:
    for version in (2, 9, 10):
        metrics(tmp_path / "lightning_logs" / f"version_{version}", "step,train_loss\r\n1,2.0\r\n")
    os.utime(tmp_path / "lightning_logs" / "version_2" / "metrics.csv", (2e9, 2e9))
    sources = locate(tmp_path)[0]
    assert sources.folder.name == "version_10"
    assert [run.folder.name for run in locate(tmp_path)] == ["version_10", "version_9", "version_2"]


def test_between_experiments_the_last_written_is_taken(tmp_path: Path) -> None:
    for name, version, when in (("a", 7, 1e9), ("b", 0, 1.5e9)):
        file = metrics(tmp_path / name / f"version_{version}", "step,train_loss\r\n1,2.0\r\n") / "metrics.csv"
        os.utime(file, (when, when))
    assert [run.folder.parent.name for run in locate(tmp_path)] == ["b", "a"]


def test_the_folder_itself_comes_first(tmp_path: Path) -> None:
    metrics(tmp_path, "step,train_loss\r\n1,2.0\r\n")
    metrics(tmp_path / "version_3", "step,train_loss\r\n1,2.0\r\n")
    assert locate(tmp_path)[0].folder == tmp_path


def test_refreshes_of_another_run_are_not_mixed_in(tmp_path: Path) -> None:
    refreshes(metrics(tmp_path / "version_0", "step,train_loss\r\n1,2.0\r\n"), "")
    metrics(tmp_path / "version_1", "step,train_loss\r\n1,2.0\r\n")
    assert locate(tmp_path)[0].refreshes is None
    refreshes(tmp_path / "elsewhere", "")
    sources = locate(tmp_path)[0]
    assert sources.folder.name == "version_1"
    assert sources.refreshes == tmp_path / "elsewhere" / "galore_refreshes.csv"


def test_refreshes_alone_are_a_run(tmp_path: Path) -> None:
    sources = locate(refreshes(tmp_path, ""))[0]
    assert sources.metrics is None
    assert sources.refreshes == tmp_path / "galore_refreshes.csv"


def test_no_folder_and_no_log(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run_dir=.*none is not a folder"):
        locate(tmp_path / "none")
    with pytest.raises(
        ReportError, match=r"(?s)holds no log.*metrics.csv.*TensorBoard.*galore_refreshes.csv.*CSVLogger\("
    ):
        locate(tmp_path)


# -- metrics.csv -------------------------------------------------------------------------------------------------------


def test_columns_are_read_by_step_with_gaps_for_what_is_not_finite(tmp_path: Path) -> None:
    text = "accuracy,epoch,lr-AdamW,step,train_loss\r\n,0,0.1,5,2.5\r\n0.5,0,,1,3.5\r\n"
    text += ",0,,7,nan\r\n,0,,8,inf\r\n,0,,9,1e300\r\n"
    log = read_log(locate(metrics(tmp_path, text))[0])
    assert set(log.series) == {"lr-AdamW", "train_loss"}  # no chart draws an accuracy
    loss = log.series["train_loss"]
    assert loss.steps == [1, 5, 7, 8, 9]
    assert loss.finite == [(1, 3.5), (5, 2.5)]
    assert "accuracy" in log.columns
    assert log.notes == ["train_loss: 3 of 5 values are not finite, the first at step 7; they are gaps in the line."]


def test_a_step_that_is_logged_twice_keeps_the_later_value(tmp_path: Path) -> None:
    log = read_log(locate(metrics(tmp_path, "step,train_loss\r\n1,3.0\r\n2,2.0\r\n1,2.5\r\n"))[0])
    assert log.series["train_loss"].finite == [(1, 2.5), (2, 2.0)]


@pytest.mark.parametrize("step", ["", "-1", "nan", "1e300", "one"])
def test_a_row_without_a_step_is_left_out_and_counted(step: str, tmp_path: Path) -> None:
    log = read_log(locate(metrics(tmp_path, f"step,train_loss\r\n{step},3.0\r\n2,2.0\r\n"))[0])
    assert log.series["train_loss"].finite == [(2, 2.0)]
    assert log.notes == ["metrics.csv: 1 row left out, without a step or a name."]


def test_broken_lines_cost_only_themselves(tmp_path: Path) -> None:
    text = 'step,train_loss\r\n1,3.0\r\n"2,2.0\r\n3,"x\r\n4\r\n5,1,2,3\r\n\x00,\x00\r\n6,1.0\r\n7,0.'
    log = read_log(locate(metrics(tmp_path, text))[0])
    assert log.series["train_loss"].finite == [(1, 3.0), (6, 1.0)]
    assert any("cut off at the end" in note for note in log.notes)
    assert any("3 lines left out, of another length" in note for note in log.notes)


def test_a_table_without_steps_is_left_out_with_a_word(tmp_path: Path) -> None:
    log = read_log(locate(metrics(tmp_path, "epoch,train_loss\r\n1,3.0\r\n"))[0])
    assert log.series == {}
    assert log.notes == ["metrics.csv was left out: it has no column 'step'."]


def test_a_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics(tmp_path, "step,train_loss\r\n1,3.0\r\n")
    monkeypatch.setattr("lightning_galore.report.read._LARGEST_FILE", 10)
    with pytest.raises(ReportError, match="log_every_n_steps"):
        read_log(locate(tmp_path)[0])


# -- galore_refreshes.csv ----------------------------------------------------------------------------------------------


def test_a_refresh_is_read(tmp_path: Path) -> None:
    refreshes(tmp_path, "0,0,h.0.w,8x4,left,2,50,,0.9,1,3 2 1\r\n50,0,h.0.w,8x4,left,2,100,0.75,,0,\r\n")
    first, second = read_log(locate(tmp_path)[0]).refreshes
    assert (first.step, first.weight, first.shape, first.side) == (0, "h.0.w", "8x4", "left")
    assert (first.rank, first.gap, first.drift, first.captured_energy) == (2, 50, None, 0.9)
    assert first.spectrum == (3, 2, 1)
    assert first.found
    assert (second.drift, second.captured_energy, second.found, second.spectrum) == (0.25, None, False, ())


def test_after_a_resume_the_last_row_of_a_step_wins_and_the_cut_line_is_ignored(tmp_path: Path) -> None:
    rows = "0,0,a,,,2,50,,,1,\r\n50,0,a,,,2,50,0.1,,1,\r\n50,1,a,,,2,50,0.2,,1,\r\n50,0,a,,,2,50,0.3,,1,\r\n"
    rows += "100,0,a,,,2,50,0.4,,1,3 2"
    log = read_log(locate(refreshes(tmp_path, rows))[0])
    assert [(one.step, one.optimizer, one.drift) for one in log.refreshes] == [(0, 0, None), (50, 0, 0.7), (50, 1, 0.8)]
    assert list(by_weight(log)) == ["0: a", "1: a"]  # of two optimizers: the weights are kept apart


@pytest.mark.parametrize(
    ("overlap", "drift"), [("1.0000002", 0.0), ("-1e-9", 1.0), ("2", None), ("nan", None), ("inf", None), ("x", None)]
)
def test_an_overlap_outside_of_its_range_is_no_overlap(overlap: str, drift: float | None, tmp_path: Path) -> None:
    (one,) = read_log(locate(refreshes(tmp_path, f"50,0,a,,,2,50,{overlap},,1,\r\n"))[0]).refreshes
    assert one.drift == drift


@pytest.mark.parametrize("spectrum", ["3 nan 1", "1 -2", "a b", " "])
def test_a_spectrum_that_is_none(spectrum: str, tmp_path: Path) -> None:
    (one,) = read_log(locate(refreshes(tmp_path, f"50,0,a,,,2,50,,,1,{spectrum}\r\n"))[0]).refreshes
    assert one.spectrum == ()


def test_tensorboard_events_say_the_same_as_the_table(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "tb" / "version_0")) as writer:
        for step in (0, 10, 20):
            writer.add_scalar("train_loss", 3.0 - step / 10, step)
            writer.add_scalar("accuracy", 0.5, step)
        writer.add_scalar("train_loss", math.nan, 30)
    log = read_log(locate(tmp_path)[0])
    assert log.series["train_loss"].finite == [(0, 3.0), (10, 2.0), (20, 1.0)]
    assert set(log.series) == {"train_loss"}
    assert any("1 of 4 values are not finite" in note for note in log.notes)


def test_events_without_tensorboard_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "events.out.tfevents.1.host.2.0").write_bytes(b"")
    monkeypatch.setattr("lightning_galore.report.find.find_spec", lambda name: None)
    with pytest.raises(ReportError, match="pip install tensorboard"):
        locate(tmp_path)


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_layers_sort_by_their_number() -> None:
    names = ["h.10.q", "head", "h.9.v", "h.9.q", "h.x"]
    assert sorted(names, key=natural) == ["h.9.q", "h.9.v", "h.10.q", "h.x", "head"]


def test_thinning_keeps_the_peaks_the_ends_and_the_gaps() -> None:
    points = [(float(i), math.sin(i)) for i in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    points[12_345] = (12_345.0, -99.0)
    points[70_000:72_000] = [(float(i), math.nan) for i in range(70_000, 72_000)]
    kept = thinned(points, 1000)
    assert len(kept) <= 1000
    assert kept == sorted(kept, key=lambda point: point[0])
    assert {(54_321.0, 99.0), (12_345.0, -99.0), points[0], points[-1]} <= set(kept)
    assert any(math.isnan(value) for _, value in kept)
    assert thinned(points[:10], 1000) == points[:10]


def test_running_mean_forgets_a_spike() -> None:
    points = [(float(i), 1.0) for i in range(100)]
    points[10] = (10.0, 1e20)
    means = dict(running_mean(points, 5))
    assert means[8] == means[12] == pytest.approx(2e19)
    assert means[7] == means[13] == 1.0
    assert len(running_mean([(float(i), 1.0) for i in range(10_000)], 200)) <= 1000


def test_between_refreshes_a_value_holds() -> None:
    steps, (low, median, high) = quantiles({"a": [(0, 1.0), (30, 3.0)], "b": [(10, 5.0)]}, 0.0, 0.5, 1.0)
    assert steps == [0, 10, 30]
    assert (low, median, high) == ([1, 1, 3], [1, 3, 4], [1, 5, 5])


def test_a_drift_is_that_of_the_time_between_two_refreshes(tmp_path: Path) -> None:
    rows = "0,0,a,,,2,50,,,1,\r\n10,0,b,,,2,50,,,1,\r\n12,0,c,,,2,50,,,1,\r\n20,0,a,,,2,50,0.9,,1,\r\n"
    rows += "30,0,a,,,2,50,,,0,\r\n40,0,a,,,2,50,0.7,,1,\r\n44,0,b,,,2,50,0.5,,1,\r\n"
    found = drift_in_time(read_log(locate(refreshes(tmp_path, rows))[0]))
    assert found == {
        "a": [(0, 20, pytest.approx(0.1)), (20, 40, pytest.approx(0.3))],  # at 30 no basis was found: the old one stays
        "b": [(10, 44, 0.5)],
        "c": [],
    }


def test_a_drift_after_a_resume_begins_where_the_log_does(tmp_path: Path) -> None:
    rows = "510,0,a,,,2,50,0.5,,1,\r\n530,0,b,,,2,50,0.5,,1,\r\n"
    refreshes(metrics(tmp_path, "step,train_loss\r\n505,2.0\r\n"), rows)
    assert drift_in_time(read_log(locate(tmp_path)[0])) == {"a": [(505, 510, 0.5)], "b": [(505, 530, 0.5)]}


def test_a_drift_of_which_there_is_no_table_lasts_from_log_to_log(tmp_path: Path) -> None:
    metrics(tmp_path, "galore_drift/a,step,train_loss\r\n,9,2\r\n,19,2\r\n0.5,29,2\r\n0.25,39,2\r\n")
    assert drift_in_time(read_log(locate(tmp_path)[0])) == {"a": [(19, 29, 0.5), (29, 39, 0.25)]}


def test_a_cell_of_the_map_says_what_was_said_of_its_time() -> None:
    edges, rows = raster({"a": [(0, 10, 0.5), (10, 30, 0.125)], "b": [(10, 20, 0.75)], "c": []})
    assert edges == [0, 10, 20, 30]
    assert rows[0] == [0.5, 0.125, 0.125]
    assert [math.isnan(value) for value in rows[1]] == [True, False, True]  # not yet refreshed, not refreshed since
    assert rows[1][1] == 0.75
    assert all(math.isnan(value) for value in rows[2])


def test_a_map_of_many_refreshes_has_as_many_columns_as_can_be_seen() -> None:
    edges, (row,) = raster({"a": [(float(i - 1), float(i), i % 2) for i in range(1, 10_001)]})
    assert len(edges) == MOST_COLUMNS + 1
    assert (edges[0], edges[-1]) == (0, 10_000)
    assert row[5] == pytest.approx(0.5, abs=0.02)  # the mean of what a cell covers


def test_per_layer_metrics_stand_in_for_the_table(tmp_path: Path) -> None:
    metrics(tmp_path, "galore_drift_0/h.10.q,galore_drift_0/h.9.q,galore_drift_1/h.0.q,step\r\n0.5,0.4,0.3,7\r\n")
    found = history(read_log(locate(tmp_path)[0]), lambda refresh: refresh.drift, "galore_drift")
    assert found == {"0: h.9.q": [(7, 0.4)], "0: h.10.q": [(7, 0.5)], "1: h.0.q": [(7, 0.3)]}


def test_the_table_comes_before_per_layer_metrics(tmp_path: Path) -> None:
    write_csv(tmp_path / "metrics.csv", [{"step": "1", "galore_drift/a": "0.5"}])
    refreshes(tmp_path, "1,0,a,,,2,50,0.9,,1,\r\n")
    (points,) = history(read_log(locate(tmp_path)[0]), lambda refresh: refresh.drift, "galore_drift").values()
    assert points == [(1, pytest.approx(0.1))]


def test_a_series_of_gaps_has_nothing_finite() -> None:
    assert Series("loss", [1, 2], [math.nan, math.nan]).finite == []


def test_the_synthetic_run_is_read_whole(tmp_path: Path) -> None:
    log = read_log(locate(write_run(tmp_path))[0])
    assert log.notes == []
    assert len(by_weight(log)) == 8
