# SPDX-License-Identifier: Apache-2.0
"""Side-by-side measurements of this package and its peers; ``python -m benchmarks --help``."""
