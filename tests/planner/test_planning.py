# SPDX-License-Identifier: Apache-2.0
"""The plan: its columns, several devices, budgets, models by name, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_galore import GaLoreConfig, plan
from lightning_galore.planner import BUILT_IN, CANDIDATES, Devices, bytes_of, named_job, sources
from lightning_galore.planner.search import free_ranks
from lightning_galore.planner.sharing import LOW_RANK_BUCKETS, largest_layer_bytes, on_each

NET = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
BATCH = torch.zeros(4, 64)
TWO = ["adamw", "galore-layerwise"]
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")


def tiny_config(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "config.json"
    shapes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    path.write_text(json.dumps({"model_type": "llama", "vocab_size": 100, **shapes, **changes}))
    return str(path)


def test_plain_arithmetic() -> None:
    found = plan(NET, rank=8, batch=BATCH, candidates=TWO)
    numel, biases = 2 * 64 * 256 + 256 + 64, 256 + 64
    adamw, layerwise = found.columns
    steps = 4 * len(list(NET.parameters()))  # AdamW counts them in a tensor for each parameter
    assert adamw.weights == adamw.gradients == 4 * numel
    assert adamw.moments == 8 * numel + steps
    assert adamw.bases == adamw.refresh_workspace == 0
    assert layerwise.gradients == 0
    assert layerwise.moments == 8 * (2 * 256 * 8 + biases) + steps
    assert layerwise.bases == 4 * 2 * 64 * 8
    assert layerwise.refresh_workspace > 4 * 64 * 8
    for column in found.columns:
        (peak,) = column.peaks
        assert peak.total == sum(peak.by_category.values()) > column.weights + column.moments + column.bases
    assert found.parameters == numel
    assert found.column("adamw") is adamw
    with pytest.raises(KeyError, match="lora"):
        found.column("lora")


def test_without_a_batch_only_what_is_held() -> None:
    (column,) = plan(NET, rank=8, candidates=["galore-step"]).columns
    assert column.moments > 0
    assert column.peaks == ()
    assert "without a batch" in column.missing


def test_a_module_on_the_meta_device_is_planned_like_a_real_one() -> None:
    with torch.device("meta"):
        bare = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    real, meta = (plan(net, rank=8, batch=BATCH, candidates=TWO).columns for net in (NET, bare))
    assert real == meta
    assert all(param.is_meta for param in bare.parameters())


def test_what_a_way_cannot_do_is_said_and_the_others_go_on() -> None:
    convolution = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 6, 2))
    found = plan(convolution, rank=8, batch=torch.zeros(2, 4, 8), candidates=TWO)
    assert found.columns[0].peaks
    assert "rank" in found.columns[1].missing
    assert found.columns[1].missing in str(found)


@pytest.mark.parametrize("settings", [{}, {"method": "tensor-galore"}, {"proj_type": "right"}], ids=str)
def test_convolutions(settings: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.Flatten())
    batch, low = torch.zeros(2, 16, 8, 8), ["galore-step", "galore-layerwise"]
    found = plan(
        net, rank=4, batch=batch, candidates=["adamw", *low], target_modules=["class:torch.nn.Conv2d"], **settings
    )
    assert [column.missing for column in found.columns] == ["", "", ""]
    for name in low:
        column = found.column(name)
        assert column.moments < found.column("adamw").moments / 2
        assert column.refresh_workspace > 4 * 4 * 16  # at least a basis
        assert column.peaks


def test_adapters_beside_convolutions_alone_are_said_to_be_none() -> None:
    net = nn.Sequential(nn.Conv2d(16, 32, 3))
    (column,) = plan(net, rank=4, candidates=["lora"], target_modules=["class:torch.nn.Conv2d"]).columns
    assert "none of the weights" in column.missing


def test_table_and_json() -> None:
    found = plan(NET, rank=8, batch=BATCH, candidates=TWO, budget="1MB")
    text = str(found)
    for expected in ("PEAK", "in kB (1e3)", "KiB (2^10 bytes)", "GaLore layerwise", "Fits into 0.00 GB"):
        assert expected in text
    again = json.loads(json.dumps(found.as_dict()))
    assert again["columns"][0]["peaks"][0]["total"] == found.columns[0].peaks[0].total
    assert again["budget"] == 10**6


# -- several devices ---------------------------------------------------------------------------------------------------


def test_ddp_adds_buckets() -> None:
    one, two = (plan(NET, rank=8, batch=BATCH, candidates=TWO, devices=count) for count in (1, 2))
    for name, extra in (("adamw", one.column("adamw").gradients), ("galore-layerwise", LOW_RANK_BUCKETS)):
        single, each = one.column(name).least, two.column(name).least
        assert single is not None
        assert each is not None
        assert each.total == single.total + extra
        assert two.column(name).weights == one.column(name).weights


def test_fsdp2_divides_and_gathers() -> None:
    net = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(64, 64) for _ in range(3)]), "head": nn.Linear(64, 2)})
    block = 4 * (64 * 64 + 64)
    assert largest_layer_bytes(net) == block
    held = {"weights": 800, "gradients": 80, "moments": 1600, "bases": 40, "activations": 100, "workspace": 8}
    each = on_each(held, Devices(count=8, strategy="fsdp2"), mode="step", gradients=80, largest_layer=block)  # type: ignore[arg-type]
    expected = {**held, "weights": 100, "gradients": 10, "moments": 200, "communication": block}
    assert each == expected
    sharded = Devices(count=8, strategy="fsdp2", bases_sharded=True)
    assert on_each(held, sharded, mode="step", gradients=80, largest_layer=block)["bases"] == 5  # type: ignore[arg-type]


def test_the_paper_sums_of_fsdp2() -> None:
    """docs/distributed.md: LLaMA-7B, rank 1024, bf16, 8 devices: 6.28 GiB of AdamW, 5.76 of GaLore with whole bases."""
    pytest.importorskip("transformers")
    devices = Devices(count=8, strategy="fsdp2")
    job = named_job("llama-7b", batch_size=1, sequence_length=8)
    from lightning_galore.planner.rehearsal import footprint_of

    for candidate, expected in ((CANDIDATES[0], 6.28), (CANDIDATES[2], 5.76)):
        held = footprint_of(job, candidate.recipe(GaLoreConfig(rank=1024)))
        categories = {
            "weights": held.weights,
            "gradients": held.gradients,
            "moments": held.moments,
            "bases": held.bases,
        }
        each = on_each(categories, devices, mode="step", gradients=0, largest_layer=0)  # type: ignore[arg-type]
        assert sum(each.values()) / 2**30 == pytest.approx(expected, abs=0.006)


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_budget_keeps_what_was_named_and_raises_the_batch(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    options: dict[str, Any] = {
        "sequence_length": 32,
        "candidates": ["adamw", "galore-layerwise"],
        "precision": "32-true",
    }
    name = tiny_config(tmp_path)
    open_, named = (plan(name, budget="6MB", **options, **extra) for extra in ({}, {"batch_size": 2, "rank": 4}))
    for fit in open_.fits:
        assert fit.total <= 6_000_000
        assert fit.batch_size is not None
        assert fit.batch_size > 1
        larger = plan(
            name, batch_size=2 * fit.batch_size, rank=fit.rank or 8, checkpointing=fit.checkpointing, **options
        )
        peak = larger.column(fit.name).least
        assert peak is not None
        assert peak.total > 6_000_000
    assert [fit.batch_size for fit in named.fits] == [2, 2]
    assert [fit.rank for fit in named.fits] == [None, 4]
    assert named.fits[0].trades == "nothing"


def test_budget_keeps_a_rank_that_is_the_default_or_the_candidates_own() -> None:
    wide = nn.Linear(1024, 1024, device="meta")
    default = GaLoreConfig().rank
    for config, rank in ((GaLoreConfig(rank=default), default), (GaLoreConfig(), 256)):
        found = plan(wide, config, batch=torch.zeros(4, 1024), candidates=["galore-step", "apollo-mini"], budget="60MB")
        assert [fit.rank for fit in found.fits] == [rank, 1]


def test_budget_lowers_the_rank_and_recomputes_when_it_must(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    name = tiny_config(tmp_path, hidden_size=128, intermediate_size=256)
    options: dict[str, Any] = {"sequence_length": 64, "candidates": ["galore-layerwise"], "precision": "32-true"}
    peaks = {
        (rank, peak.checkpointing): peak.total
        for rank in (32, 16, 8)
        for peak in plan(name, rank=rank, batch_size=1, **options).columns[0].peaks
    }
    for wanted in ((32, True), (16, True)):
        limit = peaks[wanted]
        (fit,) = plan(name, budget=limit, batch_size=1, **options).fits
        assert (fit.rank, fit.checkpointing, fit.total) == (*wanted, limit)
        assert "recomputed" in fit.trades
    assert "rank 16 instead of 32" in fit.trades
    nothing = plan(name, budget=min(peaks.values()) // 2, batch_size=1, **options)
    assert nothing.fits == ()
    assert "Nothing of this fits" in str(nothing)


def test_free_ranks_begin_at_a_quarter() -> None:
    pytest.importorskip("transformers")
    assert free_ranks(named_job("llama-60m", batch_size=1, sequence_length=8)) == [128, 64, 32, 16, 8]


@pytest.mark.parametrize(("text", "size"), [("24GB", 24e9), ("24 GiB", 24 * 2**30), ("1.5MB", 1.5e6), (7, 7), ("7", 7)])
def test_bytes_of(text: Any, size: float) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["24G", "much", "-1GB", "0GB", 0, True])
def test_bytes_of_refuses(text: Any) -> None:
    with pytest.raises(ValueError, match=r"budget=.*24GB \(24 \* 10\^9\)"):
        bytes_of(text)


# -- models by name ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"), [("llama-60m", 58), ("llama-1b", 1339), ("llama-7b", 6738), ("roberta-base", 125)]
)
def test_built_in_shapes(name: str, millions: int) -> None:
    pytest.importorskip("transformers")
    module = named_job(name, batch_size=1, sequence_length=8).module
    assert math.floor(sum(param.numel() for param in module.parameters()) / 1e6) == millions or name == "roberta-base"
    assert all(param.is_meta for param in module.parameters())
    assert name in BUILT_IN


def test_a_config_alone_is_enough_and_its_code_is_not_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = tiny_config(tmp_path)
    for name in (path, str(tmp_path)):  # the file, and the folder that holds it
        job = named_job(name, batch_size=2, sequence_length=16)
        assert type(job.module).__name__ == "LlamaForCausalLM"
        assert job.batch["input_ids"].shape == (2, 16)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    tiny_config(tmp_path, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    with pytest.raises(ValueError, match="code that comes with a model is never run"):
        named_job(str(tmp_path), batch_size=1, sequence_length=8)
    assert not (tmp_path / "ran").exists()


def test_a_model_type(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    config, head = sources.hugging_face_config("gpt2", n_layer=1)
    assert (config.n_layer, head) == (1, "causal-lm")
    assert sources.hugging_face_config("bert")[1] == "sequence-classification"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": ["adam"]}, "candidates='adam' is not known; choose among adamw, "),
        ({"precision": "8-true"}, "precision='8-true' is not known"),
        ({"devices": 0}, "devices=0 must be at least 1"),
        ({"strategy": "zero"}, "strategy='zero' is not known to the planner"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"budget": "x"}, "budget='x'"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        plan(NET, batch=BATCH, **options)


def test_refused_names() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(
        ValueError, match="model='no/such' cannot be planned.* is not asked without --download true.*llama-7b"
    ):
        plan("no/such")
    with pytest.raises(
        ValueError, match=r"^model='llama-60' cannot be planned\. Did you mean 'llama-60m'\? There is no"
    ):
        plan("llama-60")
    with pytest.raises(ValueError, match="sequence_length=4096 is more than llama-60m takes; 2048"):
        plan("llama-60m", sequence_length=4096)


@pytest.mark.parametrize("name", ["./config.json", "some/deep/folder", "model.json", "run/"])
def test_a_path_that_is_not_there_is_said_to_be_none(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^source='{name}': there is no such file"):
        plan(name, download=True)
    (tmp_path / "configs.json").touch()
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'configs\.json'\?"):
        plan("./config.json")


def test_a_step_without_a_loss_is_said() -> None:
    (column,) = plan(NET, batch=BATCH, step=lambda module, batch: None, candidates=["adamw"]).columns  # type: ignore[arg-type,return-value]
    assert column.peaks == () or column.missing
