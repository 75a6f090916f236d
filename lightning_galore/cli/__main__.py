# SPDX-License-Identifier: Apache-2.0
"""``python -m lightning_galore.cli`` is the command ``lightning-galore``."""

import sys

from lightning_galore.cli import main

if __name__ == "__main__":
    sys.exit(main())
