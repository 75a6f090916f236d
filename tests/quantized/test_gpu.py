# SPDX-License-Identifier: Apache-2.0
"""The same on a GPU: codes are those of the CPU, and a run in few bits trains there and resumes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_galore import GaLoreOptimizer
from lightning_galore.storage import INT4, INT8, Int8Tensor, round_stochastically_
from tests.helpers import TinyTransformer, same_bits, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("codec", [INT8, INT4], ids=["int8", "int4"])
def test_codes_are_those_of_the_cpu(codec: Any) -> None:
    value = torch.randn(130, 77, generator=torch.Generator().manual_seed(0))
    codes, absmax = codec.encode(value)
    cuda_codes, cuda_absmax = codec.encode(value.cuda())
    assert same_bits([codes, absmax], [cuda_codes.cpu(), cuda_absmax.cpu()])
    decoded = codec.decode(cuda_codes, cuda_absmax, value.shape, torch.float32)
    assert torch.equal(decoded.cpu(), codec.decode(codes, absmax, value.shape, torch.float32))


def test_rounding_is_right_in_the_mean() -> None:
    value = torch.full((200_000,), 1.0 + 2.0**-10, device="cuda")  # an eighth of the way to the next bf16 number
    rounded = torch.empty_like(value, dtype=torch.bfloat16)
    round_stochastically_(rounded, value, torch.Generator("cuda").manual_seed(0))
    assert set(rounded.unique().tolist()) == {1.0, 1.0078125}
    assert float((rounded > 1).float().mean()) == pytest.approx(0.125, abs=0.004)


@pytest.mark.parametrize("mode", ["step", "project", "layerwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_q_galore_trains_and_resumes(dtype: torch.dtype, mode: Any) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def start() -> tuple[TinyTransformer, GaLoreOptimizer]:
        model = TinyTransformer().to("cuda", dtype)
        base = bnb.optim.AdamW8bit(model.parameters(), lr=3e-3)
        return model, GaLoreOptimizer(base, model, rank=4, method="q-galore", update_proj_gap=8, scale=1.0, mode=mode)

    whole, optimizer = start()
    losses = train(whole, optimizer, [0] * 20)
    assert losses[-1] < losses[0]
    assert isinstance(whole.blocks[0].query.weight, Int8Tensor)
    first, optimizer = start()
    train(first, optimizer, [0] * 10)
    second, resumed = start()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, [0] * 10)
    plain = [[value for _, value in sorted(model.state_dict().items())] for model in (whole, second)]
    assert same_bits(*plain)
