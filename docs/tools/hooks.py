# SPDX-License-Identifier: Apache-2.0
"""What MkDocs does not do: pages from outside of ``docs`` and links to them, notebooks, mathematics, a nav by pattern.

The texts of the repository link to each other as files, so that they can be read there; here these links become links
of the site. Mathematics becomes MathML, which browsers draw without a script or a font from elsewhere.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]
#: Texts of the repository that are pages of the site too.
PAGES = {
    "README.md": "overview.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "measuring.md",
    "recipes/README.md": "recipes.md",
}
TEXTS = (".md", ".ipynb")
_LINK = re.compile(r"(!?)\[((?:[^\]\n]|\n(?!\n))*)\]\(([^)\s#:]+)(#[\w-]+)?\)")
_CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]+`", flags=re.DOTALL | re.MULTILINE)
_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)
_TEST = re.compile(r"<code>[\w/.:]*test_[\w.:]*</code>")  # long names in narrow cells
_IMAGE = re.compile(r'(<img alt="[^"]*" src="([^":]+)" />)(?!</a>)')
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):<code>(~?)([\w.]+)</code>")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Write the navigation out."""
    docs = Path(config.docs_dir)
    there = {path.relative_to(docs).with_suffix(".md").as_posix() for path in docs.rglob("*") if path.suffix in TEXTS}
    there |= set(PAGES.values())
    named = {name for name in _leaves(config.nav) if "*" not in name}
    config.nav = _expand(config.nav, sorted(there - named))
    return config


def _leaves(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from _leaves(item)


def _expand(nav: list[Any], free: list[str]) -> list[Any]:
    """``nav`` with each pattern replaced by the names in ``free`` that match, which are taken out of it."""
    found: list[Any] = []
    for item in nav:
        if isinstance(item, dict):
            (title, inner), *_ = item.items()
            inner = _expand(inner, free) if isinstance(inner, list) else inner
            found += [{title: inner}] if inner else []
        elif "*" in item:
            # A star ends at a slash.
            names = [name for name in free if fnmatch(name, item) and name.count("/") == item.count("/")]
            free[:] = [name for name in free if name not in names]
            found += names
        else:
            found.append(item)
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the texts from outside of ``docs``, the notebooks, and the pictures that any text shows."""
    for source, page in PAGES.items():
        if files.get_file_from_path(page) is None and (ROOT / source).exists():
            files.append(File.generated(config, page, content=(ROOT / source).read_text("utf8")))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        for file in _pages_of(notebook, config):
            files.append(file)
    texts = {file.src_uri: file.content_string for file in files.documentation_pages() if file.src_uri.endswith(".md")}
    for page, text in texts.items():
        for match in _LINK.finditer(text):
            target = _in_repository(page, match[3])
            if match[1] and not target.startswith("docs/") and files.get_file_from_path(f"assets/{target}") is None:
                picture = str(ROOT / target)
                files.append(File.generated(config, f"assets/{target}", abs_src_path=picture))
    return files


def _pages_of(notebook: File, config: MkDocsConfig) -> Iterator[File]:
    """A notebook as it was run, and its pictures."""
    name = PurePosixPath(notebook.src_uri)
    folder = f"{name.stem}_files"
    exporter = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    text, resources = exporter.from_filename(notebook.abs_src_path, {"output_files_dir": folder})
    yield File.generated(config, str(name.with_suffix(".md")), content=text)
    for picture, content in resources["outputs"].items():
        yield File.generated(config, str(name.parent / picture), content=content)


def _home(page: str) -> str:
    """Where the text of a page stands in the repository."""
    return next((source for source, name in PAGES.items() if name == page), f"docs/{page}")


def _in_repository(page: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(_home(page)), link))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links of the site; of what is not on it the path is told."""
    here = page.file.src_uri
    code = [match.span() for match in _CODE.finditer(markdown)]

    def moved(match: re.Match[str]) -> str:
        target = _in_repository(here, match[3])
        if any(start <= match.start() < end for start, end in code) or not (ROOT / target).exists():
            return match[0]  # a link that is broken stays, and is reported
        if target in PAGES:
            place = PAGES[target]
        elif match[1] and not target.startswith("docs/"):
            place = f"assets/{target}"
        else:
            place = re.sub(r"\.ipynb$", ".md", target.removeprefix("docs/"))
        if files.get_file_from_path(place) is None:
            return f"`{target}`" if match[2].strip("`") == target else f"{match[2]} (`{target}`)"
        return f"{match[1]}[{match[2]}]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{match[4] or ''})"

    return _LINK.sub(moved, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draw mathematics, and turn Sphinx's roles into links where there is something to link to."""

    def drawn(match: re.Match[str]) -> str:
        block = match[1] == "div"
        text = convert(html.unescape(match[2]).strip(), display="block" if block else "inline")
        return f'<div class="math">{text}</div>' if block else text

    def linked(match: re.Match[str]) -> str:
        words = match[2].rpartition(".")[2] if match[1] else match[2]
        return f'<autoref identifier="{match[2]}" optional><code>{words}</code></autoref>'

    def breakable(match: re.Match[str]) -> str:
        return re.sub(r"(::|_)", r"\1<wbr>", match[0])

    content = _IMAGE.sub(r'<a href="\2">\1</a>', content)  # to its full size
    return _TEST.sub(breakable, _ROLE.sub(linked, _MATH.sub(drawn, content)))
