# SPDX-License-Identifier: Apache-2.0
"""The maps of weights where some of them have no value: it is said, and nothing empty is drawn in its place."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from lightning_galore.report.find import locate
from lightning_galore.report.maps import draw_drift_map, draw_spectrum
from lightning_galore.report.read import RunLog, read_log
from lightning_galore.report.style import LIGHT, Drawn, styled
from tests.report.synthetic import REFRESH_COLUMNS, write_csv


def log_of(folder: Path, refreshes: list[int], *, spectra: bool = True) -> RunLog:
    """Weight ``i`` is refreshed ``refreshes[i]`` times, first at step ``10 i``, then every 50."""
    rows = [
        {
            **dict.fromkeys(REFRESH_COLUMNS, ""),
            **{"step": str(10 * i + 50 * k), "weight": f"h.{i}.w", "overlap": "0.5" if k else ""},
            "spectrum": "4 2 1" if spectra or i else "",
        }
        for i, count in enumerate(refreshes)
        for k in range(count)
    ]
    write_csv(folder / "galore_refreshes.csv", sorted(rows, key=lambda row: int(row["step"])), REFRESH_COLUMNS)
    return read_log(locate(folder)[0])


def drawn(draw: object, log: RunLog) -> Drawn:
    with styled(LIGHT):
        return draw(log, LIGHT)  # type: ignore[operator, no-any-return]


def notes(figure: Figure) -> str:
    return " ".join(text.get_text() for legend in figure.legends for text in legend.get_texts()).replace("\n", " ")


def test_a_cell_of_the_drift_map_begins_at_the_refresh_before(tmp_path: Path) -> None:
    figure = drawn(draw_drift_map, log_of(tmp_path, [2, 2])).figure
    (mesh,) = figure.axes[0].collections
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 10, 50, 60]
    assert mesh.get_array().mask.tolist() == [[False, False, True], [True, False, False]]
    assert "before the first refresh of a weight and after its last" in notes(figure)


def test_a_weight_with_one_refresh_has_an_empty_row_in_the_drift_map_and_a_word(tmp_path: Path) -> None:
    found = drawn(draw_drift_map, log_of(tmp_path, [3, 1, 1, 3]))
    (mesh,) = found.figure.axes[0].collections
    assert mesh.get_array().mask.all(axis=1).tolist() == [False, True, True, False]
    assert [label.get_text() for label in found.figure.axes[0].get_yticklabels()] == [f"h.{i}.w" for i in range(4)]
    for said in (notes(found.figure), found.alt):
        assert "2 of 4 weights were refreshed only once" in said


def test_a_full_drift_map_needs_no_word(tmp_path: Path) -> None:
    assert drawn(draw_drift_map, log_of(tmp_path, [3])).figure.legends == []


NO_MIDDLE = "No weight was refreshed three times, so there is no middle refresh."
CASES = [
    (3, 3, ["first", "middle", "last"], ""),
    (2, 2, ["first", "last"], NO_MIDDLE),
    (1, 1, ["first"], "Of each weight there is one refresh so far, so no middle and no last one."),
    (1, 2, ["first", "last"], "1 of {n} weights was refreshed once and has no last refresh. " + NO_MIDDLE),
    (2, 3, ["first", "middle", "last"], "1 was refreshed less than three times: no middle refresh."),
]


@pytest.mark.parametrize(("one", "others", "moments", "said"), CASES)
def test_a_moment_that_no_weight_has_gets_no_map_and_is_named(
    one: int, others: int, moments: list[str], said: str, tmp_path: Path
) -> None:
    found = drawn(draw_spectrum, log_of(tmp_path, [one] + [others] * 13))
    assert [title for ax in found.figure.axes if (title := ax.get_title(loc="left"))] == [
        f"{m} refresh" for m in moments
    ]
    assert notes(found.figure) == said.format(n=14)
    assert found.alt.endswith(said.format(n=14))


@pytest.mark.parametrize(("one", "others", "moments", "said"), CASES)
def test_so_it_is_in_panels(one: int, others: int, moments: list[str], said: str, tmp_path: Path) -> None:
    found = drawn(draw_spectrum, log_of(tmp_path, [one, others, others]))
    assert [len(ax.get_lines()) for ax in found.figure.axes] == [one, others, others]
    assert notes(found.figure) == " ".join([*(f"{moment} refresh" for moment in moments), said.format(n=3)]).strip()


def test_a_weight_without_singular_values_is_counted(tmp_path: Path) -> None:
    found = drawn(draw_spectrum, log_of(tmp_path, [3, 3, 3], spectra=False))
    assert "1 of 3 weights has no singular values in the log" in notes(found.figure)
