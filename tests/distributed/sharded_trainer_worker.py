# SPDX-License-Identifier: Apache-2.0
"""One process of the runs under the Trainer with FSDP2."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_galore import GaLoreModelParallelStrategy, GaLoreStrategy, dtensors
from lightning_galore.strategies import GaLoreDDPStrategy
from tests.strategies.modules import SETTINGS, Tiny

from .processes import begin, end
from .sharded_trainer_cases import CASES, IN_ONE_FILE, REFUSED, SAVED, CliTiny, Configured, listing, plain_adamw
from .trainer_cases import MODES, Rows, Wide, checkpoints, fit, make_trainer

#: Of a model's basis, on one process.
MEDDLED_AT = 3


class Meddles(Callback):
    """Changes one basis on one process only."""

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == MEDDLED_AT and dist.get_rank():
            (optimizer,) = trainer.optimizers
            optimizer.state[pl_module.body[0].weight]["galore_basis"][1, 1] += 1e-5


class Placements(Callback):
    """Notes how weights and moments lie."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        for name, param in pl_module.named_parameters():
            moment = optimizer.state[param]["exp_avg"]
            assert dtensors.is_sharded(param)
            assert dtensors.is_sharded(moment)
            self.seen[name] = f"{param.placements} {moment.placements} {tuple(moment.shape)}"


def sharded(**settings: Any) -> GaLoreModelParallelStrategy:
    return GaLoreModelParallelStrategy(**{**SETTINGS, **settings})


def forms() -> dict[str, Any]:
    """The ways to name the strategy."""
    placements = Placements()
    return {
        "form-name": fit(Wide(), "galore_fsdp2", max_epochs=1),
        "form-base": fit(Tiny(), GaLoreStrategy(**SETTINGS, mode="project", base="model_parallel"), max_epochs=1),
        "form-class": fit(Tiny(), sharded(mode="project"), max_epochs=1, callbacks=[placements]),
        "placements": placements.seen,
    }


def saved(folder: Path) -> dict[str, Any]:
    """Runs that do not stop, and runs that stop after their first epoch and go on."""
    results: dict[str, Any] = {}
    for name, (settings, model) in SAVED.items():
        for form in ("folder", "file"):
            if form == "file" and name not in IN_ONE_FILE:
                continue
            place, many = folder / f"{name}-{form}", form == "folder"
            more: dict[str, Any] = {"callbacks": checkpoints(place), "enable_checkpointing": True}
            strategy = sharded(**settings, save_distributed_checkpoint=many)
            results[f"whole-{name}-{form}"] = fit(model(), strategy, **more)
            strategy = sharded(**settings, save_distributed_checkpoint=many)
            results[f"resumed-{name}-{form}"] = fit(model(), strategy, ckpt_path=place / "epoch=0.ckpt")
    return results


def crossed(folder: Path) -> dict[str, Any]:
    """Runs that go on with what another strategy has begun."""
    results: dict[str, Any] = {}
    for mode in MODES:
        for form in ("folder", "file"):
            begun = folder / f"{mode}-{form}" / "epoch=0.ckpt"
            results[f"ddp-{mode}-{form}"] = fit(Tiny(), GaLoreDDPStrategy(**SETTINGS, mode=mode), ckpt_path=begun)
        by_ddp, settings = folder / f"ddp-{mode}", {"enable_checkpointing": True, "max_epochs": 1}
        fit(Tiny(), GaLoreDDPStrategy(**SETTINGS, mode=mode), callbacks=checkpoints(by_ddp), **settings)
        results[f"from-ddp-{mode}"] = fit(Tiny(), sharded(mode=mode), ckpt_path=by_ddp / "epoch=0.ckpt")
        alone = folder / f"alone-{mode}" / "epoch=0.ckpt"
        results[f"from-alone-{mode}"] = fit(Tiny(), sharded(mode=mode), ckpt_path=alone)
    # In the placement of the one that goes on.
    begun = folder / "step-folder" / "epoch=0.ckpt"
    results["configured-from-step"] = fit(Configured(), sharded(mode="step"), ckpt_path=begun)
    results["shard-from-step"] = fit(Tiny(), sharded(mode="step", basis_placement="shard"), ckpt_path=begun)
    return results


def evaluated(folder: Path) -> dict[str, Any]:
    """Validation, test and prediction with the weights of a checkpoint."""
    results = {}
    for form in ("folder", "file"):
        path = str(folder / f"step-{form}" / "epoch=1.ckpt")
        data = DataLoader(Rows(), batch_size=None)
        metrics: list[Any] = []
        for call in ("validate", "test"):
            trainer = make_trainer(sharded(), limit_val_batches=1.0)
            metrics += getattr(trainer, call)(Tiny(), data, ckpt_path=path, verbose=False)
        trainer = make_trainer(sharded())
        predicted = trainer.predict(Tiny(), data, ckpt_path=path)
        results[form] = {"metrics": metrics, "predicted": predicted}
    return results


def refused() -> dict[str, tuple[str, str]]:
    """Class and message of each error."""
    errors = {}
    for name, (settings, trainer, model, _) in REFUSED.items():
        try:
            fit(model(), sharded(**settings), **trainer)
        except Exception as error:
            errors[name] = type(error).__name__, str(error)
        else:
            errors[name] = "", "nothing was raised"
    return errors


def misfits(folder: Path) -> dict[str, Any]:
    """Checkpoints that do not fit: the error, and whether the weights are still those of the start."""
    plain = folder / "plain"
    for form in (True, False):
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=form)
        settings = {"callbacks": checkpoints(plain / str(form)), "enable_checkpointing": True, "max_epochs": 1}
        fit(Configured(plain_adamw), strategy, **settings)
    attempts = {f"rank-{form}": (folder / f"project-{form}", {"rank": 2}) for form in ("folder", "file")}
    attempts |= {f"side-{form}": (folder / f"project-{form}", {"proj_type": "right"}) for form in ("folder", "file")}
    attempts |= {"plain-folder": (plain / "True", {}), "plain-file": (plain / "False", {})}
    results = {}
    for name, (place, settings) in attempts.items():
        model = Tiny(plain_adamw) if "plain" in name else Tiny()
        try:
            fit(model, sharded(**{"mode": "project", **settings}), ckpt_path=place / "epoch=0.ckpt")
            message = "nothing was raised"
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        start = dict(Tiny().named_parameters())
        same = all(torch.equal(dtensors.whole(p.detach()), start[key]) for key, p in model.named_parameters())
        results[name] = (message, same)
    return results


def meddled() -> tuple[str, int]:
    """The error of a run whose bases part, and the steps that it took."""
    model = Tiny()
    try:
        fit(model, sharded(mode="project", update_proj_gap=50, check_replicas_every=1), callbacks=[Meddles()])
    except RuntimeError as error:
        return str(error), len(model.losses)
    return "nothing was raised", -1


def from_yaml(folder: Path) -> dict[str, Any]:
    """The strategy in the YAML of a LightningCLI, by name and by class."""
    results = {}
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    by_class = {"class_path": "lightning_galore.GaLoreModelParallelStrategy", "init_args": {"rank": 5, "scale": 2.0}}
    for name, strategy in (("name", "galore_fsdp2"), ("class", by_class)):
        path = folder / f"{name}-{dist.get_rank()}.yaml"
        trainer = {**quiet, "accelerator": "cpu", "devices": 2, "max_steps": 3, "strategy": strategy}
        path.write_text(yaml.safe_dump({"trainer": trainer}))
        sys.argv = ["prog"]
        settings: dict[str, Any] = {"save_config_callback": None, "auto_configure_optimizers": False}
        cli = LightningCLI(CliTiny, args=["fit", "--config", str(path)], **settings)
        own = cli.trainer.strategy
        assert isinstance(own, GaLoreModelParallelStrategy)
        results[name] = (own.config.rank, own.config.scale, cli.trainer.global_step, own.targets_tables()[0].summary())
    return results


def main(folder: Path) -> None:
    begin()
    results: dict[str, Any] = {"folder": folder}
    for name, case in CASES.items():
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                results[name] = fit(case.model(), sharded(**case.settings, mode=case.mode), **case.trainer)
        except Exception as error:
            raise RuntimeError(f"case {name}") from error
        results[name]["warnings"] = [str(warning.message) for warning in caught]
    results |= forms()
    results |= saved(folder)
    results |= crossed(folder)
    results["evaluated"] = evaluated(folder)
    results["refused"], results["misfits"], results["meddled"] = refused(), misfits(folder), meddled()
    results["yaml"] = from_yaml(folder)
    results["files"] = {name: listing(folder / f"{name}-folder") for name in MODES}
    end(folder, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
