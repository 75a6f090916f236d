# SPDX-License-Identifier: Apache-2.0
"""One process of the runs under the Trainer."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import override

from lightning_galore import GaLoreOptimizer, GaLoreStrategy, RandomStates
from lightning_galore.strategies import GaLoreDDPStrategy
from tests.strategies.modules import SETTINGS, Tiny, adamw

from .processes import begin, end
from .trainer_cases import CASES, MODES, REFUSED, CountingIO, Dropped, Normed, Wide, checkpoints, fit


class Meddles(Callback):
    """Changes one weight on one process only."""

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == 3 and dist.get_rank():
            with torch.no_grad():
                pl_module.body[2].weight[3, 4] += 1e-4


def own_galore(model: Tiny) -> GaLoreOptimizer:
    """A wrapped optimizer in the user's own module, under Lightning's own strategy."""
    return GaLoreOptimizer(adamw(model), model, **SETTINGS)


def forms() -> dict[str, Any]:
    """The ways to name the strategy."""
    return {
        "name": fit(Wide(), "galore_ddp", max_epochs=1),
        "auto": fit(Tiny(), GaLoreStrategy(**SETTINGS, mode="project"), max_epochs=1),
        "base": fit(Tiny(), GaLoreStrategy(**SETTINGS, mode="project", base="ddp"), max_epochs=1),
        "class": fit(Tiny(), GaLoreDDPStrategy(**SETTINGS, mode="project"), max_epochs=1),
    }


def resumed(folder: Path) -> dict[str, Any]:
    """Runs that stop after their first epoch and go on, beside runs that do not stop."""
    results: dict[str, Any] = {}
    for mode in MODES:
        io = CountingIO()
        whole = GaLoreDDPStrategy(**SETTINGS, mode=mode)
        settings = {"callbacks": checkpoints(folder / mode), "enable_checkpointing": True, "plugins": [io]}
        results[f"whole-{mode}"] = fit(Tiny(), whole, **settings)
        results[f"writes-{mode}"] = io.writes
        again, after = GaLoreDDPStrategy(**SETTINGS, mode=mode), folder / mode / "epoch=0.ckpt"
        results[f"resumed-{mode}"] = fit(Tiny(), again, ckpt_path=after)
        other = GaLoreDDPStrategy(**SETTINGS, mode=mode)
        results[f"widened-{mode}"] = fit(Tiny(), other, ckpt_path=folder / f"alone-{mode}" / "epoch=0.ckpt")
    for name, after in (("whole", None), ("resumed", folder / "whole-dropped" / "epoch=0.ckpt")):
        callbacks = [*checkpoints(folder / f"{name}-dropped"), RandomStates()]
        strategy, more = GaLoreDDPStrategy(**SETTINGS, mode="project"), {"enable_checkpointing": True}
        results[f"{name}-dropped"] = fit(Dropped(), strategy, ckpt_path=after, callbacks=callbacks, **more)
    return results


def refused() -> dict[str, tuple[str, str]]:
    """Class and message of each error."""
    errors = {}
    for name, (settings, trainer, model) in REFUSED.items():
        try:
            fit(model(), GaLoreStrategy(**{**SETTINGS, **settings}, base="ddp"), **trainer)
        except Exception as error:
            errors[name] = type(error).__name__, str(error)
        else:
            errors[name] = "", "nothing was raised"
    return errors


def meddled() -> tuple[str, int]:
    """The error of a run whose replicas part, and the steps that it took."""
    model = Tiny()
    try:
        fit(model, GaLoreDDPStrategy(**SETTINGS, mode="project", check_replicas_every=1), callbacks=[Meddles()])
    except RuntimeError as error:
        return str(error), len(model.losses)
    return "nothing was raised", -1


def main(folder: Path) -> None:
    begin()
    results: dict[str, Any] = {"folder": folder}
    for name, case in CASES.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            strategy = GaLoreDDPStrategy(**{**SETTINGS, **case.settings}, mode=case.mode)
            results[name] = fit(case.model(), strategy, **case.trainer)
        results[name]["warnings"] = [str(warning.message) for warning in caught]
    results["plain-normed"] = fit(Normed(own_galore), DDPStrategy(), **CASES["step-normed"].trainer)
    results |= {f"form-{name}": result for name, result in forms().items()}
    results |= resumed(folder)
    results["refused"] = refused()
    results["meddled"] = meddled()
    end(folder, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
