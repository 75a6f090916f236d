# SPDX-License-Identifier: Apache-2.0
"""Schedules the refreshes of subspaces and logs how they stand."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_galore.callbacks.refresh_log import RefreshLog
from lightning_galore.config import ScheduleName
from lightning_galore.optimizer import GaLoreOptimizer
from lightning_galore.watch import SubspaceStatus


class SubspaceScheduler(Callback):
    """Decides when subspaces are refreshed, and logs how far they drift, to any logger.

    Settings that you give replace those of the strategy; with none it only watches. It logs when Lightning logs (every
    ``log_every_n_steps``), as ``galore/...``: ``drift_mean`` and ``drift_max`` of the last refreshes, the share of the
    gradients' energy that the bases hold (``captured_energy``), ``gap_mean``, ``rank_mean``, the number of
    ``refreshes`` so far, the ``refresh_seconds`` that they took and their share of the time since the last log
    (``refresh_time_share``), ``state_bytes``, and ``bytes_saved`` against full-rank moments. Several optimizers get a
    number behind the name. What each weight's schedule has learnt is in the optimizer's state, so a run resumes where
    it was.

    Args:
        schedule: When a basis is refreshed; see :class:`~lightning_galore.GaLoreConfig` for this and the next.
        update_proj_gap: Optimizer steps between two refreshes.
        stagger: Spread the refreshes of the weights over the gap.
        refresh_share: Most time that first refreshes may add to a step.
        refresh_warmup: Steps during which the gap grows to ``update_proj_gap``.
        min_gap: Lower bound of a gap that changes.
        max_gap: Upper bound of a gap that changes.
        grow_above: Where "adaptive" doubles the gap.
        shrink_below: Where it halves it.
        refresh_below: Where "energy" refreshes.
        per_layer: Log drift and captured energy of every weight too, as ``galore_drift/...`` and ``galore_energy/...``.
        write_refreshes: Write a line for each refresh into ``galore_refreshes.csv`` in the logger's folder, if there
            is a logger; ``lightning-galore report`` draws from it.

    Raises:
        MisconfigurationException: At the start of ``fit``, if no optimizer is a
            :class:`~lightning_galore.GaLoreOptimizer` and there are settings for one. With none it warns that there is
            nothing to watch, so that a recipe can be run full-rank too.
        ValueError: At the start of ``fit``, if a setting is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_galore import GaLoreStrategy
        >>> callback = SubspaceScheduler(schedule="adaptive", update_proj_gap=100)
        >>> trainer = Trainer(strategy=GaLoreStrategy(rank=8), callbacks=[callback], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        schedule: ScheduleName | None = None,
        update_proj_gap: int | None = None,
        stagger: bool | None = None,
        refresh_share: float | None = None,
        refresh_warmup: int | None = None,
        min_gap: int | None = None,
        max_gap: int | None = None,
        grow_above: float | None = None,
        shrink_below: float | None = None,
        refresh_below: float | None = None,
        per_layer: bool = False,
        write_refreshes: bool = True,
    ) -> None:
        settings = {
            "schedule": schedule,
            "update_proj_gap": update_proj_gap,
            "stagger": stagger,
            "refresh_share": refresh_share,
            "refresh_warmup": refresh_warmup,
            "min_gap": min_gap,
            "max_gap": max_gap,
            "grow_above": grow_above,
            "shrink_below": shrink_below,
            "refresh_below": refresh_below,
        }
        self.settings = {name: value for name, value in settings.items() if value is not None}
        self.per_layer, self.write_refreshes = per_layer, write_refreshes
        self._optimizers: list[GaLoreOptimizer] = []
        self._silences: list[Callable[[], None]] = []
        self._log: RefreshLog | None = None
        self._logs_now = False
        self._step = 0
        self._seconds_before = 0.0  # spent on refreshes in the runs that this one goes on from
        self._marks: tuple[float, float] = (0.0, 0.0)

    @property
    @override
    def state_key(self) -> str:
        # The same whatever the arguments: a resumed run may log more than the one before it.
        return type(self).__qualname__

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._optimizers = [opt for opt in trainer.strategy.optimizers if isinstance(opt, GaLoreOptimizer)]
        if not self._optimizers:
            missing = f"{type(self).__name__} found no projected optimizer under {type(trainer.strategy).__name__}"
            if not self.settings:
                rank_zero_warn(f"{missing}: there are no subspaces to watch, and nothing is logged of them.")
                return
            raise MisconfigurationException(f"{missing}. Use Trainer(strategy=GaLoreStrategy(...)).")
        folder = trainer.log_dir or trainer.default_root_dir  # asks all processes
        # fast_dev_run replaces the logger by one without a folder: the table would land in the working one.
        logged = bool(trainer.loggers) and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.write_refreshes and logged and trainer.is_global_zero:
            self._log = RefreshLog(Path(folder), every=max(1, trainer.log_every_n_steps))  # type: ignore[attr-defined]
        for index, optimizer in enumerate(self._optimizers):
            if self.settings:
                optimizer.set_schedule(**self.settings)
            self._silences.append(optimizer.on_refresh(self._noting(index)))
        self._marks = (time.perf_counter(), self._spent())

    def _noting(self, index: int) -> Callable[[Any], None]:
        return lambda event: self._log.add(index, event) if self._log else None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._logs_now = bool(trainer.loggers) and trainer._logger_connector.should_update_logs
        self._step = trainer.global_step
        for optimizer in self._optimizers:
            optimizer.watch(self._logs_now)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._log is not None:
            self._log.flush()
        if not self._optimizers or not self._logs_now or trainer.global_step == self._step:  # or only accumulated
            return
        metrics: dict[str, float] = {
            "galore/refresh_time_share": self._time_share(),
            "galore/refresh_seconds": self._seconds_before + self._spent(),
        }
        if torch.cuda.is_available() and trainer.strategy.root_device.type == "cuda":
            metrics["galore/peak_memory_bytes"] = float(torch.cuda.max_memory_allocated(trainer.strategy.root_device))
        for index, optimizer in enumerate(self._optimizers):
            subspaces = optimizer.subspaces()
            suffix = f"_{index}" if len(self._optimizers) > 1 else ""
            metrics.update({f"galore/{name}{suffix}": value for name, value in summary(subspaces).items()})
            if self.per_layer:
                metrics.update(layers(subspaces, suffix))
        pl_module.log_dict(metrics, on_step=True, on_epoch=False)

    def _spent(self) -> float:
        return sum(optimizer.refresh_seconds for optimizer in self._optimizers)

    def _time_share(self) -> float:
        """Share of the time since the last call that went into refreshes."""
        now, spent = time.perf_counter(), self._spent()
        then, before = self._marks
        self._marks = (now, spent)
        return (spent - before) / max(now - then, 1e-9)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._log is not None:
            self._log.flush()
            self._log = None
        for silence in self._silences:
            silence()
        for optimizer in self._optimizers:
            optimizer.watch(False)
        # Nothing of the run is kept alive, and another fit of this object goes on counting.
        self._seconds_before += self._spent()
        self._optimizers, self._silences = [], []

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"settings": dict(self.settings), "refresh_seconds": self._seconds_before + self._spent()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict["refresh_seconds"]
        if state_dict["settings"] != self.settings:
            rank_zero_warn(
                f"The checkpoint was made with {type(self).__name__} settings {state_dict['settings']}, this run has "
                f"{self.settings}: from here on these decide."
            )


def summary(subspaces: list[SubspaceStatus]) -> dict[str, float]:
    """Aggregates over the projected weights of one optimizer, by the names under which they are logged."""
    drifts = [status.drift for status in subspaces if status.drift is not None]
    energies = [status.energy for status in subspaces if status.energy is not None]
    saved = [status.bytes_saved for status in subspaces]
    values: dict[str, float] = {
        "gap_mean": _mean([status.gap for status in subspaces]),
        "rank_mean": _mean([status.rank for status in subspaces]),
        "refreshes": float(sum(status.num_refreshes for status in subspaces)),
        "state_bytes": float(sum(status.state_bytes for status in subspaces)),
        "bytes_saved": float(sum(saved)),
    }
    if drifts:
        values |= {"drift_mean": _mean(drifts), "drift_max": max(drifts)}
    if energies:
        values["captured_energy"] = float(torch.stack(energies).nanmean())  # one transfer for all
    return values


def layers(subspaces: list[SubspaceStatus], suffix: str) -> Mapping[str, float]:
    """Drift and captured energy of each weight, by the names under which they are logged."""
    drifts = {f"galore_drift{suffix}/{status.name}": status.drift for status in subspaces if status.drift is not None}
    energies = [status for status in subspaces if status.energy is not None]
    held = torch.stack([status.energy for status in energies if status.energy is not None]).tolist() if energies else []
    return {**drifts, **{f"galore_energy{suffix}/{s.name}": value for s, value in zip(energies, held, strict=True)}}


def _mean(values: list[Any]) -> float:
    return float(sum(values) / len(values)) if values else 0.0
