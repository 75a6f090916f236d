# SPDX-License-Identifier: Apache-2.0
"""Which run of several is drawn: not what a validation or a failed fit has left."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from lightning_galore.report import ReportError, ReportFiles, write_report
from tests.report.synthetic import REFRESH_COLUMNS, refresh_rows, write_csv

TRAINED = [{"step": str(step), "train_loss": "2.0"} for step in (9, 19)]
NOTHING = [{"step": "0", "hp_metric": "-1"}]
EVALUATED = [{"step": "0", "val_loss": "2.5", "val_perplexity": "12.2"}]


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """A run of training."""
    write_csv(tmp_path / "version_0" / "metrics.csv", TRAINED)
    return tmp_path


def leave(logs: Path, version: int, rows: list[dict[str, str]]) -> None:
    write_csv(logs / f"version_{version}" / "metrics.csv", rows)


def first_lines(files: ReportFiles) -> list[str]:
    return str(files).splitlines()[:2]


def test_the_newest_run_with_something_to_draw_is_taken_and_said_first(logs: Path) -> None:
    for version in (1, 2, 3, 10, 11, 12):
        leave(logs, version, NOTHING)
    files = write_report(logs)
    assert files.source == logs / "version_0"
    page, note = first_lines(files)
    assert page.endswith(f"1 charts of {logs / 'version_0'}")
    assert note == (
        "note: 7 runs were found; this is the newest with something to draw, version_0; version_12, version_11, "
        "version_10, version_3 and 2 more hold nothing. Give the folder of another one to draw that."
    )
    assert "version_12, version_11" in files.page.read_text("utf-8")


def test_a_single_evaluation_is_no_run(logs: Path) -> None:
    leave(logs, 1, EVALUATED)
    leave(logs, 2, NOTHING)
    files = write_report(logs)
    assert files.source == logs / "version_0"
    assert "version_2 holds nothing, version_1 holds an evaluation only." in files.notes[0]
    assert write_report(logs / "version_1").notes == ()  # who names it gets it


def test_an_evaluation_is_drawn_where_there_is_nothing_else(logs: Path) -> None:
    leave(logs, 0, EVALUATED)
    leave(logs, 1, NOTHING)
    files = write_report(logs)
    assert files.source == logs / "version_0"
    assert "version_1 holds nothing." in files.notes[0]


def test_a_run_of_one_validation_and_training_is_a_run(logs: Path) -> None:
    leave(logs, 1, [*EVALUATED, {"step": "0", "train_loss": "3.0"}])
    files = write_report(logs)
    assert files.source == logs / "version_1"
    assert files.notes == (
        "2 runs were found; this is the newest, version_1. Give the folder of another one to draw that.",
    )


def test_newer_folders_without_any_log_are_named(logs: Path) -> None:
    for version in (1, 2):
        (logs / f"version_{version}").mkdir()
        (logs / f"version_{version}" / "config.yaml").touch()
    assert "version_0; version_2 and version_1 hold nothing." in write_report(logs).notes[0]
    leave(logs, 3, TRAINED)
    assert write_report(logs).notes[0].startswith("2 runs were found; this is the newest, version_3.")


def test_a_table_of_refreshes_from_elsewhere_makes_no_run_of_an_empty_one(logs: Path) -> None:
    write_csv(logs / "galore" / "galore_refreshes.csv", refresh_rows(1, 300, 100, kinds=1), REFRESH_COLUMNS)
    leave(logs, 1, NOTHING)
    files = write_report(logs)
    assert files.source == logs / "version_0"
    assert {"loss.png", "drift_map.png"} <= {path.name for path in files.charts}
    leave(logs, 0, NOTHING)
    files = write_report(logs)
    assert files.source == logs / "version_1"
    assert "loss.png" not in {path.name for path in files.charts}


def test_where_none_has_anything_the_first_words_say_so(logs: Path) -> None:
    leave(logs, 0, NOTHING)
    leave(logs, 1, NOTHING)
    with pytest.raises(ReportError) as error:
        write_report(logs)
    assert str(error.value).startswith(f"Nothing to draw in any of the 2 runs in {logs}: ")
    assert len(str(error.value)) - len(str(logs)) < 200
    with pytest.raises(ReportError, match=r"^Nothing to draw in .*version_1: logged were hp_metric\. Log a loss"):
        write_report(logs / "version_1")
    assert not (logs / "report").exists()
