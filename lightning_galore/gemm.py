# SPDX-License-Identifier: Apache-2.0
"""The two products that a step is made of, with a narrow block each, at their fastest.

Shapes: ``m, n`` rows and columns of a matrix, ``r`` the width of a block, small against both.

On a CPU both are bound by how well the library's kernel fits so narrow a block. Measured at one thread of an AMD EPYC
(Zen 5, AVX-512, torch 2.13, fp32), in GFLOP/s, ``mm`` and ``addmm_`` being MKL's, the sum of 3072x768 with a decay:

========================  =====  =====  =====  ======
product                   r=2    r=8    r=32   r=128
========================  =====  =====  =====  ======
3072x768 ``G @ Q``: mm    5      19     60     85
the same transposed       6      35     60     85
the same, oneDNN          16     70     147    185
768x3072 ``P^T G``: mm    20     32     67     86
the same, oneDNN          25     62     124    174
``W += R Q^T``: addmm_    8      28     70     91
the same, oneDNN, blocks  9      37     94     166
========================  =====  =====  =====  ======

So oneDNN takes what is large enough. Torch has no public name for its fp32 product; the operator that ``torch.compile``
lowers ``linear`` to is used where it is there, else ``mm``. ``torch.backends.mkldnn.enabled`` switches it off. It holds
no copy of a matrix in either of the layouts below; in a third one, ``matrix.mT`` from the left, it would.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

#: Entries of a matrix up to which neither library nor order of the factors matters much, and another call does.
_SMALL = 2**14
#: Multiplications from which oneDNN's kernel pays for its call (about 12 us): 256x256 at r = 8, 128x128 at r = 32.
_WORTH = 2**19
#: Entries of the blocks in which a product is added to a matrix: 1 MiB. Small enough for a cache and for the C library
#: to keep: blocks of 2 MiB were handed back to the system and cleared anew each time, which took a third of the step.
_BLOCK = 2**18


def product(
    matrix: Tensor,  # (m, n)
    block: Tensor,  # (n, r), r small
) -> Tensor:
    """``matrix @ block``, ``(m, r)``. Where ``matrix`` is a transposed view, the result is one too.

    The sum runs in the same order for the same shapes, dtypes and layouts, so that whoever projects a gradient gets the
    same bits.
    """
    if _suits_onednn(matrix, block):
        if matrix.is_contiguous():
            return _onednn(matrix, block.mT)
        if matrix.mT.is_contiguous():
            return _onednn(block.mT, matrix).mT
    if matrix.is_contiguous() and (not matrix.is_cpu or matrix.numel() < _SMALL):
        return matrix @ block
    # On a CPU up to 3 times as fast as matrix @ block for a narrow block, and no slower for a wide one.
    return (block.mT @ matrix.mT).mT


def add_product_(
    matrix: Tensor,  # (m, n)
    left: Tensor,  # (m, r)
    right: Tensor,  # (n, r)
    *,
    alpha: float,
    beta: float,
) -> None:
    """``matrix`` becomes ``beta matrix + alpha left right^T``, in place; all are of one dtype.

    No temporary is larger than a block of rows.
    """
    # MKL does as well as the blocks where it need not scale the matrix as well, but for its large and thin products.
    rank, thin = left.shape[1], left.shape[1] <= 8 and matrix.numel() >= 2**21
    pays = beta != 1 or rank >= 32 or thin
    if not pays or not matrix.is_contiguous() or not _suits_onednn(matrix, left, right):
        matrix.addmm_(left, right.mT, alpha=alpha, beta=beta)
        return
    rows = max(1, _BLOCK // matrix.shape[1])
    for part, own in zip(matrix.detach().split(rows), (left * alpha).split(rows), strict=True):
        torch.add(_onednn(own, right), part, alpha=beta, out=part)


def _suits_onednn(matrix: Tensor, *blocks: Tensor) -> bool:
    """Whether oneDNN's product may be used, and pays. Tensors that are not plain know how to multiply themselves."""
    if not matrix.is_cpu or matrix.dtype != torch.float32 or matrix.numel() < _SMALL:
        return False
    rank = blocks[0].shape[1]
    if rank < 2 or matrix.numel() * rank < _WORTH or not torch.backends.mkldnn.enabled:
        return False
    plain = all(type(one) in (Tensor, nn.Parameter) and one.is_cpu for one in (matrix, *blocks))
    same = all(block.dtype == matrix.dtype for block in blocks)
    # The operator has no derivative.
    return plain and same and not torch.is_grad_enabled() and _has_onednn()


@functools.cache
def _has_onednn() -> bool:
    """Whether torch has the operator, on a processor for which the table above speaks."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _onednn(
    rows: Tensor,  # (a, k)
    others: Tensor,  # (b, k)
) -> Tensor:
    """``rows @ others^T``, ``(a, b)`` and contiguous."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, others, None, "none", [], "")
    return result
