# SPDX-License-Identifier: Apache-2.0
"""The demo: one recipe trained twice, full-rank and with GaLore, side by side.

Run it with ``python -m lightning_galore.tasks.demo --config recipes/demo.yaml``. Both runs share the seed, the rows,
their order, the learning rate and the starting weights; only ``trainer.strategy`` differs. Every figure in the table
is measured in the run.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from lightning_galore.cli import GaLoreCLI, exit_status
from lightning_galore.cli.noise import without_notices
from lightning_galore.optimizer import GaLoreOptimizer
from lightning_galore.storage import nbytes
from lightning_galore.tasks.extras import require
from lightning_galore.tasks.glue import GlueModule
from lightning_galore.tasks.glue_data import GlueDataModule

_PROG = "python -m lightning_galore.tasks.demo"
_MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one training run gave. The bytes are those of the optimizer's state, for each parameter."""

    method: str
    accuracy: float
    train_seconds: float
    state_bytes: dict[str, int]
    projected: tuple[str, ...]
    chance: float
    checkpoint: str
    log: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    method: str
    accuracy: float
    state_mb: float
    projected_state_mb: float
    train_seconds: float
    checkpoint: str
    log: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """Both runs and what they are compared with."""

    full: Row
    galore: Row
    chance: float
    projected_weights: int

    @property
    def ratio(self) -> float:
        """How many times less optimizer state GaLore keeps for the weights that it projects."""
        return self.full.projected_state_mb / self.galore.projected_state_mb

    def shortfalls(self, *, min_accuracy: float, min_ratio: float) -> list[str]:
        """What the demo promises and did not keep; empty when all is well."""
        found = []
        if self.galore.accuracy < min_accuracy:
            found.append(f"GaLore's accuracy is {self.galore.accuracy:.3f}, expected at least {min_accuracy}")
        if self.ratio < min_ratio:
            found.append(f"GaLore keeps {self.ratio:.1f} times less state, expected at least {min_ratio} times")
        return found


def run_demo(config: Path, output_dir: Path, overrides: Sequence[str] = ()) -> Report:
    """Train the recipe full-rank and with its strategy.

    Args:
        config: The recipe, whose ``trainer.strategy`` is GaLore's.
        output_dir: Where logs and checkpoints go, one folder a run; those of an earlier demo are replaced.
        overrides: Options on top of the recipe, as for ``lightning-galore fit``.
    """
    full = _train("full-rank", config, output_dir, [*overrides, "--trainer.strategy=auto"])
    galore = _train("galore", config, output_dir, list(overrides))
    return Report(
        full=_row(full, galore.projected),
        galore=_row(galore, galore.projected),
        chance=galore.chance,
        projected_weights=len(galore.projected),
    )


def _train(name: str, config: Path, output_dir: Path, overrides: list[str]) -> Run:
    folder = output_dir / name
    timer = Timer()
    logger = {"save_dir": str(output_dir), "name": name, "version": ""}
    cli = GaLoreCLI(
        args=[
            f"--config={config}",
            "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
            *(f"--trainer.logger.{key}={value}" for key, value in logger.items()),
            "--trainer.enable_checkpointing=false",  # saved below instead, outside of the time that is measured
            *overrides,
        ],
        run=False,
        trainer_defaults={"callbacks": [timer]},
        prog=_PROG,
    )
    trainer, model, data = cli.trainer, cast("GlueModule", cli.model), cast("GlueDataModule", cli.datamodule)
    _fit(trainer, model, data)
    # Written over the one of an earlier demo: each takes 200 MB and more.
    trainer.save_checkpoint(folder / "last.ckpt", weights_only=False)  # said, or Lightning tells of its default
    optimizer = trainer.optimizers[0]
    targets = optimizer.targets if isinstance(optimizer, GaLoreOptimizer) else {}
    if name == "galore" and not targets:
        raise ValueError(
            f"{config} does not train with GaLore: set trainer.strategy to lightning_galore.GaLoreStrategy."
        )
    method = "AdamW, full rank"
    if targets:
        method = "GaLore, rank " + ", ".join(sorted({str(target.projection.rank) for target in targets.values()}))
    return Run(
        method=method,
        accuracy=float(trainer.callback_metrics[model.task.monitor]),
        train_seconds=timer.time_elapsed("train") - timer.time_elapsed("validate"),
        state_bytes={key: nbytes(optimizer.state.get(p, {})) for key, p in model.named_parameters()},
        projected=tuple(target.name for target in targets.values()),
        chance=data.majority_share(),
        checkpoint=str(folder / "last.ckpt"),
        log=str(folder / "metrics.csv"),
    )


def _fit(trainer: Trainer, model: LightningModule, data: LightningDataModule) -> None:
    try:
        with warnings.catch_warnings():
            # That is what the demo wants: it writes over the log of an earlier one.
            warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
            trainer.fit(model, data)
    except SystemExit as error:
        if trainer.interrupted:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from error
        raise


def _row(run: Run, projected: Sequence[str]) -> Row:
    return Row(
        method=run.method,
        accuracy=run.accuracy,
        state_mb=sum(run.state_bytes.values()) / _MB,
        projected_state_mb=sum(run.state_bytes[name] for name in projected) / _MB,
        train_seconds=run.train_seconds,
        checkpoint=run.checkpoint,
        log=run.log,
    )


def _show(report: Report) -> None:
    table = require("rich.table").Table(title="One recipe, trained full-rank and with GaLore")
    table.add_column("", no_wrap=True)
    for title in (
        "held-out accuracy",
        "optimizer state, MB",
        f"of it for the {report.projected_weights} projected weights, MB",
        "training, s",
    ):
        table.add_column(title, justify="right")
    for row in (report.full, report.galore):
        table.add_row(
            row.method,
            f"{row.accuracy:.3f}",
            f"{row.state_mb:.1f}",
            f"{row.projected_state_mb:.2f}",
            f"{row.train_seconds:.0f}",
        )
    table.add_section()
    table.add_row("ratio", "", f"{report.full.state_mb / report.galore.state_mb:.1f} x", f"{report.ratio:.1f} x", "")
    table.add_row("chance (majority)", f"{report.chance:.3f}", "", "", "")
    console = require("rich.console").Console(soft_wrap=True)
    console.print(table)
    for row in (report.full, report.galore):
        console.print(f"{row.method}: checkpoint {row.checkpoint}, log {row.log}", highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description="Train one recipe full-rank and with GaLore, and compare accuracy and optimizer memory.",
        epilog="Further options go to the recipe, for example: --seed_everything 2 --data.train_limit 1000",
    )
    parser.add_argument("--config", type=Path, required=True, help="the recipe, such as recipes/demo.yaml")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/demo"), help="where to write (default: %(default)s)"
    )
    parser.add_argument("--min_accuracy", type=float, default=0.75, help="fail below this (default: %(default)s)")
    parser.add_argument("--min_ratio", type=float, default=4.0, help="fail below this saving (default: %(default)s)")
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Run the demo, show its table and write it to ``report.json``.

    Args:
        args: The arguments; ``sys.argv`` by default.

    Returns:
        0, or 1 when the accuracy or the saving is not what it should be.
    """
    options, overrides = _parser().parse_known_args(args)

    def run() -> int:
        report = run_demo(options.config, options.output_dir, overrides)
        _show(report)
        path = options.output_dir / "report.json"
        path.write_text(json.dumps({**asdict(report), "ratio": report.ratio}, indent=2) + "\n", encoding="utf-8")
        shortfalls = report.shortfalls(min_accuracy=options.min_accuracy, min_ratio=options.min_ratio)
        sys.stdout.write(f"All figures: {path}\n")
        for shortfall in shortfalls:
            sys.stderr.write(f"The demo missed its mark: {shortfall}.\n")
        return 1 if shortfalls else 0

    with without_notices():
        return exit_status(run, prog=_PROG)


if __name__ == "__main__":
    sys.exit(main())
