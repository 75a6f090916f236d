# SPDX-License-Identifier: Apache-2.0
"""How a tensor is kept: data types, blocks of integer codes, rounding, and counting bytes. Knows not what it keeps."""

from lightning_galore.storage.blockwise import INT4, INT8, Blockwise
from lightning_galore.storage.int8_tensor import Int8Tensor
from lightning_galore.storage.rounding import round_stochastically_
from lightning_galore.storage.sizes import nbytes
from lightning_galore.storage.stored import CODECS, DTYPES, Stored, allocate, holds, stored_bytes, write

__all__ = [
    "CODECS",
    "DTYPES",
    "INT4",
    "INT8",
    "Blockwise",
    "Int8Tensor",
    "Stored",
    "allocate",
    "holds",
    "nbytes",
    "round_stochastically_",
    "stored_bytes",
    "write",
]
