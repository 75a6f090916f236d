# SPDX-License-Identifier: Apache-2.0
"""The Trainer on two processes trains as on one, and stops with words where it cannot."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from .trainer_cases import BATCHES, CASES, EPOCHS, MODES, REFUSED, Case, run_alone

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]
Results = list[dict[str, Any]]


@lru_cache
def alone(name: str) -> dict[str, Any]:
    return run_alone(CASES[name])


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((value.double() - other[name].double()).abs().max()) for name, value in one.items())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.tolerance is not None])
def test_equals_one_process(trained: Results, name: str) -> None:
    ours, reference, tolerance = trained[0][name], alone(name), CASES[name].tolerance
    start = {key: value.detach() for key, value in CASES[name].model().named_parameters()}
    assert difference(ours["weights"], start) > 0.02
    assert tolerance is not None
    assert difference(ours["weights"], reference["weights"]) <= tolerance
    assert ours["steps"] == reference["steps"]
    assert (ours["world"], reference["world"]) == (2, 1)


@pytest.mark.parametrize("name", CASES)
def test_replicas_hold_the_same_bits(trained: Results, name: str) -> None:
    one, other = (results[name]["weights"] for results in trained)
    assert [key for key, value in one.items() if not torch.equal(value, other[key])] == []


@pytest.mark.parametrize("form", ["name", "auto", "base", "class"])
def test_all_names_of_the_strategy_give_the_same_class(trained: Results, form: str) -> None:
    for results in trained:
        names = results[f"form-{form}"]["strategy"]
        assert names[0] == "GaLoreDDPStrategy"
        assert {"GaLoreStrategy", "DDPStrategy"} <= set(names)
        assert results[f"form-{form}"]["world"] == 2


def test_all_names_of_the_strategy_train_alike(trained: Results) -> None:
    results = trained[0]
    for form in ("auto", "base"):
        assert difference(results[f"form-{form}"]["weights"], results["form-class"]["weights"]) == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_learning_rates_follow_the_scheduler(trained: Results, mode: str) -> None:
    for results in trained:
        lrs = results[f"{mode}-automatic"]["lrs"]
        assert lrs == alone(f"{mode}-automatic")["lrs"]
        assert lrs[-1][0] == pytest.approx(1e-2 * 0.9 ** (BATCHES * EPOCHS))


@pytest.mark.parametrize("mode", MODES)
def test_batch_statistics_are_those_under_plain_ddp(trained: Results, mode: str) -> None:
    for results in trained:
        ours, plain = results[f"{mode}-normed"], results["plain-normed"]
        assert difference(ours["weights"], plain["weights"]) <= 2e-6
        assert difference(ours["buffers"], plain["buffers"]) <= 2e-6
    # As under DDP, the first process's are what counts; with validation last, all have them.
    one, other = (results[f"{mode}-normed"]["buffers"] for results in trained)
    assert difference(one, other) == 0.0
    start = CASES[f"{mode}-normed"].model()
    assert difference(one, dict(start.named_buffers())) > 0.05


def test_clipping_has_clipped_and_says_by_which_norm(trained: Results) -> None:
    for mode in ("step", "project"):
        assert difference(trained[0][f"{mode}-clipped"]["weights"], trained[0][f"{mode}-manual"]["weights"]) > 1e-3
    said = "clips by the norm of what is kept"
    assert any(said in message for message in trained[0]["project-clipped"]["warnings"])
    assert not any(said in message for message in trained[0]["step-clipped"]["warnings"])


@pytest.mark.parametrize("mode", MODES)
def test_checkpoints_are_written_once(trained: Results, mode: str) -> None:
    assert [results[f"writes-{mode}"] for results in trained] == [EPOCHS, 0]


@pytest.mark.parametrize("mode", [*MODES, "dropped"])
def test_a_resumed_run_is_bit_for_bit_the_one_that_was_not_stopped(trained: Results, mode: str) -> None:
    for results in trained:
        whole, resumed = results[f"whole-{mode}"], results[f"resumed-{mode}"]
        assert whole["steps"] == resumed["steps"] == BATCHES * EPOCHS
        assert difference(whole["weights"], resumed["weights"]) == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_runs_go_on_with_another_number_of_processes(trained: Results, mode: str) -> None:
    results = trained[0]
    narrowed = run_alone(Case(mode), ckpt_path=results["folder"] / mode / "epoch=0.ckpt")
    whole = results[f"whole-{mode}"]
    for other in (narrowed, results[f"widened-{mode}"]):
        assert other["steps"] == whole["steps"]
        assert difference(other["weights"], whole["weights"]) <= 1e-5


def test_replicas_that_part_are_named(trained: Results) -> None:
    for results in trained:
        message, batches = results["meddled"]
        assert "do not hold the same body.2.weight after 4 steps" in message
        assert batches == 4


MESSAGES = {
    "int8 in mode step": r"weight_storage='int8' with mode='step' on several devices.*Use mode='project'",
    "bucket view": r"gradient_as_bucket_view: mode='project'.*or use mode='step'",
    "static graph": r"bucket_cap_mb, static_graph: mode='layerwise'",
    "comm hook": r"ddp_comm_hook: mode='project'",
    "model averaging": r"model_averaging_period: mode='project'",
    "clip by value": r"gradient_clip_val=0\.5, mode='layerwise' on several devices.*Use mode='project'",
    "clip by norm": r'gradient_clip_val=0\.5 by norm: mode="layerwise"',
    "nothing to project": r"AdamW has no weight to project, and mode='project'.*Use mode='step'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_at_setup(trained: Results, name: str) -> None:
    for results in trained:
        kind, message = results["refused"][name]
        assert kind == "MisconfigurationException"
        assert re.search(MESSAGES[name], message), message
