# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lightning_galore.config import METHODS, GaLoreConfig
from lightning_galore.subspace import SUBSPACES


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": 0}, r"rank=0 must be at least 1; the paper uses a quarter of the hidden size, e\.g\. rank=128"),
        ({"update_proj_gap": 0}, r"update_proj_gap=0 must be at least 1; the paper uses 200, or 500 for fine-tuning"),
        ({"seed": -1}, r"seed=-1 must be at least 0; use any integer from 0 on"),
        ({"scale": 0.0}, r"scale=0\.0 must be positive and finite; the paper uses 0\.25"),
        ({"scale": -1.0}, r"scale=-1\.0 must be positive and finite"),
        ({"scale": float("nan")}, r"scale=nan must be positive and finite"),
        ({"scale": float("inf")}, r"scale=inf must be positive and finite"),
        ({"dense_lr_factor": 0}, r"dense_lr_factor=0 must be positive and finite; 1\.0 leaves the learning rate"),
        ({"proj_type": "both"}, r"proj_type='both' is not known; choose one of 'std', 'reverse_std', .*'full'"),
        ({"method": "adam"}, r"method='adam' is not known; choose one of None, 'galore', 'galore2'"),
        ({"subspace": "qr"}, r"subspace='qr' is not known; choose one of 'auto', 'randomized', 'svd'"),
        ({"schedule": "never"}, r"schedule='never' is not known; choose one of 'fixed'"),
        ({"lift": "fira"}, r"lift='fira' is not known; choose one of 'project_back'"),
        (
            {"basis_storage": "int3"},
            r"basis_storage='int3' is not known; choose one of 'param', 'fp32', 'bf16', 'fp16'",
        ),
        ({"target_modules": ""}, r"target_modules='' selects nothing; use \"all-linear\", a regular expression or a"),
        ({"target_modules": []}, r"target_modules=\[\] selects nothing"),
    ],
)
def test_value_out_of_range_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaLoreConfig(**setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": 4.0}, r"rank=4\.0 must be an integer; the paper uses"),
        ({"rank": "4"}, r"rank='4' must be an integer"),
        ({"rank": True}, r"rank=True must be an integer"),
        ({"update_proj_gap": 2.5}, r"update_proj_gap=2\.5 must be an integer"),
        ({"seed": None}, r"seed=None must be an integer"),
        ({"scale": "1"}, r"scale='1' must be a number; the paper uses"),
        ({"scale": True}, r"scale=True must be a number"),
        ({"dense_lr_factor": None}, r"dense_lr_factor=None must be a number"),
        ({"fix_signs": 1}, r"fix_signs=1 must be True or False"),
        ({"target_modules": [3]}, r"target_modules=\[3\] must hold module names, expressions or classes, not 3"),
        ({"target_modules": None}, r"target_modules=None must hold module names, expressions or classes"),
        ({"target_modules": 5}, r"target_modules=5 must hold module names, expressions or classes"),
        ({"ignore_modules": [""]}, r"ignore_modules=\[''\] must hold module names, expressions or classes, not ''"),
        ({"ignore_modules": None}, r"ignore_modules=None must hold module names, expressions or classes"),
    ],
)
def test_wrong_type_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        GaLoreConfig(**setting)


def test_settings_are_named_and_frozen() -> None:
    with pytest.raises(TypeError, match="positional"):
        GaLoreConfig(8)  # type: ignore[misc]
    config = GaLoreConfig(rank=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 4  # type: ignore[misc]
    assert config == GaLoreConfig(rank=8)
    assert hash(config) == hash(GaLoreConfig(rank=8))


def test_holds_primitives_only() -> None:
    config = GaLoreConfig(target_modules=[torch.nn.Linear, "attn"], ignore_modules=torch.nn.Conv1d)
    assert config.target_modules == ("class:torch.nn.modules.linear:Linear", "attn")
    assert config.ignore_modules == ("class:torch.nn.modules.conv:Conv1d",)
    for value in dataclasses.asdict(config).values():
        items = value if isinstance(value, tuple) else (value,)
        assert all(item is None or isinstance(item, (bool, int, float, str)) for item in items)


def test_defaults_are_those_of_the_paper() -> None:
    config = GaLoreConfig()
    assert (config.rank, config.update_proj_gap, config.scale, config.proj_type) == (128, 200, 0.25, "std")
    assert (config.subspace, config.schedule, config.lift) == ("randomized", "fixed", "project_back")
    assert (config.basis_storage, config.fix_signs, config.dense_lr_factor) == ("param", True, 1.0)


@pytest.mark.parametrize("method", METHODS)
def test_method_fills_the_axes_left_at_auto(method: Any) -> None:
    config = GaLoreConfig(method=method)
    assert config.subspace == METHODS[method]["subspace"]
    assert config.subspace in SUBSPACES


def test_named_setting_wins_over_the_method() -> None:
    assert GaLoreConfig(method="galore", subspace="gaussian").subspace == "gaussian"


def test_method_can_be_put_on_top_of_a_configuration() -> None:
    config = GaLoreConfig(rank=8).with_settings(method="galore")
    assert (config.subspace, config.rank) == ("svd", 8)
    assert config.with_settings(method="galore2").subspace == "randomized"
    assert config.with_settings(method="galore", subspace="gaussian").subspace == "gaussian"
    assert config.with_settings(rank=4).subspace == "svd"


def test_from_galore_torch_with_its_defaults() -> None:
    config = GaLoreConfig.from_galore_torch({"params": [], "lr": 0.1, "rank": 4, "dim": 2})
    assert config == GaLoreConfig(
        rank=4, update_proj_gap=200, scale=1.0, proj_type="std", subspace="svd", fix_signs=False
    )


def test_from_galore_torch_with_a_whole_group() -> None:
    group = {"rank": 4, "update_proj_gap": 7, "scale": 2.0, "proj_type": "full"}
    config = GaLoreConfig.from_galore_torch(group, scale=3.0, seed=5)
    assert (config.rank, config.update_proj_gap, config.scale, config.proj_type) == (4, 7, 3.0, "full")
    assert config.seed == 5


def test_from_galore_torch_without_a_rank() -> None:
    with pytest.raises(ValueError, match=r"group=\['lr', 'params'\] has no 'rank', .*full-rank; add rank="):
        GaLoreConfig.from_galore_torch({"params": [], "lr": 0.1})
    assert GaLoreConfig.from_galore_torch({"params": []}, rank=3).rank == 3


def test_from_galore_torch_refuses_tensors() -> None:
    with pytest.raises(ValueError, match=r"group\['dim'\]=3: only matrices \(dim=2\) can be mapped; leave this group"):
        GaLoreConfig.from_galore_torch({"rank": 4, "dim": 3})


def test_for_group_applies_the_keys_of_the_group() -> None:
    config = GaLoreConfig(rank=8, seed=3)
    group = {"params": [], "lr": 0.1, "rank": 2, "update_proj_gap": 5, "scale": 1.5, "proj_type": "left", "seed": 9}
    changed = config.for_group(group)
    assert changed == dataclasses.replace(config, rank=2, update_proj_gap=5, scale=1.5, proj_type="left")
    assert config.for_group({"params": [], "lr": 0.1}) is config
    assert config.for_group({"rank": None, "scale": None}) is config


def test_for_group_checks_values() -> None:
    with pytest.raises(ValueError, match=r"rank=0 must be at least 1"):
        GaLoreConfig().for_group({"rank": 0})
