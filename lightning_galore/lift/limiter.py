# SPDX-License-Identifier: Apache-2.0
"""Fira's norm-growth limiter: an update is at most a little longer than the last one."""

from __future__ import annotations

import torch
from torch import Tensor

#: Most that the norm of an update may grow from one step to the next (``gamma`` in arXiv 2410.01623 and 2412.05270).
GROWTH = 1.01
#: Under which name a lift keeps the last norm of a weight.
NORM = "norm"


def limit(
    norm: Tensor,  # 0-D
    entries: dict[str, Tensor],
) -> Tensor:
    """Factor on an update of this norm, 0-D: ``min(1, GROWTH * last / norm)``. Notes the norm that comes of it.

    Where there is no last norm nothing is limited. A step without an update (its gradient or its learning rate is zero)
    and one that is not finite say nothing of the scale, and leave the last norm as it is: after a norm of zero no
    weight would ever move again. Tensors only: the device is never waited for.

    Args:
        norm: Without the learning rate, which may change as it likes; in fp32 at least.
        entries: What is kept for the weight, where the last norm stands.
    """
    last = entries.get(NORM, torch.zeros_like(norm))
    factor = torch.where((last > 0) & (norm > GROWTH * last), GROWTH * last / norm, torch.ones_like(norm))
    after = norm * factor
    entries[NORM] = torch.where(torch.isfinite(after) & (after > 0), after, last)
    return factor
