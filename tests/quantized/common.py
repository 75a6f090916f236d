# SPDX-License-Identifier: Apache-2.0
"""What the tests of quantized runs share: settings, an 8-bit optimizer, and looks at how weights are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_galore.storage import INT8, Int8Tensor
from tests.strategies.modules import Tiny

#: int8 weights and int4 bases.
INT8_INT4: dict[str, Any] = {"weight_storage": "int8", "basis_storage": "int4"}
#: The same by its name, with the gap that suits a few dozen steps.
Q_GALORE: dict[str, Any] = {"method": "q-galore", "update_proj_gap": 4, "min_gap": 2, "max_gap": 16}


def adamw_8bit(model: Tiny) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.optim.AdamW8bit(model.parameters(), lr=1e-2, weight_decay=0.1, min_8bit_size=16)


def coded(model: nn.Module) -> set[str]:
    """Names of the weights that are kept as int8 codes."""
    return {name for name, param in model.named_parameters() if isinstance(param, Int8Tensor)}


def assert_same_states(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Two state dicts are equal bit for bit: codes and scales too, which are compared as they are kept."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype, key
        assert torch.equal(value, other[key]), key


def is_plain(value: Any) -> bool:
    """Whether a tensor is of torch's own class."""
    return type(value) in (Tensor, nn.Parameter)


def decoded(state: Mapping[str, Tensor], key: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight from the codes and scales of a state dict, by the formula: code times scale over 127."""
    codes, absmax = state[key], state[f"{key}_absmax"]
    scale = absmax.float().repeat_interleave(INT8.block_size)[: codes.numel()]
    return (codes.flatten().float() * (scale / 127)).view(codes.shape).to(dtype)
