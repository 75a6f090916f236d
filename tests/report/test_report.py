# SPDX-License-Identifier: Apache-2.0
"""The report as a user gets it: the page, its pictures, and what is refused."""

from __future__ import annotations

import ast
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest

import lightning_galore.report
from lightning_galore.cli import main
from lightning_galore.report import ReportError, write_report
from tests.report.synthetic import REFRESH_COLUMNS, metric_rows, refresh_rows, write_csv, write_run

pytest.importorskip("matplotlib")

SLUGS = [
    *("loss", "learning_rate", "drift", "drift_map", "captured_energy"),
    *("spectrum", "gap_and_rank", "refreshes", "memory"),
]


class Page(HTMLParser):
    """What a browser would see: the tags, the text, and which tags are left open."""

    VOID = frozenset({"meta", "source", "img", "br"})

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page.read_text("utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def pixels(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The logs of a whole run with its report."""
    folder = write_run(tmp_path_factory.mktemp("run"))
    write_report(folder)
    return folder


def test_every_chart_is_a_picture_and_on_the_page(run: Path) -> None:
    folder = run / "report"
    assert {path.name for path in folder.iterdir()} == {"index.html", *(f"{slug}.png" for slug in SLUGS)}
    assert all(pixels(folder / f"{slug}.png")[0] == 1200 for slug in SLUGS)
    page = Page(folder / "index.html")
    assert [attrs["id"] for attrs in page.all("section")] == [*SLUGS, "weights"]
    assert len(page.all("img")) == len(page.all("source")) == len(SLUGS)
    assert "Not drawn" not in page.text


def test_the_page_needs_nothing_but_itself(run: Path) -> None:
    page = Page(run / "report" / "index.html")
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "srcset"):
            assert (attrs.get(name) or "data:image/png;base64,").startswith("data:image/png;base64,")
        assert (attrs.get("href") or "#").startswith("#")
    assert "default-src 'none'" in str(page.all("meta")[2]["content"])
    css = re.findall(r"<style>(.*?)</style>", (run / "report" / "index.html").read_text("utf-8"), flags=re.DOTALL)
    assert "url(" not in css[0]
    assert "@import" not in css[0]


def test_pictures_for_dark_pages_are_other_pictures(run: Path) -> None:
    page = Page(run / "report" / "index.html")
    for light, dark in zip(page.all("img"), page.all("source"), strict=True):
        assert dark["media"] == "screen and (prefers-color-scheme: dark)"
        assert dark["srcset"] != light["src"]


def test_alternative_texts_say_what_is_seen(run: Path) -> None:
    alts = dict(
        zip(SLUGS, (str(attrs["alt"]) for attrs in Page(run / "report" / "index.html").all("img")), strict=True)
    )
    assert all(len(alt) > 60 for alt in alts.values())
    assert re.search(r"train_loss: 9\.\d+ at step 9, 3\.\d+ at step 1,999", alts["loss"])
    assert "8 weights" in alts["drift_map"]
    assert "110 MB, 730 MB less than at full rank" in alts["memory"]


def test_the_same_logs_give_the_same_report_whatever_the_settings_of_matplotlib(run: Path, tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 30.0, "axes.labelsize": 30.0}):
        write_report(run, tmp_path / "again")
        assert matplotlib.rcParams["font.size"] == 30.0
    for path in (run / "report").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_the_table_has_the_numbers_of_each_weight(run: Path) -> None:
    text = Page(run / "report" / "index.html").text
    assert text.index("model.layers.0.mlp.down_proj.weight") < text.index("model.layers.1.mlp.down_proj.weight")
    assert "688x256" in text


@pytest.mark.parametrize("layers", [1, 32])
def test_from_a_few_weights_to_those_of_a_7b_model(layers: int, tmp_path: Path) -> None:
    rows = refresh_rows(layers, steps=1000, gap=200, kinds=1 if layers == 1 else 7)
    write_csv(tmp_path / "galore_refreshes.csv", rows, REFRESH_COLUMNS)
    files = write_report(tmp_path)
    assert {"Loss", "Learning rate", "Memory"} == set(files.missing)
    width, height = pixels(files.folder / "drift_map.png")
    assert width == 1200
    assert height < 2000
    assert height > (1400 if layers == 32 else 300)


def test_row_labels_are_thinned_and_layers_keep_their_order(tmp_path: Path) -> None:
    from lightning_galore.report.find import locate
    from lightning_galore.report.maps import blocks, draw_drift_map, short_names
    from lightning_galore.report.read import read_log
    from lightning_galore.report.style import LIGHT, styled

    write_csv(tmp_path / "galore_refreshes.csv", refresh_rows(80, steps=1000, gap=200), REFRESH_COLUMNS)
    with styled(LIGHT):
        ax = draw_drift_map(read_log(locate(tmp_path)[0]), LIGHT).figure.axes[0]
        labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == [f"layers.{i}" for i in range(0, 80, 3)]
    assert short_names(["a.b.weight"]) == ["a.b"]
    assert short_names(["m.h.0.q.weight", "m.h.1.q.weight"]) == ["h.0.q", "h.1.q"]
    assert short_names(["m.h.0.q.weight", "m.h.0.k.weight"]) == ["q", "k"]
    assert blocks(["h.0.q", "h.0.k", "h.1.q", "head"]) == [(0, "h.0"), (2, "h.1"), (3, "head")]


# -- what is missing ---------------------------------------------------------------------------------------------------


def test_a_missing_chart_says_why_and_how_to_get_it(tmp_path: Path) -> None:
    write_csv(tmp_path / "metrics.csv", [{"step": "1", "accuracy": "0.5", "lr-AdamW": "0.1"}])
    files = write_report(tmp_path)
    assert [path.name for path in files.charts] == ["learning_rate.png"]
    text = Page(files.page).text
    assert "No logged name contains “loss”. Logged were: accuracy, lr-AdamW." in text
    assert 'self.log("train_loss", loss)' in text
    assert text.count("Add SubspaceScheduler(...) of lightning_galore.callbacks") == 7
    assert "not drawn: Loss. No logged name contains" in str(files)


def test_a_drift_needs_two_refreshes(tmp_path: Path) -> None:
    write_csv(tmp_path / "galore_refreshes.csv", refresh_rows(1, steps=100, gap=200), REFRESH_COLUMNS)
    files = write_report(tmp_path)
    assert "drift_map.png" not in {path.name for path in files.charts}
    assert "train for more than one update_proj_gap" in Page(files.page).text
    assert (files.folder / "spectrum.png").is_file()  # of one refresh


def test_on_cpu_the_panel_of_peak_memory_says_so(tmp_path: Path) -> None:
    rows = refresh_rows(1, steps=300, gap=100)
    write_csv(tmp_path / "metrics.csv", metric_rows(rows, 300, 50, cuda=False))
    files = write_report(tmp_path)
    assert (files.folder / "memory.png").is_file()
    assert "Peak memory" not in Page(files.page).text
    assert "drift.png" in {path.name for path in files.charts}  # from galore/drift_mean
    assert "Drift of each weight" in files.missing


def test_several_optimizers(tmp_path: Path) -> None:
    from lightning_galore.report.find import locate
    from lightning_galore.report.lines import named
    from lightning_galore.report.read import read_log

    names = (
        "drift_mean",
        "drift_max",
        "captured_energy",
        "gap_mean",
        "rank_mean",
        "refreshes",
        "state_bytes",
        "bytes_saved",
    )
    rows = [
        {"step": str(step), **{f"galore/{name}_{i}": str(0.5 + i) for name in names for i in (0, 1)}} for step in (1, 2)
    ]
    write_csv(tmp_path / "metrics.csv", rows)
    files = write_report(tmp_path)
    assert len(files.charts) == 5
    assert "Optimizer state of the projected weights at last: 2 bytes" in str(Page(files.page).all("img")[-1]["alt"])
    labels = [label for label, _ in named(read_log(locate(tmp_path)[0]), "galore/drift_mean", "mean")]
    assert labels == ["mean, optimizer 0", "mean, optimizer 1"]


# -- untrusted text ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_names_are_text_and_odd_values_break_nothing(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&$\\frac{1}$_loss"
    odd = ["_hidden_loss", "loss_" + "长" * 5, "loss\x07bell", "x" * 500 + "loss", "all_nan_loss", "single_loss"]
    rows = [{"step": str(i), evil: str(value)} for i, value in enumerate([1, "nan", -3, "inf", "-inf", 1e29, 1e-300])]
    rows += [{"step": "3", **dict.fromkeys(odd, "nan" if i else "1.0")} for i in (0, 1)]
    rows += [{"step": str(10**14), "lr-0": "0", "galore/state_bytes": "-1", "galore/refresh_time_share": "7"}]
    write_csv(tmp_path / "metrics.csv", rows)
    refresh = dict.fromkeys(REFRESH_COLUMNS, "")
    refresh |= {"weight": f'"{evil}', "shape": "<b>", "side": "<i>", "rank": "nan", "gap": "-5", "spectrum": "0 0 0"}
    more = [{**refresh, "step": str(step), "overlap": "0.5"} for step in (1, 2)]
    more += [
        {**refresh, "step": "5", "weight": "w", "spectrum": "1e-320 1e-321"},
        {**refresh, "step": "6", "weight": "v", "spectrum": "7 0"},
    ]
    write_csv(tmp_path / "galore_refreshes.csv", more, REFRESH_COLUMNS)
    files = write_report(tmp_path)
    page = Page(files.page)
    assert {"loss.png", "drift_map.png", "spectrum.png", "memory.png"} <= {path.name for path in files.charts}
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    assert evil in page.text


def test_a_name_as_the_font_can_show_it() -> None:
    from lightning_galore.report.style import text

    assert text("_loss") == " _loss"
    assert text("a\n\x00长") == "a???"
    assert len(text("x" * 100)) == 44
    assert text("a" * 50 + "end").endswith("aend")


def test_long_series_stay_small(tmp_path: Path) -> None:
    lines = "".join(f"{i},{1 + 1 / (i + 1)}\r\n" for i in range(200_000))
    (tmp_path / "metrics.csv").write_text("step,train_loss\r\n" + lines, newline="")
    assert write_report(tmp_path).page.stat().st_size < 600_000


# -- where it is written -----------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Logs that are drawn in no time."""
    write_csv(tmp_path / "run" / "metrics.csv", [{"step": "1", "train_loss": "0.5", "lr-AdamW": "0.1"}])
    return tmp_path / "run"


def test_a_report_is_replaced_and_stale_charts_go(small: Path) -> None:
    assert {path.name for path in write_report(small).charts} == {"loss.png", "learning_rate.png"}
    write_csv(small / "metrics.csv", [{"step": "1", "train_loss": "0.5"}])
    write_report(small)
    assert {path.name for path in (small / "report").iterdir()} == {"index.html", "loss.png"}
    (small / "report" / "mine.txt").write_text("keep")
    write_csv(small / "metrics.csv", [{"step": "1", "lr-AdamW": "0.1"}])
    write_report(small)
    assert {path.name for path in (small / "report").iterdir()} == {"index.html", "learning_rate.png", "mine.txt"}
    assert {path.name for path in small.iterdir()} == {"metrics.csv", "report"}


def test_a_folder_of_something_else_is_refused_and_never_emptied(small: Path) -> None:
    other = small / "report"
    other.mkdir()
    (other / "index.html").write_text("<h1>mine</h1>")
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out=.*report exists and is not a report.*--overwrite"):
        write_report(small)
    assert (other / "index.html").read_text() == "<h1>mine</h1>"
    write_report(small, overwrite=True)
    assert (other / "thesis.txt").read_text() == "mine"
    assert "train_loss" in Page(other / "index.html").text


def test_the_run_itself_a_file_and_a_missing_parent_are_refused(small: Path) -> None:
    for out in (small, small.parent):
        with pytest.raises(ReportError, match="holds the run itself"):
            write_report(small, out, overwrite=True)
    with pytest.raises(ReportError, match=r"metrics.csv is a file"):
        write_report(small, small / "metrics.csv", overwrite=True)
    with pytest.raises(FileNotFoundError, match="make it first"):
        write_report(small, small / "a" / "b")
    assert {path.name for path in small.iterdir()} == {"metrics.csv"}


@pytest.mark.parametrize("failing", ["write_bytes", "rename"])
def test_a_failure_leaves_the_report_before(failing: str, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(small)
    before = {path.name: path.read_bytes() for path in (small / "report").iterdir()}
    write_csv(small / "metrics.csv", [{"step": "1", "train_loss": "0.9"}])
    original = getattr(Path, failing)

    def fail(self: Path, *args: object) -> object:
        if self.name == "index.html" or self.name.endswith(".tmp"):
            raise OSError("disk full")
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Path, failing, fail)
        with pytest.raises(OSError, match="disk full"):
            write_report(small)
    assert {path.name: path.read_bytes() for path in (small / "report").iterdir()} == before
    assert {path.name for path in small.iterdir()} == {"metrics.csv", "report"}


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(small)]) == 0
    out = capsys.readouterr().out
    assert f"{small / 'report' / 'index.html'}: 2 charts of {small}" in out
    assert "not drawn: Memory." in out
    assert main(["report", str(small), "--out", str(tmp_path / "there"), "--overwrite", "true"]) == 0
    assert (tmp_path / "there" / "index.html").is_file()


def test_errors_of_the_command_are_one_line(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small / "metrics.csv").write_text("step,accuracy\n1,0.5\n")
    for args, message in (
        ([str(small / "none")], "none is not a folder"),
        ([str(small)], f"error: Nothing to draw in {small}: logged were accuracy. Log a loss (self.log("),
    ):
        assert main(["report", *args]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert "Traceback" not in err


def test_without_matplotlib_the_extra_is_named(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_galore.report.find_spec", lambda name: None)
    assert main(["report", str(small)]) == 2
    assert 'pip install "lightning-galore[recipes]"' in capsys.readouterr().err


@pytest.mark.parametrize("module", ["__init__", "choose", "find", "page", "read", "series", "write"])
def test_reading_and_help_need_no_matplotlib(module: str) -> None:
    source = Path(lightning_galore.report.__file__).with_name(f"{module}.py").read_text("utf-8")
    imports = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {name for node in imports for name in re.split(r"[ .,]+", ast.unparse(node))}
    assert not names & {"matplotlib", "cycler", "charts", "costs", "lines", "maps", "style"}
