# SPDX-License-Identifier: Apache-2.0
"""The peak of memory as it is, beside what a rehearsal of the same step predicts."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_galore import storage
from lightning_galore.optimizer import GaLoreOptimizer
from lightning_galore.planner import CATEGORIES, Job, MemoryTracker, Recipe, Rehearsed, rehearse, training_loss
from lightning_galore.planner.watching import Watcher

#: What may go wrong in a rehearsal of somebody's module, which must not end a run.
_UNPLANNED = (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError)


class MemoryMonitor(Callback):
    """Measures the peak of memory in training and says how it compares with the plan.

    On CUDA the peak is the allocator's (``torch.cuda.max_memory_allocated``), of all steps: it costs nothing. On a CPU,
    with ``track=True``, each operation of the first steps is watched, which slows them down. Logged as
    ``memory/peak_bytes``, ``memory/predicted_bytes`` and, by category, ``memory/weights_bytes`` and so on.

    Args:
        track: Watch the operations, on a CPU (without CUDA there is no other way to know).
        steps: How many optimizer steps of the start are watched and compared; the first steps may refresh many weights.
        tolerance: Warn if measured and predicted peak differ by more than this share of the predicted one.
        predict: Rehearse a step with the first batch before it is taken (some seconds; nothing is allocated).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MemoryMonitor(track=True)], accelerator="cpu", logger=False)
    """

    def __init__(self, track: bool = False, steps: int = 3, tolerance: float = 0.1, predict: bool = True) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1.")
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance={tolerance} must be in (0, 1); 0.1 warns of a tenth.")
        self.track, self.steps, self.tolerance, self.predict = track, steps, tolerance, predict
        #: What a rehearsal predicts; None before the first batch, or where it is not possible.
        self.predicted: Rehearsed | None = None
        #: Measured bytes at the peak, by category and as ``peak``.
        self.measured: dict[str, int] = {}
        self._source: Literal["cuda", "tracker"] | None = None
        self._tracker = MemoryTracker()
        self._watcher: Watcher | None = None
        self._watching = False
        self._first_step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            self._source = "cuda"
        elif self.track:
            self._source = "tracker"
        else:
            rank_zero_warn(
                f"MemoryMonitor measures nothing on {device}: there is no allocator to ask. MemoryMonitor(track=True) "
                "watches the operations of the first steps instead, which makes them slower."
            )
        self._first_step = trainer.global_step
        self.predicted, self.measured, self._watcher = None, {}, None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._source is None or self._steps(trainer) >= self.steps:
            return
        first = self._watcher is None and not self.measured
        if first and self.predict:
            self._rehearse(trainer, pl_module, batch)
        if self._source == "cuda":
            if first:
                torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
            self.measured = self.measured or {"peak": 0}
            return
        if self._watcher is None:
            self._watcher = Watcher(self._tracker, pl_module)
            self._watcher.name_weights()
            self._watcher.enter()
            self._watcher.leave(*trainer.strategy.optimizers)
            self._watcher.name_states()
            self._tracker.restart()
        self._tracker.hold(list(_tensors_in(batch)), "activations")
        self._tracker.phase = "forward"
        self._tracker.__enter__()
        self._watching = True

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self._tracker.phase = "backward"

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._tracker.phase = "optimizer"

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._source is None or not (self._watching or self._source == "cuda"):
            return
        if self._source == "cuda":
            self.measured = _on_cuda(trainer)
        else:
            self._stop_watching()
            assert self._watcher is not None
            self._watcher.name_states()
            self._watcher.completed.clear()
            self._tracker.order = 0
            moment = self._tracker.peak
            self.measured = {"peak": moment.total, **moment.by_category}
        if self._steps(trainer) == self.steps:
            self._report(trainer, pl_module)
            if self._watcher is not None:
                self._watcher.remove()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_watching()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.measured and self._steps(trainer) < self.steps:
            self._report(trainer, pl_module)
        elif self._source == "cuda" and self.measured:
            rank_zero_info(f"Memory: the peak of all steps was {_words(self.measured['peak'])}.")
        if self._watcher is not None:
            self._watcher.remove()

    def _steps(self, trainer: Trainer) -> int:
        return trainer.global_step - self._first_step

    def _stop_watching(self) -> None:
        if self._watching:
            self._watching = False
            self._tracker.__exit__(None, None, None)

    # -- the comparison ------------------------------------------------------------------------------------------------

    def _rehearse(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        try:
            job, recipe = _as_it_runs(trainer, pl_module, batch)
            self.predicted = rehearse(job, recipe)
        except _UNPLANNED as error:
            rank_zero_warn(f"MemoryMonitor measures, and predicts nothing: this run cannot be rehearsed ({error}).")

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {f"memory/{name}_bytes": float(size) for name, size in self.measured.items()}
        said = f"Memory: the peak of {self._steps(trainer)} steps was {_words(self.measured['peak'])}"
        parts = ", ".join(f"{name} {_words(size)}" for name, size in self.measured.items() if size and name != "peak")
        said += f" ({parts})"
        nearest = self._nearest(self._steps(trainer)) if self.predicted is not None else 0
        if nearest:
            values["memory/predicted_bytes"] = float(nearest)
            said += f"; predicted {_words(nearest)}"
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        rank_zero_info(f"{said}.")
        if self.predicted is not None and nearest and abs(self.measured["peak"] - nearest) > self.tolerance * nearest:
            more = self.measured["peak"] / nearest - 1
            rank_zero_warn(
                f"The measured peak of memory, {_words(self.measured['peak'])}, is {abs(more):.0%} "
                f"{'above' if more > 0 else 'below'} the predicted {_words(nearest)} ({self.predicted.where}). "
                "Something else may hold memory, or the batches differ from the first one."
            )

    def _nearest(self, steps: int) -> int:
        """The prediction; after a few steps it is between those of a step without and with refreshes."""
        assert self.predicted is not None
        peaks = {name: moment.total for name, moment in self.predicted.peaks.items()}
        least = peaks["first"] if steps <= 1 else max(peaks["first"], peaks["ordinary"])
        most = least if steps <= 1 else max(peaks.values())
        return min(max(self.measured["peak"], least), most)


def _as_it_runs(trainer: Trainer, module: LightningModule, batch: Any) -> tuple[Job, Recipe]:
    """The run of a Trainer as something to rehearse."""
    if not module.automatic_optimization:
        raise ValueError("manual optimization needs its Trainer")
    if len(trainer.strategy.optimizers) != 1:
        raise ValueError("it has no single optimizer")
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError("its weights are on the meta device")
    (optimizer,) = trainer.strategy.optimizers
    wrapped = isinstance(optimizer, GaLoreOptimizer)
    base: Optimizer = optimizer.base if isinstance(optimizer, GaLoreOptimizer) else optimizer
    order = {param: place for place, param in enumerate(p for p in module.parameters() if p.requires_grad)}

    def make_base(params: list[nn.Parameter]) -> Optimizer:
        cls = next(c for c in type(base).__mro__ if c.__module__.partition(".")[0] != "lightning_galore")
        known = inspect.signature(cls).parameters
        settings = {name: value for name, value in base.defaults.items() if name in known}
        own = [{**group, "params": [params[order[p]] for p in group["params"]]} for group in base.param_groups]
        return cls(own, **settings)

    precision = str(trainer.precision)
    job = Job(
        name=type(module).__name__,
        module=module,
        batch=batch,
        step=training_loss,
        precision=precision if precision.endswith("mixed") else None,
        micro_batches=min(2, trainer.accumulate_grad_batches),
    )
    config = optimizer.config if wrapped else None  # type: ignore[attr-defined]
    return job, Recipe(make_base=make_base, config=config)


def _on_cuda(trainer: Trainer) -> dict[str, int]:
    """The allocator's peak; what is held between steps by name, the rest as one."""
    assert trainer.lightning_module is not None
    device = trainer.strategy.root_device
    held: dict[str, int] = dict.fromkeys(CATEGORIES[:4], 0)
    held["weights"] = storage.nbytes([*trainer.lightning_module.parameters(), *trainer.lightning_module.buffers()])
    for optimizer in trainer.strategy.optimizers:
        if isinstance(optimizer, GaLoreOptimizer):
            now = optimizer.footprint()
            held["moments"] += now.states
            held["bases"] += now.bases
        else:
            held["moments"] += storage.nbytes(list(optimizer.state.values()))
    peak = torch.cuda.max_memory_allocated(device)
    return {"peak": peak, **held, "gradients": 0, "rest": peak - sum(held.values())}


def _tensors_in(batch: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(batch)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _words(size: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"
