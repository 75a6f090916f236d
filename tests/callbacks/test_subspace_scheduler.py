# SPDX-License-Identifier: Apache-2.0
"""The callback through a real Trainer: it owns the schedule, logs to any logger, and resumes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_galore import GaLoreConfig, GaLoreStrategy, SubspaceScheduler
from lightning_galore.callbacks.refresh_log import COLUMNS, FILE_NAME
from lightning_galore.config import SCHEDULE_SETTINGS
from tests.strategies.modules import (
    DictLogger,
    Tiny,
    adamw,
    assert_same_state,
    assert_same_weights,
    expect_warning,
    fit,
    galore,
    loader,
    the_optimizer,
)

AGGREGATES = {
    "refresh_time_share",
    "refresh_seconds",
    "gap_mean",
    "rank_mean",
    "refreshes",
    "state_bytes",
    "bytes_saved",
}
ONCE_REFRESHED_TWICE = {"drift_mean", "drift_max"}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a logger in memory has no folder of its own


def run(
    *callbacks: Any, strategy: GaLoreStrategy | None = None, model: Tiny | None = None, **settings: Any
) -> tuple[Trainer, list[tuple[int, dict[str, float]]]]:
    logger = DictLogger()
    settings = {"logger": logger, "log_every_n_steps": 1, "max_epochs": 3, "limit_val_batches": 0, **settings}
    trainer = fit(model or Tiny(adamw), strategy or galore(update_proj_gap=4), callbacks=list(callbacks), **settings)
    return trainer, [(step, metrics) for step, metrics in logger.metrics if "galore/refreshes" in metrics]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_setting_of_the_schedule_is_a_keyword() -> None:
    assert set(SCHEDULE_SETTINGS) <= set(SubspaceScheduler.__init__.__annotations__)
    every = {
        "schedule": "adaptive",
        "update_proj_gap": 7,
        "stagger": False,
        "refresh_share": 0.3,
        "refresh_warmup": 3,
        "min_gap": 2,
        "max_gap": 9,
        "grow_above": 0.8,
        "shrink_below": 0.2,
        "refresh_below": 0.4,
    }
    assert set(every) == set(SCHEDULE_SETTINGS)
    trainer, _ = run(SubspaceScheduler(**every))  # type: ignore[arg-type]
    config = the_optimizer(trainer).config
    assert {name: getattr(config, name) for name in every} == every


def test_it_owns_the_schedule() -> None:
    strategy = galore(update_proj_gap=100, stagger=False)
    trainer, _ = run(SubspaceScheduler(update_proj_gap=5), strategy=strategy)
    assert {status.num_refreshes for status in the_optimizer(trainer).subspaces()} == {4}  # 18 steps: 0, 5, 10, 15


def test_without_settings_it_only_watches() -> None:
    watched, _ = run(SubspaceScheduler())
    alone, _ = run()
    assert_same_weights(watched.lightning_module, alone.lightning_module)
    assert_same_state(watched.optimizers[0], alone.optimizers[0])
    assert the_optimizer(watched).config == the_optimizer(alone).config


def test_aggregates_are_those_of_the_optimizer() -> None:
    trainer, logged = run(SubspaceScheduler(), strategy=galore(update_proj_gap=4, stagger=False))
    assert [step for step, _ in logged] == list(range(18))
    for step, metrics in logged:
        names = {name.removeprefix("galore/") for name in metrics if name.startswith("galore")}
        expected = AGGREGATES | {"captured_energy"} | (ONCE_REFRESHED_TWICE if step >= 4 else set())
        assert names == expected
        assert 0 < metrics["galore/captured_energy"] <= 1 + 1e-5
        assert 0 <= metrics["galore/refresh_time_share"] <= 1
    statuses = the_optimizer(trainer).subspaces()
    _, last = logged[-1]
    drifts = [status.drift for status in statuses if status.drift is not None]
    assert last["galore/refreshes"] == sum(status.num_refreshes for status in statuses) == 5 * len(statuses)
    assert last["galore/drift_mean"] == pytest.approx(sum(drifts) / len(drifts))
    assert last["galore/drift_max"] == pytest.approx(max(drifts))
    assert last["galore/state_bytes"] == sum(status.state_bytes for status in statuses)
    assert last["galore/bytes_saved"] == sum(status.bytes_saved for status in statuses) > 0
    assert last["galore/gap_mean"] == 4
    assert last["galore/refresh_time_share"] > 0 or logged[-2][1]["galore/refresh_time_share"] > 0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_logs_when_lightning_logs(accumulate: int) -> None:
    _, logged = run(SubspaceScheduler(), log_every_n_steps=2, accumulate_grad_batches=accumulate)
    steps = 18 // accumulate
    assert [step for step, _ in logged] == list(range(1, steps, 2))
    assert all("galore/captured_energy" in metrics for _, metrics in logged)


def test_layers_on_request() -> None:
    trainer, logged = run(SubspaceScheduler(per_layer=True))
    statuses = the_optimizer(trainer).subspaces()
    _, last = logged[-1]
    for status in statuses:
        assert last[f"galore_drift/{status.name}"] == pytest.approx(status.drift)
        assert last[f"galore_energy/{status.name}"] == pytest.approx(float(status.energy))  # type: ignore[arg-type]
    _, few = run(SubspaceScheduler())
    assert not [name for name in few[-1][1] if name.startswith(("galore_drift", "galore_energy"))]


def test_no_logger_no_trace(tmp_path: Path) -> None:
    trainer, _ = run(SubspaceScheduler(schedule="adaptive"), logger=False)
    assert the_optimizer(trainer).config.schedule == "adaptive"
    assert list(tmp_path.rglob("*")) == []


def test_table_of_refreshes_and_metrics_in_a_csv_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer, _ = run(SubspaceScheduler(), logger=logger)
    lines = read(Path(logger.log_dir) / FILE_NAME)
    statuses = {status.name: status for status in the_optimizer(trainer).subspaces()}
    assert len(lines) == sum(status.num_refreshes for status in statuses.values())
    for line in lines:
        assert tuple(line) == COLUMNS
        status = statuses[line["weight"]]
        assert line["shape"] == "x".join(map(str, status.shape))
        assert (line["side"], line["found"], line["optimizer"]) == (status.side, "1", "0")
        assert 0 < float(line["captured_energy"]) <= 1 + 1e-5
        values = [float(value) for value in line["spectrum"].split()]
        assert values == sorted(values, reverse=True)
        assert values
    last = {line["weight"]: line for line in lines}
    for name, status in statuses.items():
        assert int(last[name]["step"]) == status.refreshed_at
        assert float(last[name]["overlap"]) == pytest.approx(status.overlap, rel=1e-4)
    metrics = read(Path(logger.log_dir) / "metrics.csv")
    assert {"galore/drift_mean", "galore/captured_energy", "galore/refreshes"} <= set(metrics[0])
    assert any(row["galore/drift_mean"] for row in metrics)


def test_a_basis_that_moves_at_every_step_does_not_fill_the_disk(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer, _ = run(SubspaceScheduler(), strategy=galore(method="galore-track"), logger=logger, log_every_n_steps=6)
    weights = len(the_optimizer(trainer).targets)
    assert len(read(Path(logger.log_dir) / FILE_NAME)) == 3 * weights


@pytest.mark.parametrize("settings", [{}, {"schedule": "adaptive", "update_proj_gap": 3}, {"schedule": "energy"}])
def test_resume_is_exact(settings: dict[str, Any], tmp_path: Path) -> None:
    def once(resume: Path | None) -> Trainer:
        saver = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        return run(
            SubspaceScheduler(**settings), saver, enable_checkpointing=True, max_epochs=4, ckpt_path=resume
        )[0]  # fmt: skip

    whole = once(None)
    resumed = once(tmp_path / "epoch=1.ckpt")
    assert_same_weights(resumed.lightning_module, whole.lightning_module)
    assert_same_state(resumed.optimizers[0], whole.optimizers[0])
    saved = torch.load(tmp_path / "epoch=3-v1.ckpt", weights_only=True)["callbacks"]["SubspaceScheduler"]
    assert saved["settings"] == settings
    assert saved["refresh_seconds"] > 0


def test_other_settings_than_those_of_the_checkpoint_are_said(tmp_path: Path) -> None:
    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="it")

    run(SubspaceScheduler(update_proj_gap=5), saver(), enable_checkpointing=True)
    with expect_warning(r"The checkpoint was made with SubspaceScheduler settings \{'update_proj_gap': 5\}, this run"):
        run(
            SubspaceScheduler(update_proj_gap=6), saver(), enable_checkpointing=True, max_epochs=4,
            ckpt_path=tmp_path / "it.ckpt",
        )  # fmt: skip


def test_settings_for_another_strategy_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="found no projected optimizer under SingleDeviceStrategy. Use"):
        fit(Tiny(adamw), "auto", callbacks=[SubspaceScheduler(update_proj_gap=5)])


def test_a_watcher_lets_a_full_rank_run_go_on(tmp_path: Path) -> None:
    model = Tiny(adamw)
    with expect_warning(
        "SubspaceScheduler found no projected optimizer under SingleDeviceStrategy: there are no subspaces to watch"
    ):
        trainer = fit(model, "auto", callbacks=[SubspaceScheduler()], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert model.losses
    assert not any(name.startswith("galore") for name in trainer.logged_metrics)
    assert not list(tmp_path.rglob("galore_refreshes.csv"))


def test_a_fast_dev_run_writes_nothing_into_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(SubspaceScheduler(update_proj_gap=1), logger=CSVLogger(tmp_path / "logs"), fast_dev_run=2)
    assert not list(tmp_path.iterdir())


def test_value_out_of_range_is_refused_before_the_first_step() -> None:
    model = Tiny(adamw)
    with pytest.raises(ValueError, match="update_proj_gap=0 must be at least 1"):
        run(SubspaceScheduler(update_proj_gap=0), model=model)
    assert model.losses == []


def test_validation_and_test_work_with_it() -> None:
    trainer, _ = run(SubspaceScheduler())
    trainer.validate(trainer.lightning_module, loader(1), verbose=False)
    trainer.test(trainer.lightning_module, loader(1), verbose=False)


def test_nobody_listens_after_the_run() -> None:
    trainer, _ = run(SubspaceScheduler())
    projector = the_optimizer(trainer)._projector
    assert projector.listeners == []
    assert projector.watching is False


def test_time_share_under_accumulation_is_that_of_the_whole_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr("lightning_galore.callbacks.subspace_scheduler.time.perf_counter", lambda: clock["now"])

    class Slow(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            clock["now"] += 1.0
            return super().training_step(batch, batch_idx)

    callback = SubspaceScheduler()
    monkeypatch.setattr(callback, "_spent", lambda: clock["now"] / 4)
    _, logged = run(callback, model=Slow(adamw), accumulate_grad_batches=3, log_every_n_steps=2)
    assert [metrics["galore/refresh_time_share"] for _, metrics in logged] == [0.25] * 3


def test_another_fit_with_the_same_object(tmp_path: Path) -> None:
    callback = SubspaceScheduler()
    logger = CSVLogger(tmp_path)
    run(callback, logger=logger)
    lines, seconds = read(Path(logger.log_dir) / FILE_NAME), callback.state_dict()["refresh_seconds"]
    _, logged = run(callback)
    assert read(Path(logger.log_dir) / FILE_NAME) == lines
    assert callback.state_dict()["refresh_seconds"] > seconds > 0
    assert logged[-1][1]["galore/refresh_seconds"] == pytest.approx(callback.state_dict()["refresh_seconds"])


def test_several_optimizers_get_numbers() -> None:
    def two(model: Tiny) -> list[torch.optim.Optimizer]:
        weights = [*model.parameters()]
        return [torch.optim.AdamW(weights[:2], lr=1e-2), torch.optim.SGD(weights[2:], lr=1e-2)]

    class Manual(Tiny):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()

    _, logged = run(SubspaceScheduler(), model=Manual(two))
    _, last = logged[-1] if logged else (0, {})
    assert not logged  # no name without a number
    logger = DictLogger()
    fit(
        Manual(two), galore(update_proj_gap=4), callbacks=[SubspaceScheduler()], logger=logger, log_every_n_steps=1,
        limit_val_batches=0,
    )  # fmt: skip
    names = {name for _, metrics in logger.metrics for name in metrics}
    assert {"galore/refreshes_0", "galore/refreshes_1", "galore/refresh_time_share"} <= names
    assert last == {}


def test_it_takes_its_words_from_the_configuration() -> None:
    fields = GaLoreConfig.__dataclass_fields__
    assert set(SCHEDULE_SETTINGS) <= set(fields)


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path)
    trainer, _ = run(SubspaceScheduler(per_layer=True), logger=logger)
    events = accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {f"galore/{name}" for name in AGGREGATES | ONCE_REFRESHED_TWICE} <= scalars
    last = events.Scalars("galore/refreshes")[-1].value
    assert last == sum(status.num_refreshes for status in the_optimizer(trainer).subspaces())
    assert any(name.startswith("galore_energy/") for name in scalars)
    assert (Path(logger.log_dir) / FILE_NAME).is_file()
