# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name: which class a name gives, with which settings, and what a wrong one is told."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_galore.base_probe import _IN_8BIT, check_moves
from lightning_galore.named_optimizers import ALIASES, NAMED, named_optimizer, written


def weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(6, 4))


def known(name: str) -> str:
    """The name, or a skip where its package is not installed."""
    pytest.importorskip(NAMED[ALIASES.get(name, name)].package)
    return name


@pytest.mark.parametrize("name", [*NAMED, *ALIASES])
def test_every_name_gives_an_optimizer_that_trains(name: str) -> None:
    param = weight()
    base = named_optimizer(known(name), lr=0.25)([param])
    expected = NAMED[ALIASES.get(name, name)]
    assert type(base).__name__ == expected.cls
    assert type(base).__module__.split(".")[0] == expected.package
    assert float(base.param_groups[0]["lr"]) == 0.25
    check_moves(base, [param])


@pytest.mark.parametrize(
    ("name", "package", "cls"),
    [
        ("AdamW", "torch", "AdamW"),
        ("adamw_torch_fused", "torch", "AdamW"),
        ("adamw_bnb_8bit", "bitsandbytes", "AdamW8bit"),
        ("adamw_8bit", "bitsandbytes", "AdamW8bit"),
        ("ADAMW-8bit", "bitsandbytes", "AdamW8bit"),
        ("paged_adamw_8bit", "bitsandbytes", "PagedAdamW8bit"),
        ("PagedAdamW8bit", "bitsandbytes", "PagedAdamW8bit"),
        ("lion_8bit", "bitsandbytes", "Lion8bit"),
        ("adamw_torch_8bit", "torchao", "AdamW8bit"),
        ("torchao_adamw8bit", "torchao", "AdamW8bit"),
        ("adamw_torch_4bit", "torchao", "AdamW4bit"),
        ("adamw_fp8", "torchao", "AdamWFp8"),
        ("adafactor", "torch", "Adafactor"),
        ("Muon", "torch", "Muon"),
    ],
)
def test_spellings(name: str, package: str, cls: str) -> None:
    pytest.importorskip(package)
    base = named_optimizer(name)([weight()], lr=0.5)
    assert (type(base).__module__.split(".")[0], type(base).__name__) == (package, cls)
    assert bool(base.param_groups[0].get("fused")) is ("fused" in name)


def test_shared_settings_go_where_they_mean_the_same_and_those_of_the_call_win() -> None:
    shared: dict[str, Any] = {"lr": 0.5, "betas": (0.5, 0.75), "eps": 1e-3}
    adamw = named_optimizer("adamw", **shared)([weight()], eps=1e-4, weight_decay=0.125).defaults
    assert (adamw["lr"], adamw["betas"], adamw["eps"], adamw["weight_decay"]) == (0.5, (0.5, 0.75), 1e-4, 0.125)
    assert named_optimizer("sgd", **shared)([weight()]).defaults["lr"] == 0.5
    assert named_optimizer("adafactor", **shared)([weight()]).defaults["eps"] == (None, 1e-3)
    assert named_optimizer("rmsprop", **shared)([weight()]).defaults["eps"] == 1e-3
    with pytest.raises(TypeError, match="nonsense"):
        named_optimizer("adamw")([weight()], nonsense=1)


@pytest.mark.parametrize("name", [name for name, one in NAMED.items() if one.package == "bitsandbytes"])
def test_nothing_is_given_by_position_but_the_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between versions of bitsandbytes the positions of arguments shifted, and optimizers stopped training."""
    bnb = pytest.importorskip("bitsandbytes")
    calls: list[tuple[tuple[Any, ...], set[str]]] = []
    monkeypatch.setattr(bnb.optim, NAMED[name].cls, lambda *args, **settings: calls.append((args, set(settings))))
    params = [weight()]
    named_optimizer(name, lr=0.5, betas=(0.9, 0.99), eps=1e-8)(params, weight_decay=0.0)
    assert calls == [((params,), {*NAMED[name].takes, *NAMED[name].settings, "weight_decay"})]


def test_names_that_the_check_of_moments_recommends_are_known() -> None:
    for instead in _IN_8BIT.values():
        package, _, cls = instead.split(".")
        found = NAMED[cls.lower()]
        assert (found.package, found.cls) == (package, cls)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamw8bits", r"optimizer='adamw8bits' is not known\. Did you mean 'adamw8bit', .*Known: adamw, adamw_fused,"),
        ("Adam W 8 bit!", r"optimizer='Adam W 8 bit!' is not known\. Did you mean 'adamw8bit'"),
        ("paged_adamw8bits", r"Did you mean 'paged_adamw8bit', .*, paged_adamw8bit, .*, torchao_adamw8bit,"),
        ("", r"optimizer='' is not known\. Known: adamw,"),
        ("torch.optim.NAdams", r"optimizer='torch\.optim\.NAdams' is not known"),
    ],
)
def test_unknown_name_is_refused_with_the_closest_ones(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named_optimizer(name)


def test_names_are_said_as_the_documentation_writes_them() -> None:
    page = (Path(__file__).parent.parent / "docs" / "optimizers.md").read_text().partition("## By name")[2]
    documented = set(re.findall(r"`(\w+)`", page))
    assert {written(name) for name in NAMED} <= documented
    assert all(written(name).replace("_", "") == name for name in (*NAMED, *ALIASES))


@pytest.mark.parametrize(
    ("name", "package", "message"),
    [
        ("adamw8bit", "bitsandbytes", r"'adamw8bit' needs bitsandbytes\. .*pip install lightning-galore\[bnb\]"),
        ("adamw4bit", "torchao", r"optimizer='adamw4bit' needs torchao\. Install it: pip install torchao"),
    ],
)
def test_missing_package_is_named(name: str, package: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=message):
        named_optimizer(name)
    assert named_optimizer("adamw") is not None


def test_class_that_the_installed_version_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ImportError, match=r"'muon' needs Muon, .*installed torch does not have.* --upgrade torch"):
        named_optimizer("muon")
