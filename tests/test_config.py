# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lightning_galore.config import AUTO, GROUP_KEYS, METHODS, RESETS, SCHEDULE_SETTINGS, GaLoreConfig
from lightning_galore.config.presets import NEEDED, WHY
from lightning_galore.subspace import SUBSPACES


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": 0}, r"rank=0 must be at least 1; the paper uses a quarter of the hidden size, e\.g\. rank=128"),
        ({"rank": 4.0}, r"rank=4\.0 must be an integer, or a fraction in \(0, 1\); .* rank=0\.25 is a quarter of the"),
        ({"rank": 1.5}, r"rank=1\.5 must be an integer, or a fraction in \(0, 1\)"),
        ({"rank": 1.0}, r"rank=1\.0 must be an integer, or a fraction in \(0, 1\)"),
        ({"rank": 0.0}, r"rank=0\.0 must be an integer, or a fraction in \(0, 1\)"),
        ({"rank": float("nan")}, r"rank=nan must be an integer, or a fraction in \(0, 1\)"),
        ({"min_rank": 0}, r"min_rank=0 must be at least 1; 1 is the least"),
        ({"rank": 4, "min_rank": 5}, r"min_rank=5 is above rank=4, the upper bound; lower it"),
        (
            {"rank_rule": "all"},
            r"rank_rule='all' is not known; choose one of 'auto', 'fixed', 'energy', 'energy_shrink', ",
        ),
        ({"rank_energy": 0.0}, r"rank_energy=0\.0 must be in \(0, 1\]; 0\.9 holds nine tenths"),
        ({"rank_energy": 1.1}, r"rank_energy=1\.1 must be in \(0, 1\]"),
        ({"rank_pattern": {"mlp": 0}}, r"rank_pattern\['mlp'\]=0 must be at least 1"),
        ({"rank_pattern": {"mlp": 1.5}}, r"rank_pattern\['mlp'\]=1\.5 must be an integer, or a fraction in \(0, 1\)"),
        ({"rank_pattern": {"mlp(": 4}}, r"rank_pattern: 'mlp\(' is not a valid regular expression"),
        ({"state_budget": 0, "rank_rule": "energy"}, r"state_budget=0 must be at least 1; give bytes, or None for no"),
        (
            {"state_budget": 10},
            r"state_budget=10 caps an adaptive rank, and rank_rule='fixed' has none; choose rank_rule",
        ),
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
        (
            {"schedule": "never"},
            r"schedule='never' is not known; choose one of 'auto', 'fixed', 'adaptive', 'cos', 'en",
        ),
        (
            {"moments": "drop"},
            r"moments='drop' is not known; choose one of 'auto', 'keep', 'rotate', 'rotate_first', 'r",
        ),
        ({"mode": "backward"}, r"mode='backward' is not known; choose one of 'step', 'project', 'layerwise'"),
        ({"refresh_warmup": -1}, r"refresh_warmup=-1 must be at least 0; 0 is no warm-up"),
        ({"refresh_share": 0.0}, r"refresh_share=0\.0 must be positive and finite; 0\.5 adds half of a step"),
        ({"min_gap": 0}, r"min_gap=0 must be at least 1; None follows update_proj_gap"),
        ({"max_gap": 0}, r"max_gap=0 must be at least 1; None follows update_proj_gap"),
        ({"min_gap": 201}, r"update_proj_gap=200 must lie between min_gap=201 and max_gap=1600; move the bounds"),
        ({"max_gap": 199}, r"update_proj_gap=200 must lie between min_gap=50 and max_gap=199; move the bounds"),
        ({"update_proj_gap": 8, "min_gap": 9}, r"update_proj_gap=8 must lie between min_gap=9 and max_gap=64"),
        ({"grow_above": 1.5}, r"grow_above=1\.5 must be in \(0, 1\]; it is a share of what a fresh basis is worth"),
        ({"shrink_below": 0.0}, r"shrink_below=0\.0 must be in \(0, 1\]"),
        ({"refresh_below": -0.5}, r"refresh_below=-0\.5 must be in \(0, 1\]"),
        ({"shrink_below": 0.9}, r"shrink_below=0\.9 must be less than grow_above=0\.7; lower it"),
        ({"grow_above": 0.3}, r"shrink_below=0\.4 must be less than grow_above=0\.3"),
        *(
            (
                {"subspace": "gaussian", "schedule": schedule},
                rf"schedule='{schedule}' compares bases, and those of subspace='gaussian' are drawn at random and not",
            )
            for schedule in ("adaptive", "cos", "energy")
        ),
        *(
            (
                {"subspace": "gaussian", "moments": moments},
                rf"moments='{moments}' turns moments from one orthonormal basis to the next, .* use moments='keep' or",
            )
            for moments in ("rotate", "rotate_first")
        ),
        *(
            (
                {"subspace": subspace, "rank_rule": "energy"},
                rf"rank_rule='energy' looks at singular values of the gradient, which subspace='{subspace}' does not",
            )
            for subspace in ("gaussian", "random_orthonormal", "columns")
        ),
        ({"tracking_rho": 1.0}, r"tracking_rho=1\.0 must be in \[0, 1\); 0\.7 follows the first moment mostly"),
        ({"tracking_rho": -0.1}, r"tracking_rho=-0\.1 must be in \[0, 1\)"),
        ({"clip_weight_norm": 0.0}, r"clip_weight_norm=0\.0 must be positive and finite; None clips nothing"),
        ({"residual_scale": 0.0}, r"residual_scale=0\.0 must be positive and finite; 1\.0 suits pre-training"),
        ({"random_after": -1}, r"random_after=-1 must be at least 0; None never takes random bases"),
        ({"random_after": 5, "subspace": "gaussian"}, r"random_after=5 draws orthonormal bases.*subspace='gaussian'"),
        ({"random_after": 5, "rank_rule": "energy"}, r"random_after=5 .*Use rank_rule='fixed'"),
        ({"lift": "fira"}, r"lift='fira' is not known; choose one of 'auto', 'project_back'"),
        (
            {"basis_storage": "int3"},
            r"basis_storage='int3' is not known; choose one of 'auto', 'param', 'fp32', 'bf16', 'fp16', 'int8', 'int4'",
        ),
        *(
            (
                {"subspace": subspace, "basis_storage": "seed"},
                rf"basis_storage='seed' with subspace='{subspace}', whose bases come from gradients: only those of "
                r"'gaussian' and 'random_orthonormal' can be drawn again\. Use one of these, or basis_storage='param'",
            )
            for subspace in ("randomized", "svd", "track", "columns")
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
        ({"rank": "4"}, r"rank='4' must be an integer"),
        ({"rank": True}, r"rank=True must be an integer"),
        ({"update_proj_gap": 2.5}, r"update_proj_gap=2\.5 must be an integer"),
        ({"stagger": 1}, r"stagger=1 must be True or False"),
        ({"refresh_share": "half"}, r"refresh_share='half' must be a number; 0\.5 adds half of a step"),
        ({"refresh_warmup": 0.5}, r"refresh_warmup=0\.5 must be an integer"),
        ({"min_gap": 0.5}, r"min_gap=0\.5 must be an integer"),
        ({"grow_above": True}, r"grow_above=True must be a number"),
        ({"min_rank": 0.5}, r"min_rank=0\.5 must be an integer"),
        ({"state_budget": 1e6, "rank_rule": "energy"}, r"state_budget=1000000\.0 must be an integer; give bytes"),
        ({"tracking_rho": "0.7"}, r"tracking_rho='0\.7' must be a number"),
        ({"rank_pattern": 4}, r"rank_pattern=4 must map module names to ranks, e\.g\."),
        ({"rank_pattern": ["mlp"]}, r"rank_pattern=\['mlp'\] must map module names to ranks, e\.g\."),
        ({"rank_pattern": {3: 4}}, r"rank_pattern=\{3: 4\} must map module names to ranks, not 3"),
        ({"rank_pattern": {"": 4}}, r"rank_pattern=\{'': 4\} must map module names to ranks, not ''"),
        ({"rank_pattern": {"mlp": "4"}}, r"rank_pattern\['mlp'\]='4' must be an integer"),
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
    patterns = GaLoreConfig(rank_pattern={"mlp": 4, "head": 0.5}).rank_pattern
    assert (
        patterns == GaLoreConfig(rank_pattern=[("mlp", 4), ("head", 0.5)]).rank_pattern == (("mlp", 4), ("head", 0.5))
    )
    for value in dataclasses.asdict(config).values():
        items = value if isinstance(value, tuple) else (value,)
        assert all(item is None or isinstance(item, (bool, int, float, str)) for item in items)


def test_defaults_are_those_of_the_paper() -> None:
    config = GaLoreConfig()
    assert (config.rank, config.update_proj_gap, config.scale, config.proj_type) == (128, 200, 0.25, "std")
    assert (config.subspace, config.schedule, config.lift) == ("randomized", "fixed", "project_back")
    assert (config.basis_storage, config.fix_signs, config.dense_lr_factor) == ("param", True, 1.0)


def test_defaults_beyond_the_paper() -> None:
    """Refreshes take turns and first moments keep their direction; the published methods do neither."""
    config = GaLoreConfig()
    assert (config.stagger, config.moments, config.rank_rule) == (True, "rotate_first", "fixed")
    assert {axis: getattr(config, axis) for axis in AUTO} == AUTO
    for method in ("galore", "galore2"):
        published = GaLoreConfig(method=method)  # type: ignore[arg-type]
        assert (published.stagger, published.moments, published.update_proj_gap) == (False, "keep", 200)


@pytest.mark.parametrize("method", METHODS)
def test_method_fills_the_axes_left_open(method: Any) -> None:
    wanted = {**AUTO, **METHODS[method]}
    wanted |= {axis: 8 for axis, choice in wanted.items() if choice == NEEDED}
    config = GaLoreConfig(method=method, **{axis: wanted[axis] for axis in WHY if wanted[axis] is not None})
    wanted |= RESETS.get(wanted["transform"], {})
    assert {axis: getattr(config, axis) for axis in wanted} == wanted
    assert config.subspace in SUBSPACES
    others: dict[str, Any] = {
        "rank": 3,
        "scale": 0.7,
        "subspace": "power",
        "schedule": "cos",
        "stagger": True,
        "moments": "reset",
        "update_proj_gap": 7,
        "random_after": 5,
        "tracking_rho": 0.3,
        "lift": "whiten",
        "basis_storage": "fp16",
        "weight_storage": "int8",
        "moment_storage": "base",
        "stochastic_round": False,
        "rank_rule": "fixed",
        "transform": "spam",
        "reset_gap": 9,
        "reset_warmup": 3,
    }
    assert others.keys() == AUTO.keys()
    named = GaLoreConfig(method=method, **others)
    assert {axis: getattr(named, axis) for axis in AUTO} == others


@pytest.mark.parametrize("axis", WHY)
def test_a_method_says_what_it_needs_to_be_told(axis: str) -> None:
    (method,) = [method for method, row in METHODS.items() if row.get(axis) == NEEDED]
    with pytest.raises(ValueError, match=f"method='{method}' with {axis}=None: .*{axis}=8000"):
        GaLoreConfig(method=method)  # type: ignore[arg-type]


def test_rank_and_scale_are_the_methods_unless_they_are_named() -> None:
    mini = GaLoreConfig(method="apollo-mini")
    assert (mini.rank, mini.scale, mini.factor, mini.lift) == (1, 128**0.5, 128**0.5, "tensor_scale")
    assert (GaLoreConfig(method="apollo").rank, GaLoreConfig(method="apollo").scale) == (128, 1.0)
    assert (GaLoreConfig(method="fira").rank, GaLoreConfig(method="fira").scale) == (128, 0.25)
    named = GaLoreConfig(method="apollo-mini", rank=4, scale=2.0)
    assert (named.rank, named.scale) == (4, 2.0)
    assert GaLoreConfig(rank=4, scale=2.0).with_settings(method="apollo-mini") == named
    assert GaLoreConfig().with_settings(method="apollo-mini") == mini
    assert mini.with_settings(method=None) == GaLoreConfig()
    assert GaLoreConfig.from_galore_torch({"rank": 4}).scale == 1.0


def test_seeds_are_kept_of_random_bases_only() -> None:
    assert GaLoreConfig(method="apollo").basis_storage == "seed"
    assert GaLoreConfig(method="apollo", subspace="random_orthonormal").basis_storage == "seed"
    with_svd = GaLoreConfig(method="apollo", subspace="svd")
    assert (with_svd.basis_storage, with_svd.lift) == ("param", "channel_scale")
    assert with_svd.with_settings(subspace="gaussian") == GaLoreConfig(method="apollo", subspace="gaussian")


def test_int8_weights_are_rounded_at_random_unless_it_is_said() -> None:
    assert GaLoreConfig().stochastic_round is False
    assert GaLoreConfig(weight_storage="int8").stochastic_round is True
    assert GaLoreConfig(weight_storage="int8", stochastic_round=False).stochastic_round is False
    assert GaLoreConfig(method="q-galore").stochastic_round is True
    assert GaLoreConfig().with_settings(weight_storage="int8").stochastic_round is True


def test_track_has_a_gap_of_one_unless_it_is_named() -> None:
    assert GaLoreConfig(method="galore-track").gap == 1
    assert GaLoreConfig(method="galore-track").gap_bounds(1) == (1, 8)
    assert GaLoreConfig(method="galore-track", update_proj_gap=5).gap == 5
    assert GaLoreConfig(method="galore-track").with_settings(update_proj_gap=5).gap == 5
    assert GaLoreConfig(update_proj_gap=5).with_settings(method="galore-track").gap == 5
    assert GaLoreConfig().with_settings(method="galore-track").gap == 1
    assert GaLoreConfig(method="galore-track").with_settings(method="galore").gap == 200


@pytest.mark.parametrize(
    ("settings", "gap", "bounds"),
    [({}, 200, (50, 1600)), ({}, 3, (1, 24)), ({"min_gap": 5}, 10, (5, 80)), ({"max_gap": 300}, 200, (50, 300))],
)
def test_gap_bounds_follow_the_gap_unless_they_are_named(
    settings: dict[str, Any], gap: int, bounds: tuple[int, int]
) -> None:
    assert GaLoreConfig(**settings).gap_bounds(gap) == bounds


def test_bounds_may_touch_the_gap() -> None:
    config = GaLoreConfig(update_proj_gap=10, min_gap=10, max_gap=10)
    assert config.gap_bounds(config.gap) == (10, 10)


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "shape", "expected"),
    [
        (4, (64, 16), 4),
        (0.25, (64, 16), 4),
        (0.25, (16, 64), 4),
        (0.5, (9, 64), 4),  # 4.5 rounds to the even one
        (0.01, (16, 16), 1),
    ],
)
def test_fraction_is_of_the_short_side(rank: int | float, shape: tuple[int, int], expected: int) -> None:
    assert GaLoreConfig(rank=rank).rank_of("layer", shape) == expected
    assert GaLoreConfig(rank=9).rank_of("layer", shape, named=rank) == expected
    assert GaLoreConfig(rank=9, rank_pattern={"layer": rank}).rank_of("layer", shape) == expected


def test_first_pattern_that_matches_counts_and_the_group_wins() -> None:
    config = GaLoreConfig(rank=8, rank_pattern={"attention": 0.25, r"blocks\.\d\.mlp": 3, "blocks": 5})
    shape = (64, 16)
    assert config.rank_of("blocks.0.attention.query", shape) == 4  # a substring
    assert config.rank_of("blocks.0.mlp", shape) == 3  # an expression that matches the whole name
    assert config.rank_of("blocks.0.mlp.up", shape) == 5  # it does not, but "blocks" is in it
    assert config.rank_of("head", shape) == 8
    assert config.rank_of("blocks.0.attention.query", shape, named=2) == 2


def test_fraction_may_have_any_least_rank() -> None:
    assert GaLoreConfig(rank=0.25, min_rank=64).min_rank == 64
    assert GaLoreConfig(rank=4, min_rank=4).min_rank == 4


def test_adaptive_rank() -> None:
    assert not GaLoreConfig().adaptive_rank
    assert GaLoreConfig(rank_rule="energy", state_budget=10).adaptive_rank
    assert GaLoreConfig(rank_rule="noise_edge").adaptive_rank


def test_gaussian_bases_come_with_the_fixed_schedule_and_keep_moments() -> None:
    config = GaLoreConfig(subspace="gaussian")
    assert (config.schedule, config.moments) == ("fixed", "keep")
    assert GaLoreConfig(subspace="gaussian", moments="reset").moments == "reset"
    assert GaLoreConfig().with_settings(subspace="gaussian") == config
    assert config.with_settings(subspace="svd").moments == "rotate_first"
    with pytest.raises(ValueError, match=r"schedule='energy' compares bases"):
        GaLoreConfig(schedule="energy").with_settings(subspace="gaussian")


# -- methods -----------------------------------------------------------------------------------------------------------


def test_named_setting_wins_over_the_method() -> None:
    assert GaLoreConfig(method="galore", subspace="gaussian").subspace == "gaussian"


def test_method_can_be_put_on_top_of_a_configuration() -> None:
    config = GaLoreConfig(rank=8).with_settings(method="galore")
    assert (config.subspace, config.rank) == ("svd", 8)
    assert config.with_settings(method="galore2").subspace == "randomized"
    assert config.with_settings(method="galore", subspace="gaussian").subspace == "gaussian"
    assert config.with_settings(rank=4).subspace == "svd"


def test_named_settings_stay_when_the_method_changes() -> None:
    named: dict[str, Any] = {"subspace": "gram", "moments": "reset", "stagger": True, "update_proj_gap": 7}
    config = GaLoreConfig(**named)
    for method in ("galore", "galore-track", "galore2", None):
        config = config.with_settings(method=method)
        assert {name: getattr(config, name) for name in named} == named
        assert config == GaLoreConfig(method=method, **named)  # type: ignore[arg-type]
    # What was left open goes with each method, there and back.
    config = GaLoreConfig(rank=8).with_settings(method="galore").with_settings(method="galore-track")
    assert config == GaLoreConfig(rank=8, method="galore-track")
    assert config.with_settings(method=None) == GaLoreConfig(rank=8)
    # Named on top, a setting is named from then on.
    config = GaLoreConfig(rank=8).with_settings(stagger=True).with_settings(method="galore")
    assert (config.stagger, config.moments) == (True, "keep")


def test_settings_by_name_are_fields() -> None:
    fields = {field.name for field in dataclasses.fields(GaLoreConfig)}
    assert fields.issuperset({*SCHEDULE_SETTINGS, *GROUP_KEYS, *AUTO})


def test_from_galore_torch_with_its_defaults() -> None:
    config = GaLoreConfig.from_galore_torch({"params": [], "lr": 0.1, "rank": 4, "dim": 2})
    assert config == GaLoreConfig(
        method="galore", rank=4, update_proj_gap=200, scale=1.0, proj_type="std", fix_signs=False
    )
    assert (config.subspace, config.stagger, config.moments) == ("svd", False, "keep")


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
