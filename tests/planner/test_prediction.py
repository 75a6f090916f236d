# SPDX-License-Identifier: Apache-2.0
"""What is predicted without data is what real training holds: the optimizer to the byte, the peak to a few of them."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

pytest.importorskip("transformers")

from lightning_galore import GaLoreOptimizer
from lightning_galore.planner import Recipe, rehearse
from lightning_galore.planner.fakes import Job
from lightning_galore.planner.rehearsal import footprint_of
from lightning_galore.storage import nbytes
from tests.planner.models import STEPS, job, plainly, recipe, trained

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")

#: Far within the 5% that users are promised: bitsandbytes' two tables of codes, and what Python itself holds.
TOLERANCE = 0.004
GALORE = ("galore-step", "galore-project", "galore-layerwise")
FEW_BITS = ("galore-8bit", "q-galore")


def assert_peaks(one: Job, how: Recipe, *, checkpointing: bool = False) -> None:
    real, _ = trained(one, how, checkpointing=checkpointing)
    found = rehearse(one, how, checkpointing=checkpointing)
    predicted = {step: moment.total for step, moment in found.peaks.items()}
    for step, peak in zip(STEPS, real, strict=True):
        if step in predicted:  # ordinary training refreshes nothing
            assert predicted[step] == pytest.approx(peak, rel=TOLERANCE), (step, predicted, real)
    assert found.peak.total == max(predicted.values())
    assert sum(found.peak.by_category.values()) == found.peak.total


@pytest.mark.parametrize("name", ["adamw", *GALORE, "lora"])
@pytest.mark.parametrize(("rows", "length"), [(2, 16), (8, 64)])
@pytest.mark.parametrize("kind", ["llama", "encoder"])
def test_peaks(kind: str, rows: int, length: int, name: str) -> None:
    assert_peaks(job(kind, rows, length), recipe(name))


@pytest.mark.parametrize("name", ["galore-fused", "galore-compressed"])
@pytest.mark.parametrize("kind", ["llama", "encoder"])
def test_peaks_of_fused_layers(kind: str, name: str) -> None:
    assert_peaks(job(kind, 8, 64), recipe(name))


def test_peaks_of_fused_layers_that_begin_with_unit_vectors() -> None:
    """The first step is that of the schedule; of later ones only the fullest is rehearsed."""
    one, how = job("llama", 8, 64), recipe("galore-compressed", stagger=True)
    real, _ = trained(one, how)
    found = rehearse(one, how)
    assert found.peaks["first"].total == pytest.approx(real[0], rel=TOLERANCE)
    assert found.peak.total == pytest.approx(max(real), rel=TOLERANCE)


def test_what_fused_layers_keep() -> None:
    one, kept = job("encoder", 8, 64), {}
    for name in ("galore-project", "galore-fused", "galore-compressed"):
        found = rehearse(one, recipe(name, stagger=True, update_proj_gap=1000, refresh_share=0.01, rank=2))
        kept[name] = found.activations
        assert found.footprint.bases > 0
    assert kept["galore-compressed"] < kept["galore-fused"] < kept["galore-project"]


@pytest.mark.parametrize("name", ["adamw-8bit", *FEW_BITS])
@pytest.mark.parametrize("kind", ["llama", "encoder"])
def test_peaks_of_few_bits(kind: str, name: str) -> None:
    pytest.importorskip("bitsandbytes")
    assert_peaks(job(kind, 2, 16, torch.bfloat16), recipe(name))


@pytest.mark.parametrize("name", ["adamw", "galore-layerwise"])
@pytest.mark.parametrize("kind", ["llama", "encoder"])
def test_peaks_with_checkpointing(kind: str, name: str) -> None:
    assert_peaks(job(kind, 8, 64, torch.bfloat16), recipe(name), checkpointing=True)


@pytest.mark.parametrize("name", ["adamw", *GALORE])
def test_peaks_of_a_plain_loop(name: str) -> None:
    one = job("llama", 2, 16, torch.bfloat16)
    assert_peaks(plainly(one), recipe(name))


def test_another_optimizer_has_other_temporaries() -> None:
    """The loop of torch over parameters makes two of a weight's size, which the fused kernel does not."""
    one = plainly(job("llama", 2, 16))
    assert_peaks(one, recipe("adamw", "adamw"))
    fused, loop = (rehearse(one, recipe("adamw", base)) for base in ("adamwfused", "adamw"))
    assert loop.workspace > fused.workspace + 2 * 4 * 64 * 176


def test_lightnings_loop_holds_the_last_gradients_in_forward() -> None:
    one = job("llama", 8, 64)
    late, early = (rehearse(loop, recipe("adamw")).peaks["ordinary"] for loop in (one, plainly(one)))
    assert late.by_category["gradients"] > early.by_category["gradients"]
    assert late.total > early.total
    assert late.phase == "forward" or late.order < 3


@pytest.mark.parametrize("basis", ["param", "int8", "int4"])
@pytest.mark.parametrize("weight", ["param", "int8"])
@pytest.mark.parametrize("name", GALORE)
@pytest.mark.parametrize("base", ["adamwfused", "adamw8bit"])
def test_states_to_the_byte(base: str, name: str, weight: str, basis: str) -> None:
    if base == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    one, how = job("llama", 2, 16), recipe(name, base, weight_storage=weight, basis_storage=basis)
    predicted = footprint_of(one, how)
    optimizer: GaLoreOptimizer = trained(one, how, steps=1)[1]
    held = optimizer.footprint()
    buffers = nbytes(list(one.module.buffers()))
    assert asdict(predicted) == {**asdict(held), "weights": held.weights + buffers}
    assert held.bases > 0


def test_nothing_of_the_module_changes_and_nothing_real_is_made() -> None:
    pytest.importorskip("bitsandbytes")
    one = job("llama", 2, 16)
    before = {name: param.detach().clone() for name, param in one.module.named_parameters()}
    state = torch.random.get_rng_state()
    rehearse(one, recipe("q-galore"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(param, before[name]) for name, param in one.module.named_parameters())
    assert all(param.grad is None and type(param) is torch.nn.Parameter for param in one.module.parameters())
    # Tables that bitsandbytes shares among optimizers are still real.
    _, optimizer = trained(one, recipe("galore-8bit"))
    assert all(type(value) is torch.Tensor for state in optimizer.state.values() for value in state.values()
               if isinstance(value, torch.Tensor))  # fmt: skip
