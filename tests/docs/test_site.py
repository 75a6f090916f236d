# SPDX-License-Identifier: Apache-2.0
"""The documentation site builds without a warning, finds a broken link, and its pages fetch nothing from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE = ("mkdocs", "material", "mkdocstrings", "latex2mathml", "nbconvert")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(any(find_spec(name) is None for name in SITE), reason='needs the extra "docs": make docs'),
]
#: What a page may take from another place without being asked: nothing.
FETCHED = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^\"'> ]+")


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=source,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=170,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_text_is_a_page_and_in_the_navigation(site: Path) -> None:
    front = (site / "index.html").read_text("utf8")
    navigation = set(re.findall(r'<a href="([^"#]+\.html)" class="md-nav__link', front))
    texts = {path.relative_to(ROOT / "docs") for kind in ("md", "ipynb") for path in (ROOT / "docs").rglob(f"*.{kind}")}
    pages = {str(path.with_suffix(".html")).replace("README", "index") for path in texts}
    assert pages - navigation <= {"index.html"}
    assert {"changelog.html", "contributing.html", "measuring.html", "recipes.html", "security.html"} <= navigation
    assert all((site / page).is_file() for page in pages | navigation)


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert FETCHED.findall(page.read_text("utf8")) == [], page.name


def test_mathematics_is_drawn_and_roles_are_links(site: Path) -> None:
    concepts = (site / "concepts.html").read_text("utf8")
    assert concepts.count("<math ") > 20
    assert "arithmatex" not in concepts
    for page in site.rglob("*.html"):
        text = re.sub(r"<(pre|code)\b.*?</\1>", "", page.read_text("utf8"), flags=re.DOTALL)
        assert not re.search(r":(class|func|meth):", text), page.name
        assert "$$" not in text, page.name


def test_the_api_has_every_public_name(site: Path) -> None:
    from lightning_galore import __all__ as names
    from lightning_galore.tasks import __all__ as tasks

    page = (site / "api.html").read_text("utf8")
    for name in {*names, *(f"tasks.{task}" for task in tasks)} - {"__version__"}:
        assert f'id="lightning_galore.{name}"' in page, name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[gone](nowhere.md)", "nowhere.md"),
        ("[gone](modes.md#nowhere)", "does not contain an anchor '#nowhere'"),
        ("[gone](../benchmarks/nowhere.md)", "nowhere.md"),
    ],
)
def test_a_broken_link_ends_the_build(line: str, message: str, tmp_path: Path) -> None:
    copy = tmp_path / "clone"
    copy.mkdir()
    for name in ("docs", "benchmarks", "examples", "recipes", "lightning_galore"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.json"))
    for name in ("mkdocs.yml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"):
        shutil.copy(ROOT / name, copy / name)
    with (copy / "docs" / "faq.md").open("a", encoding="utf8") as page:
        page.write(f"\n{line}\n")
    done = build(copy, tmp_path / "site")
    assert done.returncode != 0
    assert message in done.stderr
