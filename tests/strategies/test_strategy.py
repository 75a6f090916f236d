# SPDX-License-Identifier: Apache-2.0
"""How ``GaLoreStrategy`` becomes a Lightning strategy, what it refuses, and whence its keywords come."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import pickle
import re
import typing
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from lightning_galore import GaLoreConfig, GaLoreSingleDeviceStrategy, GaLoreStrategy
from lightning_galore.config import Rank
from lightning_galore.strategies import GaLoreDDPStrategy

from .modules import (
    PROJECTED,
    RANK,
    SETTINGS,
    Tiny,
    assert_same_weights,
    expect_warning,
    fit,
    galore,
    loader,
    make_trainer,
    the_optimizer,
)


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: GaLoreStrategy(rank=4),
        lambda: GaLoreStrategy(rank=4, base="single_device"),
        lambda: GaLoreStrategy(rank=4, device="cpu"),
        lambda: GaLoreStrategy(rank=4, base="single_device", device=torch.device("cpu")),
        lambda: GaLoreSingleDeviceStrategy(rank=4),
        lambda: "galore",
    ],
    ids=["instance", "base", "device", "base and device", "class", "name"],
)
def test_it_becomes_a_single_device_strategy(strategy: Any) -> None:
    trainer = make_trainer(strategy())
    resolved = trainer.strategy
    assert type(resolved) is GaLoreSingleDeviceStrategy
    assert isinstance(resolved, GaLoreStrategy)
    assert isinstance(resolved, SingleDeviceStrategy)
    assert resolved.root_device == torch.device("cpu")
    assert resolved.config.rank == (128 if strategy() == "galore" else 4)
    assert not trainer._accelerator_connector.is_distributed
    assert (trainer.world_size, trainer.num_devices, trainer.num_nodes) == (1, 1, 1)
    assert resolved.launcher is None
    assert not torch.distributed.is_initialized()


def test_the_name_is_registered_with_a_description() -> None:
    assert "galore" in StrategyRegistry.available_strategies()
    assert "GaLore" in StrategyRegistry["galore"]["description"]


def test_the_sampler_is_the_users() -> None:
    trainer = make_trainer(galore())
    trainer.fit(Tiny(), DataLoader(loader().dataset, batch_size=8, shuffle=True), loader(2))
    assert type(trainer.train_dataloader.sampler) is RandomSampler
    assert type(trainer.val_dataloaders.sampler) is SequentialSampler


@pytest.mark.parametrize("flags", [{"devices": 2}, {"num_nodes": 2}, {"devices": 3, "num_nodes": 2}])
@pytest.mark.parametrize("strategy", ["galore", "galore_ddp", {"base": "auto"}, {"base": "ddp"}], ids=str)
def test_on_several_devices_it_becomes_a_ddp_strategy(strategy: Any, flags: dict[str, int]) -> None:
    trainer = make_trainer(strategy if isinstance(strategy, str) else GaLoreStrategy(rank=4, **strategy), **flags)
    resolved = trainer.strategy
    assert type(resolved) is GaLoreDDPStrategy
    assert isinstance(resolved, DDPStrategy)
    assert resolved.config.rank == (128 if isinstance(strategy, str) else 4)
    wanted = {"devices": 1, "num_nodes": 1, **flags}
    assert (trainer.num_devices, trainer.num_nodes) == (wanted["devices"], wanted["num_nodes"])
    assert trainer.world_size == wanted["devices"] * wanted["num_nodes"]
    assert resolved.launcher is not None
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("flags", [{"devices": 2}, {"num_nodes": 2}, {"devices": 3, "num_nodes": 2}])
def test_several_devices_are_refused_where_one_was_asked_for(flags: dict[str, int]) -> None:
    wanted = {"devices": 1, "num_nodes": 1, **flags}
    message = rf"devices={wanted['devices']}, num_nodes={wanted['num_nodes']}.*Set devices=1 and num_nodes=1"
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(GaLoreStrategy(base="single_device"), **flags)


def elastic_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the second of two processes that torchrun has started."""
    for key, value in {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(key, value)
    # Lightning keeps the rank for all that follow.
    monkeypatch.setattr("lightning.fabric.utilities.rank_zero.rank_zero_only.rank", 0)


def test_under_an_external_launcher_it_becomes_a_ddp_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    elastic_launch(monkeypatch)
    trainer = make_trainer(galore(), devices=2)
    assert type(trainer.strategy) is GaLoreDDPStrategy
    assert (trainer.world_size, trainer.global_rank, trainer.local_rank) == (2, 1, 1)


def test_an_external_launcher_with_several_processes_is_refused_for_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    elastic_launch(monkeypatch)
    with pytest.raises(MisconfigurationException, match=r"2 launched process"):
        make_trainer(galore(base="single_device"))


def test_the_check_interval_is_kept_and_never_negative() -> None:
    assert make_trainer(GaLoreStrategy(check_replicas_every=3), devices=2).strategy.check_replicas_every == 3
    with pytest.raises(ValueError, match="check_replicas_every=-1 must be at least 0"):
        GaLoreDDPStrategy(rank=4, check_replicas_every=-1)


def test_unknown_keywords_and_bases_are_refused_at_once() -> None:
    with pytest.raises(TypeError, match="rnak"):
        GaLoreStrategy(rnak=4)
    with pytest.raises(ValueError, match=r"base='fsdp' is not known; choose one of 'auto', 'single_device', 'ddp'"):
        GaLoreStrategy(base="fsdp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"base='fsdp' is not known"):
        GaLoreSingleDeviceStrategy(base="fsdp")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"update_proj_gap": 0}, "update_proj_gap=0 must be at least 1"),
        ({"scale": -1.0}, r"scale=-1\.0 must be positive"),
        ({"proj_type": "middle"}, "proj_type='middle' is not known; choose one of 'std'"),
        ({"target_modules": []}, "target_modules=.* selects nothing"),
    ],
)
def test_settings_out_of_range_are_refused_at_construction(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaLoreStrategy(**setting)


def test_copies_keep_class_and_settings() -> None:
    fresh = GaLoreStrategy(rank=4, target_modules=["body"])
    used = make_trainer(GaLoreStrategy(rank=4, target_modules=["body"])).strategy
    for strategy in (fresh, used):
        for other in (copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))):
            assert type(other) is type(strategy)
            assert other.config == strategy.config
    assert type(make_trainer(copy.deepcopy(fresh)).strategy) is GaLoreSingleDeviceStrategy


def test_a_copy_of_a_strategy_that_has_trained_keeps_state() -> None:
    trainer = fit(Tiny())
    optimizer = the_optimizer(trainer)
    (other,) = pickle.loads(pickle.dumps(trainer.strategy)).optimizers
    assert type(other).__name__ == type(optimizer).__name__ == "GaLoreAdamW"
    assert [target.name for target in other.targets.values()] == list(PROJECTED)
    steps = [other.state[param]["galore_step"] for param in other.targets]
    assert steps == [6, 6]


def test_the_keywords_are_those_of_the_configuration() -> None:
    parameters = dict(inspect.signature(GaLoreStrategy.__init__).parameters)
    fields = {field.name: field for field in dataclasses.fields(GaLoreConfig)}
    assert list(parameters) == ["self", *fields, "check_replicas_every", "base", "kwargs"]
    ours, theirs = typing.get_type_hints(GaLoreStrategy.__init__), typing.get_type_hints(GaLoreConfig)
    # A mapping in YAML is a dict; a configuration keeps it as pairs.
    assert (parameters["rank_pattern"].default, fields.pop("rank_pattern").default) == (None, None)
    assert ours["rank_pattern"] == (dict[str, Rank] | None)
    for name, field in fields.items():
        assert parameters[name].default == field.default, name
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize("cls", [GaLoreConfig, GaLoreStrategy])
def test_every_keyword_is_documented(cls: type) -> None:
    section = (inspect.getdoc(cls) or "").split("Args:")[1].split("Raises:")[0]
    documented = re.findall(r"^    \**(\w+):", section, flags=re.MULTILINE)
    assert documented == [name for name in inspect.signature(cls).parameters if name != "self"]


# A value other than the default for every keyword.
OTHERS: dict[str, Any] = {
    "rank": 5,
    "update_proj_gap": 9,
    "scale": 2.0,
    "proj_type": "full",
    "target_modules": "body.*",
    "ignore_modules": ["head"],
    "method": "galore",
    "subspace": "gram",
    "random_after": None,
    "schedule": "energy",
    "stagger": False,
    "refresh_share": 0.25,
    "refresh_warmup": 20,
    "min_gap": 2,
    "max_gap": 50,
    "grow_above": 0.8,
    "shrink_below": 0.5,
    "refresh_below": 0.6,
    "moments": "reset",
    "rank_rule": "energy",
    "rank_energy": 0.8,
    "min_rank": 2,
    "rank_pattern": {"body": 4, "head": 0.5},
    "state_budget": 10_000,
    "tracking_rho": 0.5,
    "head_size": 32,
    "transform": "stable-spam",
    "spam_theta": 2000.0,
    "natural_history": 3,
    "natural_damping": 0.1,
    "reset_gap": 40,
    "reset_warmup": 10,
    "lift": "whiten",
    "residual_scale": 0.1,
    "mode": "project",
    "basis_storage": "bf16",
    "weight_storage": "int8",
    "moment_storage": "8bit",
    "accumulator_storage": "fp32",
    "basis_placement": "shard",
    "fused_backward": True,
    "compress_activations": True,
    "stochastic_round": False,
    "clip_weight_norm": 1.0,
    "fix_signs": False,
    "dense_lr_factor": 0.5,
    "seed": 3,
}


def test_every_keyword_arrives_in_the_configuration() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(GaLoreConfig)}
    assert OTHERS.keys() == defaults.keys()
    same = [name for name, value in OTHERS.items() if value == defaults[name]]
    assert same == ["random_after"]  # which an adaptive rank excludes: see the next test
    assert GaLoreStrategy(**OTHERS).config == GaLoreConfig(**OTHERS)
    assert GaLoreStrategy().config == GaLoreConfig()
    names = ["rank", "update_proj_gap", "scale", "proj_type"]
    assert GaLoreStrategy(*(OTHERS[name] for name in names)).config == GaLoreConfig(**{n: OTHERS[n] for n in names})


def test_random_after_arrives_in_the_configuration() -> None:
    assert GaLoreStrategy(random_after=7).config == GaLoreConfig(random_after=7) != GaLoreConfig()


def test_keywords_of_the_lightning_strategy_are_handed_on() -> None:
    from lightning.pytorch.plugins import DoublePrecision

    plugin = DoublePrecision()
    strategy = galore(precision_plugin=plugin)
    model = Tiny()
    fit(model, strategy)
    assert strategy.precision_plugin is plugin
    assert {param.dtype for param in model.parameters()} == {torch.float64}


def test_tables_say_what_is_projected_and_why_not(caplog: pytest.LogCaptureFixture) -> None:
    strategy = galore()
    assert strategy.targets_tables() == []
    with caplog.at_level(logging.INFO):
        trainer = fit(Tiny(), strategy)
    (table,) = trainer.strategy.targets_tables()
    assert {row.name for row in table.taken} == set(PROJECTED)
    reasons = {row.name: row.reason for row in table.rows}
    assert reasons["head.weight"] == "output head (all-linear leaves it out)"
    assert reasons["body.3.weight"] == "order 1: only matrices are projected"
    assert len(table.rows) == 8
    assert "2 of 8 parameters are projected, 320 of 424 entries" in caplog.text


def test_tables_count_the_bytes_that_are_held() -> None:
    planned: list[list[int | None]] = []

    class Plans(Tiny):
        def on_fit_start(self) -> None:
            (table,) = self.trainer.strategy.targets_tables()
            planned.append([row.state_bytes for row in table.taken])

    trainer = fit(Plans())
    optimizer = the_optimizer(trainer)
    (table,) = trainer.strategy.targets_tables()
    held = [
        sum(value.nbytes for value in optimizer.state[param].values() if isinstance(value, Tensor))
        for param in optimizer.targets
    ]
    assert [row.state_bytes for row in table.taken] == held == planned[0]


class Flat(LightningModule):
    """Its only matrices are as given."""

    def __init__(self, *outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, output) for output in outputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return torch.stack([layer(batch[0]).square().sum() for layer in self.layers]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def test_nothing_to_project_is_an_error_of_fit() -> None:
    with pytest.raises(ValueError, match=r"rank=3.*leaves no weight to project.*nothing would be saved"):
        make_trainer(galore()).fit(Flat(RANK), loader())
    with pytest.raises(ValueError, match=r"target_modules='nothing'.*Linear modules here: body\.0, body\.2, head"):
        make_trainer(galore(target_modules="nothing")).fit(Tiny(), loader(), loader())


def test_selected_weights_no_larger_than_the_rank_are_warned_of() -> None:
    with expect_warning(r"rank=3: 2 selected weights are no larger than .*layers\.1.*layers\.2.*Lower the rank"):
        make_trainer(galore()).fit(Flat(16, 3, 2), loader())
    # A single output has no smaller rank: no advice, and a warning would be an error here.
    make_trainer(galore()).fit(Flat(16, 1), loader())


def test_the_same_run_twice_gives_the_same_bits() -> None:
    models = Tiny(), Tiny()
    for model in models:
        fit(model, max_epochs=2)
    assert_same_weights(*models)
    other = Tiny()
    fit(other, galore(seed=1), max_epochs=2)
    assert not torch.equal(other.body[0].weight, models[0].body[0].weight)


def test_deterministic_mode_is_accepted() -> None:
    model, other = Tiny(), Tiny()
    try:
        fit(model, deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    fit(other)
    assert_same_weights(model, other)


def test_one_instance_serves_one_trainer_as_in_lightning() -> None:
    strategy = GaLoreStrategy(**SETTINGS)
    make_trainer(strategy)
    with pytest.raises(MisconfigurationException, match="accelerator set through both strategy class"):
        make_trainer(strategy)


def test_a_misspelt_keyword_is_refused_in_our_words() -> None:
    with pytest.raises(TypeError, match=r"GaLoreStrategy got an unknown argument rnak=4; did you mean 'rank'\?"):
        GaLoreStrategy(rnak=4)


def test_a_named_device_is_kept_and_must_be_the_only_one() -> None:
    strategy = GaLoreStrategy(rank=2, device=torch.device("cpu"))
    trainer = Trainer(strategy=strategy, accelerator="cpu", logger=False, enable_checkpointing=False)
    assert trainer.strategy.root_device == torch.device("cpu")
    with pytest.raises(MisconfigurationException, match="the Trainer has 2 devices"):
        Trainer(strategy=GaLoreStrategy(rank=2, device=torch.device("cpu")), accelerator="cpu", devices=2)
