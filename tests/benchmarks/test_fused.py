# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import fused
from benchmarks.optimizers import FULL_RANK
from benchmarks.options import Options
from benchmarks.training import QUICK_CASES


def test_kept_bytes_are_those_of_activations() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    inputs = torch.randn(32, 8)
    # What tanh gives is kept by itself and by the second layer, once; parameters do not count.
    assert fused.kept_bytes(lambda: model(inputs).sum(), model) == 4 * (32 * 8 + 32 * 16)


@pytest.mark.filterwarnings("ignore")
def test_less_is_kept_where_layers_are_fused() -> None:
    report, picture = fused.measure(Options(quick=True))
    (held,) = report.measurements
    kept = {name: row["kept_bytes"] for name, row in held["ways"].items()}
    assert kept[fused.COMPRESSED] < kept[fused.FUSED] < kept[fused.ORDINARY] == kept[FULL_RANK]
    assert held["name"] == QUICK_CASES[0].name
    assert picture.axes


def test_convolutions_are_timed_both_ways() -> None:
    report, picture = fused.measure_convolutions(Options(quick=True))
    (held,) = report.measurements
    assert held["ways"].keys() == fused.CONVOLUTION_WAYS.keys()
    assert held["ways"][fused.UNFUSED]["steps_of_full_rank"]["median"] == 1
    assert picture.axes
