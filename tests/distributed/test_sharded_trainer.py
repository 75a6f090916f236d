# SPDX-License-Identifier: Apache-2.0
"""The Trainer with FSDP2 on two processes trains as on one; its checkpoints go on anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_galore import GaLoreModelParallelStrategy, GaLoreStrategy
from tests.strategies.modules import SETTINGS, Tiny

from .processes import free_port
from .sharded_trainer_cases import CASES, IN_ONE_FILE, REFUSED, SAVED, on_one
from .test_trainer import difference
from .trainer_cases import BATCHES, EPOCHS, MODES, Rows, fit, make_trainer

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log:UserWarning"),
]
Results = list[dict[str, Any]]
SAVINGS = [*((name, "folder") for name in SAVED), *((name, "file") for name in IN_ONE_FILE)]


@lru_cache
def alone(name: str) -> dict[str, Any]:
    case = CASES[name]
    return on_one({**case.settings, "mode": case.mode}, case.model(), **case.trainer)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(sharded_trained: Results, name: str) -> None:
    ours, reference, tolerance = sharded_trained[0][name], alone(name), CASES[name].tolerance
    start = {key: value.detach() for key, value in CASES[name].model().named_parameters()}
    assert difference(ours["weights"], start) > 0.02
    assert tolerance is not None
    assert difference(ours["weights"], reference["weights"]) <= tolerance
    assert ours["steps"] == reference["steps"]
    assert ours["lrs"] == reference["lrs"]
    assert (ours["world"], reference["world"]) == (2, 1)


@pytest.mark.parametrize("name", ["step-automatic", "project-clipped", "layerwise-clipped", "project-stacked"])
def test_nothing_is_warned_of(sharded_trained: Results, name: str) -> None:
    for results in sharded_trained:
        assert [said for said in results[name]["warnings"] if "GaLore" in said or "mode=" in said] == []


@pytest.mark.parametrize("form", ["name", "base", "class"])
def test_all_names_of_the_strategy_give_the_same_class(sharded_trained: Results, form: str) -> None:
    for results in sharded_trained:
        names = results[f"form-{form}"]["strategy"]
        assert names[0] == "GaLoreModelParallelStrategy"
        assert {"GaLoreStrategy", "ModelParallelStrategy"} <= set(names)
        assert results[f"form-{form}"]["world"] == 2


def test_weights_and_moments_lie_side_by_side(sharded_trained: Results) -> None:
    rows, columns = "(Shard(dim=0),)", "(Shard(dim=1),)"
    for results in sharded_trained:
        seen = results["placements"]
        assert seen["body.0.weight"] == f"{rows} {rows} (16, 3)"  # projected on the right, cut along its rows
        assert seen["body.2.weight"] == f"{columns} {columns} (3, 16)"  # on the left, along its columns
        assert seen["head.weight"] == f"{columns} {columns} (4, 12)"  # not projected: as it would be


def test_the_strategy_from_yaml(sharded_trained: Results) -> None:
    for results in sharded_trained:
        assert results["yaml"]["name"][:3] == (128, 0.25, 3)
        assert results["yaml"]["class"][:3] == (5, 2.0, 3)
        assert "3 of 8 parameters are projected" in results["yaml"]["class"][3]


@pytest.mark.parametrize(("name", "form"), SAVINGS)
def test_a_resumed_run_is_bit_for_bit_the_one_that_was_not_stopped(
    sharded_trained: Results, name: str, form: str
) -> None:
    for results in sharded_trained:
        whole, resumed = results[f"whole-{name}-{form}"], results[f"resumed-{name}-{form}"]
        assert whole["steps"] == resumed["steps"]
        assert difference(whole["weights"], resumed["weights"]) == 0.0
        start = {key: value.detach() for key, value in SAVED[name][1]().named_parameters()}
        assert difference(whole["weights"], start) > 0.02


@pytest.mark.parametrize(("name", "form"), SAVINGS)
def test_one_process_goes_on(sharded_trained: Results, name: str, form: str) -> None:
    results, (settings, model) = sharded_trained[0], SAVED[name]
    narrowed = on_one(settings, model(), ckpt_path=results["folder"] / f"{name}-{form}" / "epoch=0.ckpt")
    whole = results[f"whole-{name}-{form}"]
    assert narrowed["steps"] == whole["steps"]
    assert difference(narrowed["weights"], whole["weights"]) <= 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["ddp-{}-folder", "ddp-{}-file", "from-ddp-{}", "from-alone-{}"])
def test_ddp_fsdp2_and_one_device_go_on_with_each_others(sharded_trained: Results, way: str, mode: str) -> None:
    for results in sharded_trained:
        other, whole = results[way.format(mode)], results[f"whole-{mode}-folder"]
        assert other["steps"] == whole["steps"] == BATCHES * EPOCHS
        assert difference(other["weights"], whole["weights"]) <= 1e-5


@pytest.mark.parametrize("name", ["configured", "shard"])
def test_another_placement_goes_on(sharded_trained: Results, name: str) -> None:
    for results in sharded_trained:
        assert difference(results[f"{name}-from-step"]["weights"], results["whole-step-folder"]["weights"]) <= 1e-5


@pytest.fixture
def _one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As ``torchrun --nproc_per_node=1`` would start it."""
    numbers = {"RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    more = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "tests"}
    for name, value in {**numbers, **more}.items():
        monkeypatch.setenv(name, str(value))
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["folder", "file"])
def test_fsdp2_on_one_process_goes_on(sharded_trained: Results, mode: str, form: str) -> None:
    results = sharded_trained[0]
    strategy = GaLoreModelParallelStrategy(**SETTINGS, mode=mode)  # type: ignore[arg-type]
    narrowed = fit(Tiny(), strategy, ckpt_path=results["folder"] / f"{mode}-{form}" / "epoch=0.ckpt")
    assert narrowed["world"] == 1
    assert difference(narrowed["weights"], results[f"whole-{mode}-folder"]["weights"]) <= 1e-5


def test_folders_are_laid_out_as_lightnings(sharded_trained: Results) -> None:
    results = sharded_trained[0]
    for mode in MODES:
        assert results["files"][mode] == ["epoch=0.ckpt", "epoch=1.ckpt"]  # nothing beside them
        inside = {path.name for path in (results["folder"] / f"{mode}-folder" / "epoch=0.ckpt").iterdir()}
        assert inside == {".metadata", "meta.pt", "__0_0.distcp", "__1_0.distcp"}


@pytest.mark.parametrize("form", ["folder", "file"])
def test_evaluation_takes_the_weights_of_a_checkpoint(sharded_trained: Results, form: str) -> None:
    path = str(sharded_trained[0]["folder"] / f"step-{form}" / "epoch=1.ckpt")
    model, data = Tiny(), DataLoader(Rows(), batch_size=None)
    wanted = make_trainer(GaLoreStrategy(**SETTINGS)).predict(model, data, ckpt_path=path)
    assert wanted is not None
    rows = len(wanted[0]) // 2
    for rank, results in enumerate(sharded_trained):
        evaluated = results["evaluated"][form]
        for batch, whole in zip(evaluated["predicted"], wanted, strict=True):
            torch.testing.assert_close(batch, whole[rank * rows :][:rows], rtol=1e-5, atol=1e-6)
        values = {name: value for one in evaluated["metrics"] for name, value in one.items()}
        assert values.keys() == {"val_loss", "test_loss"}
        assert values["val_loss"] == values["test_loss"] < 0.5


def test_bases_that_part_are_named(sharded_trained: Results) -> None:
    for results in sharded_trained:
        message, batches = results["meddled"]
        assert re.search(r"do not hold the same galore_basis of body\.0\.weight after [34] steps", message), message
        assert batches == 4


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_at_setup(sharded_trained: Results, name: str) -> None:
    for results in sharded_trained:
        kind, message = results["refused"][name]
        if kind == "ModuleNotFoundError":
            pytest.skip(message)
        assert kind in ("MisconfigurationException", "ValueError")
        assert re.search(REFUSED[name][3], message), message


MISFITS: Mapping[str, str] = {
    "rank": r"subspace of body\.0\.weight has rank=3, side=right.*this run has rank=2.*Set rank=3",
    "side": r"subspace of body\.2\.weight has rank=3, side=left.*side=right.*load its weights only",
    "plain": r"holds no subspace for body\.0\.weight: its optimizer state is full-rank\. Load its weights only",
}


@pytest.mark.parametrize("form", ["folder", "file"])
@pytest.mark.parametrize("name", MISFITS)
def test_a_checkpoint_that_does_not_fit_changes_nothing(sharded_trained: Results, name: str, form: str) -> None:
    for results in sharded_trained:
        message, unchanged = results["misfits"][f"{name}-{form}"]
        assert re.search(r"^ValueError: .*" + MISFITS[name], message), message
        assert unchanged
