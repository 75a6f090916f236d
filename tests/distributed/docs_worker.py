# SPDX-License-Identifier: Apache-2.0
"""One process of the loops that the docs show, each run as it stands there."""

from __future__ import annotations

import sys
from pathlib import Path

from .docs_blocks import loops


def main() -> None:
    for block in loops():
        sys.stdout.write("loop\n")
        exec(compile(block, "docs/distributed.md", "exec"), {"__name__": "__main__"})
    sys.stdout.write("done\n")


if __name__ == "__main__":
    assert Path(sys.argv[1]).is_dir()
    main()
