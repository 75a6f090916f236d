# SPDX-License-Identifier: Apache-2.0
"""The Python that the page on several devices shows."""

from __future__ import annotations

import re

from .processes import ROOT

PAGE = (ROOT / "docs" / "distributed.md").read_text("utf8")


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def loops() -> list[str]:
    """Files that run in several processes."""
    return [block for block in blocks() if "init_process_group" in block]


def snippets() -> list[str]:
    """All others."""
    return [block for block in blocks() if "init_process_group" not in block]
