# SPDX-License-Identifier: Apache-2.0
"""One HTML page that needs nothing else: the pictures are inside it, and nothing is fetched or run."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from lightning_galore.report.read import Refresh, RunLog, is_loss
from lightning_galore.report.series import by_weight

#: Stands in the head of each page that this package wrote, and says that it may be written anew.
MARK = '<meta name="generator" content="lightning-galore report">'
_MOST_ROWS = 1000
_MOST_NOTES = 30

_CSS = """
:root { color-scheme: light dark; --page: #f3f5f7; --card: #ffffff; --ink: #1b1f24; --muted: #57606a; --line: #d5dae0;
  --accent: #0060a0; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #0b0e12; --card: #161b22; --ink: #e6edf3;
  --muted: #9aa5b1; --line: #2c333c; --accent: #7cc4f2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .25rem; }
p { margin: 0 0 .75rem; max-width: 46rem; overflow-wrap: anywhere; }
.muted, figcaption { color: var(--muted); font-size: .92rem; }
a { color: var(--accent); }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, monospace; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; list-style: none; margin: 1rem 0 1.25rem; padding: 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 0 0 1rem; }
.facts div, section { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.facts div { padding: .6rem .9rem; }
.facts dt { color: var(--muted); font-size: .85rem; overflow-wrap: anywhere; }
.facts dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
section { padding: 1rem 1.25rem 1.1rem; margin: 0 0 1rem; break-inside: avoid; }
figure { margin: 0; }
figcaption { margin: 0 0 .6rem; max-width: 46rem; }
img { display: block; width: 100%; height: auto; }
.missing { border: 1px dashed var(--line); border-radius: .4rem; padding: .8rem 1rem; margin-top: .6rem; }
.missing p:last-child { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; margin-top: .6rem;
  width: 100%; }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--muted); font-weight: 500; }
tbody th { font-weight: 400; }
summary { cursor: pointer; }
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One chart on the page, or why it is not there.

    Args:
        slug: The name of its file and its anchor.
        title: Its heading.
        caption: How to read it.
        light: The picture for light pages, as PNG; None if it is missing.
        dark: The same for dark pages.
        alt: The picture in words.
        why: Why it is missing.
        remedy: How to get it.
    """

    slug: str
    title: str
    caption: str
    light: bytes | None = None
    dark: bytes | None = None
    alt: str = ""
    why: str = ""
    remedy: str = ""


def render(*, name: str, origin: str, log: RunLog, sections: list[Section], version: str) -> str:
    """The whole page.

    Args:
        name: What the run is called.
        origin: Which files were read, in a sentence.
        log: What was read from them.
        sections: The charts.
        version: Of this package.
    """
    links = "".join(
        f'<li><a href="#{section.slug}">{escape(section.title)}</a></li>' for section in sections if section.light
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)}: report of a low-rank run</title>
<style>{_CSS}</style>
</head>
<body>
<main>
<header>
<h1>{escape(name)}</h1>
<p class="muted">{escape(origin)}</p>
{_facts(log)}
<nav aria-label="Charts"><ul>{links}</ul></nav>
</header>
{"".join(_section(section) for section in sections)}
{_table(log)}
{_notes(log)}
<footer class="muted">lightning-galore {escape(version)}</footer>
</main>
</body>
</html>
"""


def _section(section: Section) -> str:
    title = f'<section id="{section.slug}"><h2>{escape(section.title)}</h2>\n'
    if section.light is None or section.dark is None:
        return (
            f'{title}<p class="muted">{escape(section.caption)}</p>\n<div class="missing"><p>Not drawn. '
            f"{escape(section.why)}</p><p>{escape(section.remedy)}</p></div></section>\n"
        )
    # Of a PNG the width and the height stand in bytes 16 to 24; with them the page does not jump while it loads.
    width, height = struct.unpack(">II", section.light[16:24])
    return (
        f"{title}<figure><figcaption>{escape(section.caption)}</figcaption>\n"
        f'<picture><source media="screen and (prefers-color-scheme: dark)" srcset="{_data(section.dark)}">'
        f'<img src="{_data(section.light)}" width="{width}" height="{height}" alt="{escape(section.alt)}"></picture>'
        "</figure></section>\n"
    )


def _data(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode('ascii')}"


def _facts(log: RunLog) -> str:
    """What one wants to know at a glance."""
    facts: list[tuple[str, str]] = []
    last = [series.finite[-1] for series in log.series.values() if series.finite]
    if last or log.refreshes:
        facts.append(("last step", f"{max([step for step, _ in last] or [log.refreshes[-1].step]):,.0f}"))
    for series in [one for name, one in log.series.items() if is_loss(name) and one.finite][:3]:
        facts.append((f"{series.name[:60]}, last", f"{series.finite[-1][1]:.4g}"))
    if log.refreshes:
        facts.append(("projected weights", f"{len(by_weight(log)):,}"))
        facts.append(("refreshes in the table", f"{sum(refresh.found for refresh in log.refreshes):,}"))
        failed = sum(not refresh.found for refresh in log.refreshes)
        if failed:
            facts.append(("refreshes that found no basis", f"{failed:,}"))
    rows = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts)
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def _table(log: RunLog) -> str:
    """The last state of each weight in numbers, for who wants to search or cannot see the map."""
    rows = []
    for name, refreshes in list(by_weight(log).items())[:_MOST_ROWS]:
        last = refreshes[-1]
        cells = (
            last.shape,
            last.side,
            _last(refreshes, lambda refresh: refresh.rank, "{:,.0f}"),
            _last(refreshes, lambda refresh: refresh.gap, "{:,.0f}"),
            _last(refreshes, lambda refresh: refresh.drift, "{:.3f}"),
            _last(refreshes, lambda refresh: refresh.captured_energy, "{:.3f}"),
            f"{sum(refresh.found for refresh in refreshes):,}",
            f"{sum(not refresh.found for refresh in refreshes):,}",
        )
        rows.append(
            f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        )
    if not rows:
        return ""
    heads = ("weight", "shape", "side", "rank", "gap", "drift", "captured energy", "refreshes", "failed")
    head = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        '<section id="weights"><h2>Weights</h2><details><summary>The last refresh of each projected weight in numbers'
        f'</summary><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        "</div></details></section>\n"
    )


def _last(refreshes: list[Refresh], value: Callable[[Refresh], float | None], form: str) -> str:
    found = [picked for refresh in refreshes if (picked := value(refresh)) is not None]
    return form.format(found[-1]) if found else ""


def _notes(log: RunLog) -> str:
    if not log.notes:
        return ""
    rest = [f"and {len(log.notes) - _MOST_NOTES} more"] if len(log.notes) > _MOST_NOTES else []
    items = "".join(f"<li>{escape(note)}</li>" for note in log.notes[:_MOST_NOTES] + rest)
    return f'<section id="notes"><h2>Notes on the logs</h2><ul>{items}</ul></section>\n'
