# SPDX-License-Identifier: Apache-2.0
"""Bytes by category: predicted before the first step, held after it, and what plain arithmetic says."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")  # the benchmarks draw

from benchmarks.quantized import LLAMA_60M, ROBERTA, ROWS, Model, step_and_count
from benchmarks.weights import WeightSet
from lightning_galore import GaLoreOptimizer

# Odd sizes, so that blocks are not full; low-rank states of fewer and of more than 4,096 entries; a wide, a tall and a
# square matrix, and parameters that are not projected.
ODD = Model(
    matrices=WeightSet(name="odd", shapes=((99, 65), (65, 99), (70, 70), (700, 65)), rank=7),
    rest=((130, 65), (65,), (1,)),
)
MODES: list[Any] = ["step", "project", "layerwise"]


def built(model: Model, settings: Any, *, mode: Any, bits8: bool = False) -> GaLoreOptimizer:
    made = model.build()
    base: Any = torch.optim.AdamW(made.parameters(), lr=1e-3)
    if bits8:
        base = pytest.importorskip("bitsandbytes").optim.AdamW8bit(made.parameters(), lr=1e-3)
    return GaLoreOptimizer(base, made, rank=model.matrices.rank, mode=mode, stagger=False, **settings)


def assert_predicted_is_held(optimizer: GaLoreOptimizer) -> None:
    predicted = optimizer.footprint()
    assert step_and_count(optimizer) == asdict(predicted)
    assert optimizer.footprint() == predicted  # which is what is held now
    assert predicted.total == sum(asdict(predicted).values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("basis", ["param", "fp32", "int8", "int4"])
@pytest.mark.parametrize("weight", ["param", "int8"])
@pytest.mark.parametrize("bits8", [False, True], ids=["fp", "8bit"])
def test_predicted_is_held(bits8: bool, weight: str, basis: str, mode: Any) -> None:
    settings = {"basis_storage": basis, "weight_storage": weight, "accumulator_storage": "fp32"}
    assert_predicted_is_held(built(ODD, settings, mode=mode, bits8=bits8))


@pytest.mark.parametrize("proj_type", ["reverse_std", "full"])
def test_predicted_is_held_on_other_sides(proj_type: str) -> None:
    assert_predicted_is_held(built(ODD, {"method": "q-galore", "proj_type": proj_type}, mode="project", bits8=True))


@pytest.mark.parametrize("kept", ["param", "fp32", "bf16", "int8"])
def test_what_waits_between_micro_batches(kept: Any) -> None:
    assert_predicted_is_held(built(ODD, {"accumulator_storage": kept}, mode="project"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("model", [LLAMA_60M, ROBERTA], ids=["llama-60m", "roberta-base"])
def test_predicted_is_held_by_real_weight_sets(model: Model, row: Any, mode: Any) -> None:
    pytest.importorskip("bitsandbytes")
    assert_predicted_is_held(row.optimizer(model.build(), rank=model.matrices.rank, mode=mode))


def test_bytes_are_those_of_plain_arithmetic() -> None:
    optimizer = built(ODD, {"method": "q-galore"}, mode="project", bits8=True)
    weights = bases = moments = gradients = 0
    for m, n in ODD.matrices.shapes:
        short, long, rank = min(m, n), max(m, n), ODD.matrices.rank
        weights += m * n + 2 * math.ceil(m * n / 256)  # a byte an entry, a bf16 scale for each 256
        bases += math.ceil(short * rank / 2) + 2 * math.ceil(short * rank / 64)  # half a byte, a scale for each 64
        low = long * rank
        # bitsandbytes: below 4,096 entries fp32; from there a byte, and an fp32 scale for each 256.
        moments += 2 * (4 * low if low < 4096 else low + 4 * math.ceil(low / 256))
        gradients += 2 * low  # bf16
    for shape in ODD.rest:
        numel = math.prod(shape)
        weights += 2 * numel
        moments += 2 * (4 * numel if numel < 4096 else numel + 4 * math.ceil(numel / 256))
        gradients += 2 * numel
    maps = 2 * 256 * 4  # bitsandbytes' two tables of 256 values, once for all
    expected = {
        "weights": weights,
        "bases": bases,
        "moments": moments + maps,
        "gradients": gradients,
        "lifts": 0,
        "transforms": 0,
    }
    assert asdict(optimizer.footprint()) == expected


def test_int8_weights_and_int4_bases_take_less_than_half_of_bf16() -> None:
    square = Model(matrices=WeightSet(name="square", shapes=((512, 512),) * 2, rank=128), rest=((8,),))
    projected = [
        sum(getattr(one.footprint(), category) for category in ("weights", "bases", "moments"))
        for one in (
            built(square, {"method": "galore2"}, mode="step"),
            built(square, {"method": "q-galore"}, mode="step", bits8=True),
        )
    ]
    assert projected[1] < 0.5 * projected[0]


def test_frozen_parameters_have_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(16, 12, bias=False), nn.Linear(12, 8, bias=False))
    model[0].weight.requires_grad_(False)
    optimizer = GaLoreOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, rank=2)
    assert optimizer.footprint().gradients == 4 * 12 * 8


def test_gradients_of_an_adaptive_rank_are_those_of_the_rank_it_has() -> None:
    optimizer = built(ODD, {"rank_rule": "energy", "rank_energy": 0.1}, mode="project")
    step_and_count(optimizer)
    ranks = [status.rank for status in optimizer.subspaces()]
    assert min(ranks) < ODD.matrices.rank
    optimizer.zero_grad()
    assert step_and_count(optimizer)["gradients"] == optimizer.footprint().gradients
