# SPDX-License-Identifier: Apache-2.0
"""One process of the runs under FSDP2 in plain torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .processes import begin, end
from .sharded_cases import CASES, plain_wire, together


def main(folder: Path) -> None:
    rank = begin()
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        try:
            results[name] = together(case, rank)
        except Exception as error:
            raise RuntimeError(f"case {name}") from error
    for name, case in CASES.items():
        if case.counted:
            results[f"plain-{name}"] = plain_wire(case, rank)
    end(folder, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
