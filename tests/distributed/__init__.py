# SPDX-License-Identifier: Apache-2.0
"""Several processes on CPU: each spawn runs many named cases, and many small tests look at what they left."""
