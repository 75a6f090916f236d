# SPDX-License-Identifier: Apache-2.0
"""All benchmarks one after the other: ``make bench``."""

from __future__ import annotations

import sys

from benchmarks import quantized, refresh, stagger, steps, training
from benchmarks.options import run

MEASURES = (refresh.measure, steps.measure, training.measure, stagger.measure, quantized.measure)

if __name__ == "__main__":
    sys.exit(run(MEASURES, prog="python -m benchmarks"))
