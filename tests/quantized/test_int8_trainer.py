# SPDX-License-Identifier: Apache-2.0
"""int8 weights, int4 bases and 8-bit moments under the Trainer: modes, precisions, memory, callbacks, LightningCLI."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, callbacks
from lightning.pytorch.callbacks import (
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lightning_galore import GaLoreOptimizer
from lightning_galore.callbacks import SubspaceScheduler
from lightning_galore.storage import Int8Tensor
from lightning_galore.weights import plain_state_dict
from tests.modes.common import BACKWARD_MODES, MODES, assert_equal_runs, run
from tests.modes.test_equal_weights import Checkpointed, Tied, Unfreeze
from tests.modes.tracker import LiveBytes
from tests.strategies.modules import (
    BATCHES,
    PROJECTED,
    DictLogger,
    Make,
    Tiny,
    adamw,
    assert_same_tree,
    fit,
    galore,
    loader,
    make_trainer,
    the_optimizer,
)
from tests.strategies.test_lightning_cli import class_path
from tests.strategies.test_lightning_cli import run as run_cli
from tests.strategies.test_resume import Wide

from .common import INT8_INT4, Q_GALORE, adamw_8bit, assert_same_states, coded, decoded, is_plain

ROOT = Path(__file__).parents[2]


def both(mode: str, make: Make = adamw_8bit, **settings: Any) -> tuple[Any, Any]:
    chosen = {**INT8_INT4, **settings.pop("settings", {})}
    trainer: dict[str, Any] = {"model": Wide, **settings}
    ours, reference = (run(one, make, settings=chosen, **trainer) for one in (mode, "step"))
    assert coded(ours[0]) >= {"body.2.weight"}
    assert coded(ours[0]) == coded(reference[0])
    return ours, reference


# -- what a user sees --------------------------------------------------------------------------------------------------


class Notes(Wide):
    """Notes who its parameters are before and after the optimizer is wrapped."""

    def __init__(self, make: Make) -> None:
        super().__init__(make)
        self.before = {name: id(param) for name, param in self.named_parameters()}
        self.hooked = 0
        self.body[0].register_forward_hook(self.count)

    def count(self, *args: Any) -> None:
        self.hooked += 1


def test_a_checkpoint_holds_int8_and_plain_tensors(tmp_path: Path) -> None:
    model = Notes(adamw_8bit)
    trainer = fit(model, galore(**Q_GALORE), callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    assert {name: id(param) for name, param in model.named_parameters()} == model.before
    assert [type(module) for module in model.body] == [nn.Linear, nn.Tanh, nn.Linear, nn.LayerNorm]
    assert model.hooked >= BATCHES
    (group,) = trainer.optimizers[0].param_groups
    assert [id(param) for param in group["params"]] == list(model.before.values())
    (path,) = tmp_path.iterdir()
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["state_dict"]
    assert set(state) == {*model.before, *(f"{name}_absmax" for name in PROJECTED)}
    assert all(is_plain(value) for value in state.values())
    for name in PROJECTED:
        assert (state[name].dtype, state[name].shape) == (torch.int8, model.get_parameter(name).shape)
        assert torch.equal(decoded(state, name), model.get_parameter(name).dequantize())
    code = (
        "import sys, torch\n"
        f"state = torch.load({str(path)!r}, weights_only=True)['state_dict']\n"
        "assert not [name for name in sys.modules if 'galore' in name or name == 'lightning']\n"
        "print(sorted({str(value.dtype) for value in state.values()}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "['torch.bfloat16', 'torch.float32', 'torch.int8']"


def test_it_learns_as_in_floating_point() -> None:
    losses = {}
    for name, settings in (("param", {}), ("int8", INT8_INT4), ("nearest", {**INT8_INT4, "stochastic_round": False})):
        model = Wide(adamw_8bit)
        fit(model, galore(**settings), max_epochs=10)
        losses[name] = sum(model.losses[-6:]) / 6
        assert losses[name] < 0.8 * sum(model.losses[:6]) / 6
    assert losses["int8"] == pytest.approx(losses["param"], rel=0.1)


# -- modes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_modes_give_the_same_weights(mode: str, precision: Any) -> None:
    ours, reference = both(mode, precision=precision)
    assert_equal_runs(ours, reference)
    assert_same_states(ours[0].state_dict(), reference[0].state_dict())
    assert_same_tree(the_optimizer(ours[1]).state_dict(), the_optimizer(reference[1]).state_dict())


class ByHand(Wide):
    """Manual optimization."""

    def __init__(self, make: Make) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        self.manual_backward(loss)
        optimizer.step()


@pytest.mark.parametrize("model", [ByHand, Checkpointed, Tied])
@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_modes_of_other_models(mode: str, model: type[Tiny]) -> None:
    assert_equal_runs(*both(mode, model=model))


def test_automatic_and_manual_optimization_are_alike() -> None:
    for mode in MODES:
        runs = [run(mode, adamw_8bit, model=model, settings=INT8_INT4)[0] for model in (ByHand, Wide)]
        assert_same_states(runs[0].state_dict(), runs[1].state_dict())


def scheduled(model: Tiny) -> Any:
    optimizer = adamw_8bit(model)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 40)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("kept", ["param", "fp32", "bf16", "int8"])
def test_accumulation(kept: str) -> None:
    """Low-rank gradients are added up in place of full ones: other roundings, of gradients and then of codes.

    The last micro-batch of a window waits in mode "project" too, and is rounded once more.
    """
    settings = {"accumulator_storage": kept}
    runs = {
        mode: run(
            mode, scheduled, model=Wide, settings={**INT8_INT4, **settings}, accumulate_grad_batches=3, max_epochs=8
        )
        for mode in MODES
    }
    if kept in ("param", "fp32"):
        assert_same_states(runs["layerwise"][0].state_dict(), runs["project"][0].state_dict())
    for mode in BACKWARD_MODES:
        assert runs[mode][1].global_step == runs["step"][1].global_step == 16
        ours, expected = (plain_state_dict(runs[one][0].state_dict()) for one in (mode, "step"))
        for name, value in ours.items():
            code = float(expected[name].abs().max()) / 127
            error = float((value - expected[name]).pow(2).mean().sqrt())
            moved = float((expected[name] - Wide(adamw).state_dict()[name]).pow(2).mean().sqrt())
            assert error <= (2 * code if name in PROJECTED else 0.02 * code + 0.2 * moved), name
            assert moved > 0


@pytest.mark.parametrize("limit", [{"gradient_clip_val": 0.05}, {"settings": {"clip_weight_norm": 0.05}}], ids=str)
def test_clipping(limit: dict[str, Any]) -> None:
    by_norm = "gradient_clip_val" in limit
    for mode in ("project",) if by_norm else BACKWARD_MODES:
        # A norm that was added up in another order may flip a code; the one of a single weight is the same sum.
        ours, reference = both(mode, **limit)
        assert_equal_runs(ours, reference, tolerance=0.02 if by_norm else 0.0)
        free, _ = both(mode)
        assert not torch.equal(free[0].body[0].weight, ours[0].body[0].weight)


def test_clipping_by_value() -> None:
    trainer: dict[str, Any] = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    assert_equal_runs(*both("layerwise", **trainer))


# -- memory ------------------------------------------------------------------------------------------------------------

WIDTH, LAYERS, RANK = 256, 6, 4
FULL = WIDTH * WIDTH * 4  # bytes of one weight in floating point


class Stack(LightningModule):
    """Layers whose weights are far larger than all else; counts what is alive in forward and backward, and after."""

    def __init__(self, *, looks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.looks = looks
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        self.after_forward: list[int] = []
        self.peaks: dict[str, list[int]] = {"forward": [], "backward": []}
        self.between: list[list[tuple[int, ...]]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        rows = batch[0][:2].repeat(1, WIDTH // 8)
        with LiveBytes() as tracker:
            loss = self.layers(rows).square().mean()
        self.peaks["forward"].append(tracker.peak)
        self.after_forward.append(tracker.current)
        return loss  # type: ignore[no-any-return]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with LiveBytes() as tracker:
            super().backward(loss, *args, **kwargs)
        self.peaks["backward"].append(tracker.peak)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.looks and batch_idx in (0, 2):
            self.between.append(full_floats())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def full_floats() -> list[tuple[int, ...]]:
    """Shapes of all floating-point tensors of a weight's size that are alive and have memory of their own."""
    return [
        tuple(value.shape)
        for value in gc.get_objects()
        if issubclass(type(value), Tensor)
        and not isinstance(value, Int8Tensor)
        and value.is_floating_point()
        and value.numel() >= WIDTH * WIDTH
    ]


def measured(mode: str, *, looks: bool = False, **settings: Any) -> Stack:
    model = Stack(looks=looks)
    strategy = galore(mode=mode, rank=RANK, update_proj_gap=100, target_modules=".*", stagger=False, **settings)
    make_trainer(strategy).fit(model, loader())
    return model


@pytest.mark.parametrize("mode", MODES)
def test_between_steps_no_weight_is_held_in_full(mode: str) -> None:
    gc.collect()
    start = len(full_floats())  # of other tests
    assert len(measured(mode, looks=True).between[1]) >= start + LAYERS  # what the count sees where weights are float
    gc.collect()
    model = measured(mode, looks=True, **INT8_INT4)
    # In mode "step" the Trainer keeps the last full gradients until the next zero_grad.
    allowed = LAYERS if mode == "step" else 0
    assert [len(alive) - start for alive in model.between] == [0, allowed]


def test_one_weight_at_a_time_is_decoded_in_forward_and_backward() -> None:
    model = measured("layerwise", **INT8_INT4)
    # Inside decoding and rounding a few tensors of one weight's size are alive: codes, noise, the sum. Not two layers'.
    assert max(model.peaks["forward"]) <= 2 * FULL + FULL // 4
    assert max(model.after_forward) <= FULL // 4  # what forward keeps for backward: inputs and codes
    worst = max(model.peaks["backward"][1:])
    few = Stack()
    few.layers = few.layers[:1]
    make_trainer(
        galore(mode="layerwise", rank=RANK, update_proj_gap=100, target_modules=".*", stagger=False, **INT8_INT4)
    ).fit(few, loader())
    one = max(few.peaks["backward"][1:])
    # Six layers take what one takes, and what travels between them: no more weights are decoded at once.
    assert worst <= one + FULL + FULL // 4


# -- callbacks ---------------------------------------------------------------------------------------------------------


AVERAGES = [name for name in ("WeightAveraging", "EMAWeightAveraging") if hasattr(callbacks, name)]


@pytest.mark.parametrize("name", AVERAGES)
def test_weight_averaging_is_refused_by_name(name: str) -> None:
    model = Wide(adamw)
    with pytest.raises(MisconfigurationException, match=rf"^{name} swaps.*weight_storage='param'"):
        fit(model, galore(**INT8_INT4), callbacks=[getattr(callbacks, name)()])
    assert coded(model) == set()
    fit(model, galore(basis_storage="int4"), callbacks=[getattr(callbacks, name)()])


def test_stochastic_weight_averaging() -> None:
    """Its average is a float copy; it is rounded once, when it becomes the model's weights."""
    seen: dict[int, dict[str, Tensor]] = {}

    class Seen(Wide):
        def on_train_epoch_start(self) -> None:
            seen[self.current_epoch] = plain_state_dict({k: v.clone() for k, v in self.state_dict().items()})

    model = Seen(adamw_8bit)
    averaging = StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2, annealing_epochs=1)
    fit(model, galore(**INT8_INT4), max_epochs=4, callbacks=[averaging])
    assert coded(model) == set(PROJECTED)
    state = plain_state_dict(model.state_dict())
    for name, value in state.items():
        # Lightning averages at the beginning of an epoch: what epochs 1, 2 and 3 began with.
        expected = torch.stack([seen[epoch][name] for epoch in (1, 2, 3)]).mean(0)
        code = float(expected.abs().max()) / 127 if name in PROJECTED else 1e-6
        torch.testing.assert_close(value, expected, rtol=0, atol=code)


def test_callbacks_that_only_look(tmp_path: Path) -> None:
    logger = DictLogger()
    watching = [LearningRateMonitor(), SubspaceScheduler(), ModelSummary(max_depth=2)]
    model, plain = Wide(scheduled), Wide(scheduled)
    settings: dict[str, Any] = {"log_every_n_steps": 1, "default_root_dir": tmp_path}
    fit(model, galore(**Q_GALORE), logger=logger, callbacks=watching, **settings)
    fit(plain, galore(**Q_GALORE))
    assert_same_states(model.state_dict(), plain.state_dict())
    logged = {key for _, metrics in logger.metrics for key in metrics}
    assert any(key.startswith("lr-") for key in logged)
    assert any("galore" in key or "subspace" in key for key in logged)


def trainable(model: Tiny) -> Any:
    return torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_layers_that_are_unfrozen_later_become_int8_when_they_are_added(mode: str) -> None:
    seen = []

    class Seen(Wide):
        def on_train_epoch_start(self) -> None:
            seen.append(coded(self))

    model, trainer = run(mode, trainable, model=Seen, settings=INT8_INT4, callbacks=lambda: [Unfreeze()])
    assert seen[0] == {"body.2.weight"}
    assert coded(model) == set(PROJECTED)
    late = trainer.optimizers[0].state[model.body[0].weight]
    assert late["galore_step"] == 18
    reference, _ = run("step", trainable, model=Wide, settings=INT8_INT4, callbacks=lambda: [Unfreeze()])
    assert_same_states(model.state_dict(), reference.state_dict())


def test_frozen_weights_are_kept_as_codes_and_stay() -> None:
    model = Wide(adamw)
    model.body[0].requires_grad_(False)
    fit(model, galore(**INT8_INT4))
    assert not model.body[0].weight.requires_grad
    assert coded(model) == set(PROJECTED)
    assert torch.equal(model.body[0].weight, Int8Tensor.quantized(Wide(adamw).body[0].weight.detach()).dequantize())


class WithLr(Wide):
    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lambda model: torch.optim.AdamW(model.parameters(), lr=model.lr))
        self.lr = lr


def test_learning_rate_finder_leaves_no_trace(tmp_path: Path) -> None:
    found, plain = WithLr(), WithLr()
    trainer = make_trainer(galore(**INT8_INT4), default_root_dir=tmp_path)
    finder = Tuner(trainer).lr_find(found, loader(), loader(2), num_training=5, update_attr=False)
    assert finder is not None
    trainer.fit(found, loader(), loader(2))
    make_trainer(galore(**INT8_INT4)).fit(plain, loader(), loader(2))
    assert_same_states(found.state_dict(), plain.state_dict())


# -- LightningCLI ------------------------------------------------------------------------------------------------------


def test_q_galore_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prog"])
    strategy = class_path(rank=3, method="q-galore", moment_storage="base", update_proj_gap=4)
    cli = run_cli(tmp_path, strategy)
    config = the_optimizer(cli.trainer).config
    assert (config.weight_storage, config.basis_storage, config.schedule) == ("int8", "int4", "adaptive")
    assert config.stochastic_round
    assert coded(cli.model) == set(PROJECTED)
    again = run_cli(tmp_path, strategy, "--trainer.strategy.init_args.weight_storage", "param")
    assert coded(again.model) == set()
    assert the_optimizer(again.trainer).config.basis_storage == "int4"


# -- 8-bit moments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["q-galore", "galore-8bit"])
def test_methods_of_8bit_moments_refuse_others_with_a_remedy(method: str) -> None:
    model = Wide(adamw)
    with pytest.raises(ValueError, match=r"moment_storage='8bit' with base=AdamW.*bitsandbytes\.optim\.AdamW8bit"):
        fit(model, galore(method=method))
    assert coded(model) == set()  # refused before anything was changed
    fit(model, galore(method=method, moment_storage="base"))
    fit(Wide(adamw_8bit), galore(method=method))


def test_8bit_moments_are_asked_of_an_optimizer_in_a_plain_loop() -> None:
    model = Wide(adamw)
    for wrong in (torch.optim.AdamW, torch.optim.Adam):
        with pytest.raises(ValueError, match="moment_storage='8bit'"):
            GaLoreOptimizer(wrong(model.parameters()), model, rank=3, moment_storage="8bit")
    optimizer = GaLoreOptimizer(adamw_8bit(model), model, rank=3, moment_storage="8bit")
    assert len(optimizer.targets) == 2
