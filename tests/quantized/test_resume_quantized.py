# SPDX-License-Identifier: Apache-2.0
"""Quantized runs that are resumed equal those that were not stopped, bit by bit; int8 and other checkpoints mix."""

from __future__ import annotations

import copy
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer
from lightning_galore.weights import plain_state_dict
from tests.modes.test_equal_weights import sgd
from tests.strategies.modules import (
    BATCHES,
    PROJECTED,
    Make,
    Tiny,
    adamw,
    assert_same_state,
    batches,
    fit,
    galore,
    loader,
    make_trainer,
    the_optimizer,
)
from tests.strategies.test_resume import Wide

from .common import INT8_INT4, Q_GALORE, adamw_8bit, assert_same_states, coded, decoded

# The tests below take their batches by the number of the step.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]

MAKES: dict[str, Make] = {"AdamW": adamw, "AdamW8bit": adamw_8bit}
STEPS, AT = 2 * BATCHES, {"inside an epoch": 4, "between epochs": BATCHES}


class ByStep(Wide):
    """Takes its batch by the number of the step: Lightning begins an epoch's data anew when it resumes inside it."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        own = [one.to(batch[0].dtype) for one in batches()[self.trainer.global_step % BATCHES]]
        return super().training_step(own, batch_idx)


def run(make: Make, folder: Path, *, at: int, resume: Path | None = None, **settings: Any) -> tuple[ByStep, Trainer]:
    model = ByStep(make)
    if resume is not None:  # what is not loaded stays zero
        for param in model.parameters():
            nn.init.zeros_(param)
    precision = settings.pop("precision", "32-true")
    saver = ModelCheckpoint(folder, every_n_train_steps=at, save_top_k=-1, filename="{step}")
    keep: dict[str, Any] = {"callbacks": [saver], "enable_checkpointing": True, "limit_val_batches": 0}
    return model, fit(model, galore(**settings), max_epochs=2, precision=precision, ckpt_path=resume, **keep)


def assert_resumes(make: Make, folder: Path, *, at: int, **settings: Any) -> ByStep:
    straight, whole = run(make, folder, at=at, **settings)
    resumed, rest = run(make, folder, at=at, resume=folder / f"step={at}.ckpt", **settings)
    assert rest.global_step == whole.global_step == STEPS
    assert resumed.losses == straight.losses[at:]
    assert len(resumed.losses) == STEPS - at
    assert coded(resumed) == coded(straight)
    assert_same_states(resumed.state_dict(), straight.state_dict())
    assert_same_state(the_optimizer(rest), the_optimizer(whole))
    return straight


WEIGHTS, BASES, MODES = ("param", "int8"), ("param", "bf16", "int8", "int4"), ("step", "project", "layerwise")
# Each pair of weights, bases and optimizers, in turn in the other ways; all products are in the slow test.
TURNS = [
    (*one, MODES[i % 3], list(AT)[(i // 3) % 2], one[0] == "int8" and i % 4 != 1)
    for i, one in enumerate(itertools.product(WEIGHTS, BASES, MAKES))
]


@pytest.mark.parametrize(("weight", "basis", "base", "mode", "at", "stochastic"), TURNS)
def test_resume_is_exact(
    weight: str, basis: str, base: str, mode: str, at: str, stochastic: bool, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"weight_storage": weight, "basis_storage": basis, "mode": mode}
    model = assert_resumes(MAKES[base], tmp_path, at=AT[at], stochastic_round=stochastic, **settings)
    assert coded(model) == (set(PROJECTED) if weight == "int8" else set())


@pytest.mark.slow
@pytest.mark.parametrize("at", AT)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("base", MAKES)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.filterwarnings("ignore:stochastic_round=True:UserWarning")
def test_resume_is_exact_for_all(
    weight: str, basis: str, base: str, mode: str, stochastic: bool, precision: str, at: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"weight_storage": weight, "basis_storage": basis, "mode": mode, "precision": precision}
    assert_resumes(MAKES[base], tmp_path, at=AT[at], stochastic_round=stochastic, **settings)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_resume_is_exact_with_random_rounding_of_all_weights(weight: str, precision: str, tmp_path: Path) -> None:
    if weight == "param" and precision == "bf16-mixed":
        pytest.skip("its weights are fp32, which is not rounded")
    assert_resumes(
        adamw_8bit, tmp_path, at=4, precision=precision, weight_storage=weight, stochastic_round=True, mode="layerwise"
    )


@pytest.mark.parametrize("at", AT)
def test_q_galore_with_its_adaptive_gap_resumes_exactly(at: str, tmp_path: Path) -> None:
    assert_resumes(adamw_8bit, tmp_path, at=AT[at], **Q_GALORE)
    states = torch.load(tmp_path / f"step={AT[at]}.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    kept = [state for state in states.values() if "galore_basis" in state]
    assert len(kept) == 2
    assert all(state["galore_schedule"] != 0 for state in kept)  # "fixed" notes nothing


def test_states_grow_no_other_keys_by_random_rounding(tmp_path: Path) -> None:
    """A run may go on without it, and the other way round."""
    run(adamw, tmp_path, at=BATCHES, precision="bf16-true", stochastic_round=True)
    for stochastic in (False, True):
        _, trainer = run(
            adamw, tmp_path, at=BATCHES, resume=tmp_path / "step=6.ckpt", precision="bf16-true",
            stochastic_round=stochastic,
        )  # fmt: skip
        assert trainer.global_step == STEPS


# -- checkpoints of one kind in runs of another ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, ByStep]]:
    """A checkpoint after the first epoch and the model at the end, of an int8 run and of a float run."""
    found = {}
    for weight in WEIGHTS:
        folder = tmp_path_factory.mktemp(weight)
        model, trainer = run(adamw_8bit, folder, at=BATCHES, weight_storage=weight, basis_storage="int4")
        trainer.save_checkpoint(folder / "last.ckpt")
        found[weight] = (folder, model)
    return found


def metrics(model: ByStep, trainer: Trainer, ckpt_path: Path | None) -> tuple[float, float, Tensor]:
    (valued,) = trainer.validate(model, loader(2), ckpt_path=ckpt_path, verbose=False)
    (tested,) = trainer.test(model, loader(2), ckpt_path=ckpt_path, verbose=False)
    predicted = trainer.predict(model, loader(2), ckpt_path=ckpt_path)
    assert predicted is not None
    return valued["val_loss"], tested["test_loss"], torch.cat(predicted)  # type: ignore[arg-type]


@pytest.mark.parametrize("own", WEIGHTS)
@pytest.mark.parametrize("written", WEIGHTS)
def test_evaluating_a_checkpoint_without_fit(
    written: str, own: str, saved: dict[str, tuple[Path, ByStep]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, trained = saved[written]
    fresh = ByStep(adamw_8bit)
    with caplog.at_level(logging.INFO):
        ours = metrics(fresh, make_trainer(galore(weight_storage=own)), folder / "last.ckpt")
    assert coded(fresh) == (set(PROJECTED) if written == own == "int8" else set())
    assert ("int8 weights are decoded" in caplog.text) == (written == "int8" and own == "param")
    expected = metrics(trained, make_trainer("auto"), None)
    assert ours[:2] == pytest.approx(expected[:2], rel=1e-6)
    torch.testing.assert_close(ours[2], expected[2], rtol=0, atol=1e-6)


def test_evaluating_in_floating_point_what_was_trained_in_int8(saved: dict[str, tuple[Path, ByStep]]) -> None:
    path = saved["int8"][0] / "step=6.ckpt"
    model = ByStep(adamw)
    fit(model, galore(**INT8_INT4))
    make_trainer(galore()).validate(model, loader(2), ckpt_path=path, verbose=False)
    assert coded(model) == set()
    state = torch.load(path, weights_only=True)["state_dict"]
    for name in PROJECTED:
        assert torch.equal(model.get_parameter(name), decoded(state, name))


def test_int8_checkpoint_goes_on_in_floating_point(
    saved: dict[str, tuple[Path, ByStep]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = saved["int8"]
    path = folder / "step=6.ckpt"
    with caplog.at_level(logging.INFO):
        resumed, trainer = run(
            adamw_8bit, tmp_path, at=STEPS, resume=path, weight_storage="param", basis_storage="int4"
        )
    assert "int8 weights are decoded, as weight_storage is not 'int8'" in caplog.text
    assert (trainer.global_step, coded(resumed)) == (STEPS, set())

    # What it must equal: a float checkpoint with the decoded weights.
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["state_dict"]
    for key in PROJECTED:
        state[key] = decoded(state, key)
        del state[f"{key}_absmax"]
    torch.save(checkpoint, tmp_path / "float.ckpt")
    expected, _ = run(
        adamw_8bit, tmp_path, at=STEPS, resume=tmp_path / "float.ckpt", weight_storage="param", basis_storage="int4"
    )
    assert_same_states(resumed.state_dict(), expected.state_dict())


def test_float_checkpoint_goes_on_in_int8(saved: dict[str, tuple[Path, ByStep]], tmp_path: Path) -> None:
    folder, straight = saved["param"]
    resumed, trainer = run(adamw_8bit, tmp_path, at=STEPS, resume=folder / "step=6.ckpt", **INT8_INT4)
    assert (trainer.global_step, coded(resumed)) == (STEPS, set(PROJECTED))
    for name, value in plain_state_dict(resumed.state_dict()).items():
        # The same course, but for some roundings of the weights.
        torch.testing.assert_close(value, straight.state_dict()[name], rtol=0, atol=0.03)
    assert not torch.equal(resumed.body[0].weight, torch.zeros(256, 8))


def test_int8_checkpoint_is_not_loaded_silently_without_galore(saved: dict[str, tuple[Path, ByStep]]) -> None:
    with pytest.raises(RuntimeError, match=r"Unexpected key.*body\.0\.weight_absmax"):
        make_trainer("auto").validate(ByStep(adamw_8bit), loader(2), ckpt_path=saved["int8"][0] / "last.ckpt")


# -- one module in several runs ----------------------------------------------------------------------------------------


def test_a_module_of_an_int8_run_trains_in_floating_point_again(caplog: pytest.LogCaptureFixture) -> None:
    model = Wide(adamw)
    fit(model, galore(**INT8_INT4))
    state = copy.deepcopy(plain_state_dict(model.state_dict()))
    with caplog.at_level(logging.INFO):
        fit(model, galore())
    assert "2 int8 weights of the module are decoded" in caplog.text
    expected = Wide(adamw)
    expected.load_state_dict(state)
    fit(expected, galore())
    assert coded(model) == set()
    assert_same_states(model.state_dict(), expected.state_dict())


def test_what_the_next_run_does_not_project_is_decoded(caplog: pytest.LogCaptureFixture) -> None:
    model = Wide(adamw)
    fit(model, galore(**INT8_INT4))
    for mode in MODES:
        fit(model, galore(**INT8_INT4, mode=mode, ignore_modules=["body.0"]))
        assert coded(model) == {"body.2.weight"}
        assert "not project: body.0.weight" in caplog.text or mode != "step"
        fit(model, galore(**INT8_INT4))
        assert coded(model) == set(PROJECTED)


def test_two_fits_in_a_row_go_on_with_the_same_codes() -> None:
    model = Wide(adamw)
    trainer = fit(model, galore(**INT8_INT4))
    before = copy.deepcopy(model.state_dict())
    again = Wide(adamw)
    again.load_state_dict(plain_state_dict(before))
    trainer.fit_loop.max_epochs = 0
    fit(model, galore(**INT8_INT4), max_steps=0)
    assert_same_states(model.state_dict(), before)


def test_own_wrapped_optimizer_of_another_storage_is_refused() -> None:
    model = Wide(lambda model: GaLoreOptimizer(adamw(model), model, rank=3, weight_storage="int8"))
    with pytest.raises(MisconfigurationException, match=r"weight_storage='int8', and the strategy has.*'param'"):
        fit(model, galore())
    same = Wide(lambda model: GaLoreOptimizer(adamw(model), model, rank=3, weight_storage="int8"))
    fit(same, galore(weight_storage="int8"))
    assert coded(same) == set(PROJECTED)


# -- copies ------------------------------------------------------------------------------------------------------------


def steps(model: Tiny, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        model.loss([one.to(model.head.weight.dtype) for one in batches()[step % BATCHES]]).backward()
        optimizer.step()
        optimizer.zero_grad()


# bitsandbytes' own optimizers do not survive a deepcopy.
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [adamw, sgd], ids=lambda make: make.__name__)
def test_copies_in_the_middle_of_a_run_go_on_alike(make: Make, mode: str) -> None:
    model = Wide(make)
    settings: dict[str, Any] = {"rank": 3, "update_proj_gap": 4, "mode": mode, **INT8_INT4}
    optimizer = GaLoreOptimizer(make(model), model, **settings)
    steps(model, optimizer, 0, 5)
    twin, other = copy.deepcopy((model, optimizer))
    steps(model, optimizer, 5, 9)
    middle = copy.deepcopy(twin.state_dict())
    assert_same_states(twin.state_dict(), middle)  # nothing is shared
    steps(twin, other, 5, 9)
    assert coded(twin) == set(PROJECTED)
    assert_same_states(twin.state_dict(), model.state_dict())
    assert_same_state(other, optimizer)
    assert not torch.equal(middle["body.0.weight"], model.state_dict()["body.0.weight"])


def test_another_dtype_keeps_the_codes_and_goes_on() -> None:
    model = Wide(adamw)
    optimizer = GaLoreOptimizer(sgd(model), model, rank=3, **INT8_INT4)
    steps(model, optimizer, 0, 3)
    before = model.state_dict()
    codes = {key: before[key].clone() for key in before if "body.0.weight" in key}
    weight = model.body[0].weight
    model.to(torch.bfloat16)
    assert model.body[0].weight is weight
    assert weight.dtype == torch.bfloat16
    for key, value in codes.items():
        assert torch.equal(model.state_dict()[key], value)
    steps(model, optimizer, 3, 6)
    assert not torch.equal(model.state_dict()["body.0.weight"], codes["body.0.weight"])
    assert weight.dtype == torch.bfloat16
