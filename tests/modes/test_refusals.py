# SPDX-License-Identifier: Apache-2.0
"""What a mode cannot honour is refused at setup, or at the moment it happens, in words that say what to do instead."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_galore import GaLoreOptimizer
from tests.helpers import same_bits
from tests.strategies.modules import (
    Make,
    Tiny,
    adamw,
    assert_same_weights,
    expect_warning,
    galore,
    loader,
    make_trainer,
)

from .common import BACKWARD_MODES, SILENT, hooks_on, run

BY_VALUE: dict[str, Any] = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}


def scaler() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


class ClipsItself(Tiny):
    """As Lightning's documentation shows it."""

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


class ClipsByValueItself(Tiny):
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="value")


class Shares(Tiny):
    """One layer in two optimizers."""

    def __init__(self, make: Make = adamw) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [adamw(self), torch.optim.SGD(self.body[0].parameters(), lr=1e-2)]


class BackwardTwice(Tiny):
    """A closure that runs backward twice."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(retain_graph=True)
        loss.backward()


class Reentrant(Tiny):
    """Its body runs twice, and each run re-enters autograd in backward: a weight gets its gradient in two parts."""

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.clone().requires_grad_(True)
        once, twice = (checkpoint(self.body, inputs * factor, use_reentrant=True) for factor in (1.0, 2.0))
        return self.head(once + twice)  # type: ignore[no-any-return, operator]


AT_SETUP: dict[str, tuple[str, dict[str, Any], str]] = {
    "clip by norm": (
        "layerwise",
        {"gradient_clip_val": 0.5},
        r'gradient_clip_val=0\.5 by norm: mode="layerwise".*Use mode="project", or gradient_clip_algorithm="value"',
    ),
    "clip by value and accumulate": (
        "layerwise",
        {**BY_VALUE, "accumulate_grad_batches": 2},
        r'gradient_clip_algorithm="value" with gradient accumulation.*Use mode="step", or accumulate_grad_batches=1',
    ),
    "clip by value and accumulate later": (
        "layerwise",
        {**BY_VALUE, "callbacks": lambda: [GradientAccumulationScheduler({3: 2})]},
        r'gradient_clip_algorithm="value" with gradient accumulation',
    ),
    "GradScaler": (
        "layerwise",
        {"plugins": [scaler()]},
        r'mode="layerwise" .*GradScaler of precision=.16-mixed.*Use precision="bf16-mixed" or mode="project"',
    ),
    "own clipping": (
        "layerwise",
        {"model": ClipsItself},
        r'mode="layerwise" .*configure_gradient_clipping.*Use mode="project"',
    ),
    "clip by value": (
        "project",
        BY_VALUE,
        r'gradient_clip_val=0\.5 by value: mode="project".*gradient_clip_algorithm="norm", or mode="step" or "layer',
    ),
    "clip_weight_norm and clip by norm": (
        "project",
        {"gradient_clip_val": 0.5, "settings": {"clip_weight_norm": 0.2}},
        r'clip_weight_norm=0\.2 with .*gradient_clip_val: mode="project".*Use one of them, or mode="step"',
    ),
    "clip_weight_norm and GradScaler": (
        "project",
        {"plugins": [scaler()], "settings": {"clip_weight_norm": 0.2}},
        r'clip_weight_norm=0\.2 with a GradScaler.*mode="project".*or mode="step"',
    ),
    "shared (project)": (
        "project",
        {"model": Shares},
        r"mode='project': a parameter belongs to several .*mode=\"step\"",
    ),
    "shared (layerwise)": ("layerwise", {"model": Shares}, r"mode='layerwise': a parameter belongs to several optim"),
}


@pytest.mark.parametrize("case", AT_SETUP)
def test_refused_at_setup(case: str) -> None:
    mode, settings, message = AT_SETUP[case]
    with pytest.raises(MisconfigurationException, match=message):
        run(mode, **settings)


@pytest.mark.parametrize("case", sorted(set(AT_SETUP) - {"own clipping"}))
def test_mode_step_honours_it(case: str) -> None:
    """So the remedy holds, and the refusal is the mode's."""
    _, settings, _ = AT_SETUP[case]
    if "shared" in case:
        settings = {"model": StepsBoth}
    run("step", **{**settings, "max_epochs": 1, "plugins": [scaler()] if "plugins" in settings else []})


class StepsBoth(Shares):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


def test_a_refused_run_leaves_no_hooks_even_while_its_traceback_lives() -> None:
    """In a notebook the last traceback keeps everything alive: the next run must not be served by the old hooks."""
    model, reference = Tiny(), Tiny()
    trainer = make_trainer(galore(mode="layerwise"), gradient_clip_val=0.05, **SILENT)
    with pytest.raises(MisconfigurationException) as refused:
        trainer.fit(model, loader(), loader(1))
    assert hooks_on(model) == 0
    make_trainer(galore(mode="project"), gradient_clip_val=0.05, **SILENT).fit(model, loader(), loader(1))
    make_trainer(galore(mode="project"), gradient_clip_val=0.05, **SILENT).fit(reference, loader(), loader(1))
    assert_same_weights(model, reference)
    assert refused.tb is not None


@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_a_second_optimizer_that_is_refused_takes_the_hooks_of_the_first_with_it(mode: str) -> None:
    class Second(Shares):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.body[0].parameters()), torch.optim.LBFGS(self.body[2].parameters())]

    model = Second()
    with pytest.raises(ValueError, match="LBFGS cannot be wrapped") as refused:
        make_trainer(galore(mode=mode), **SILENT).fit(model, loader(), loader(1))
    assert hooks_on(model) == 0
    assert refused.tb is not None


def test_another_mode_on_the_users_own_wrapper_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"with mode='project', and the strategy has mode='step'. Set "):
        run("step", lambda model: GaLoreOptimizer(adamw(model), model, rank=2, mode="project"))


@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_hooks_that_would_read_gradients_are_warned_of(mode: str) -> None:
    class Reads(Tiny):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            pass

    class ReadsEarlier(Tiny):
        def on_after_backward(self) -> None:
            pass

    for model, hook in ((Reads, "on_before_optimizer_step"), (ReadsEarlier, "on_after_backward")):
        with expect_warning(rf"mode='{mode}': in {hook} the full gradients .* are gone. The optimizer's grad_norm\(\)"):
            run(mode, model=model, max_epochs=1)
        run("step", model=model, max_epochs=1)


def test_own_gradient_clipping_in_project_mode_is_explained_and_right() -> None:
    with expect_warning(r'mode="project": in configure_gradient_clipping call self.clip_gradients'):
        ours, _ = run("project", model=ClipsItself)
    reference, _ = run("step", model=ClipsItself)
    for one, other in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)
    with (
        expect_warning("mode=.project.: in configure_gradient_clipping"),
        pytest.raises(MisconfigurationException, match=r'mode="project" has only low-rank .*clip by norm, or .*"step"'),
    ):
        run("project", model=ClipsByValueItself)


def test_clipping_that_counts_other_gradients_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    run("project", gradient_clip_val=0.5, accumulate_grad_batches=2)
    said = [record.message for record in caplog.records if "accumulates gradients in low rank" in record.message]
    assert len(said) == 1
    assert 'mode="step" clips by the full norm' in said[0]


# -- at run time -------------------------------------------------------------------------------------------------------


class ForwardTwice(Tiny):
    """Two backwards in one closure, each over a forward of its own."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()
        self.loss(next(iter(loader()))).backward()


SECOND = r"shape \(.*\) got a second gradient after it was updated.*use_reentrant=False.*accumulate\(\).*\"project\""
MOVED = r'mode="layerwise" moves weights in backward, so no graph made before .*accumulate\(\), or use mode="project"'


@pytest.mark.parametrize(("model", "message"), [(BackwardTwice, MOVED), (ForwardTwice, SECOND), (Reentrant, SECOND)])
def test_layerwise_refuses_a_second_gradient_in_one_step(model: type[Tiny], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run("layerwise", model=model)


@pytest.mark.parametrize("model", [BackwardTwice, ForwardTwice, Reentrant])
def test_project_says_when_a_part_of_the_gradient_decides_the_basis(model: type[Tiny]) -> None:
    with expect_warning(r"body\.\d\.weight got another gradient after its basis was found.*accumulate\(\)"):
        run("project", model=model, settings={"update_proj_gap": 1000})


def test_project_takes_gradients_in_parts_where_the_basis_stays() -> None:
    """Projecting is linear: with a basis that ignores the gradient the parts add up."""
    settings = {"update_proj_gap": 1000, "subspace": "random_orthonormal"}
    with expect_warning("body"):
        ours, _ = run("project", model=Reentrant, settings=settings)
    reference, _ = run("step", model=Reentrant, settings=settings)
    for one, other in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


class ChangesAccumulation(Tiny):
    def on_train_epoch_start(self) -> None:
        self.trainer.accumulate_grad_batches = 1 + self.current_epoch


def test_clip_by_value_finds_out_about_accumulation_that_nobody_announced() -> None:
    with pytest.raises(RuntimeError, match=r"clipped by value to 0\.5, but this backward is not the last .*\"step\""):
        run("layerwise", model=ChangesAccumulation, **BY_VALUE)


@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_sparse_gradients_of_dense_weights_are_stepped_as_ever(mode: str) -> None:
    weights = []
    for each in ("step", mode):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(20, 12, sparse=True), nn.Linear(12, 8))
        optimizer = GaLoreOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, mode=each, rank=2)
        for _ in range(3):
            model(torch.tensor([1, 2])).square().sum().backward()
            assert float(optimizer.grad_norm()) > 0
            optimizer.step()
            optimizer.zero_grad()
        weights.append([param.detach() for param in model.parameters()])
    assert same_bits(*weights)


@pytest.mark.parametrize("mode", ["project", "layerwise"])
def test_an_older_optimizer_that_takes_the_gradients_is_said(mode: Any) -> None:
    """Whose gradients the newer one never sees: it would train nothing, silently."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    older, newer = (
        GaLoreOptimizer(torch.optim.AdamW(model.parameters()), model, rank=2, mode=mode, stagger=False)
        for _ in range(2)
    )
    with pytest.warns(UserWarning, match=r"had been taken before this optimizer saw it.*call its detach\(\)"):
        model(torch.ones(2, 8)).sum().backward()
    older.detach()
    before = model[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        newer.zero_grad()
        model(torch.ones(2, 8)).sum().backward()
        newer.step()
    assert not torch.equal(model[0].weight, before)
