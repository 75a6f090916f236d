# SPDX-License-Identifier: Apache-2.0
"""Which weights are projected, and what the table says of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_galore import GaLoreConfig, GaLoreOptimizer, storage
from lightning_galore.target_table import TargetTable
from lightning_galore.targets import NoTargetsError, clean_name, select_targets
from tests.helpers import Matrices, TinyTransformer, train

EMBEDDING = "embedding, or tied to one (taken where a pattern names only embeddings)"
LINEAR = {f"blocks.0.{name}.weight" for name in ("query", "key", "value", "output", "up", "down")}


class Zoo(nn.Module):
    """One of each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.body = nn.Linear(8, 12)
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.LayerNorm(12)
        self.free = nn.Parameter(torch.zeros(6, 6))
        self.waves = nn.Parameter(torch.zeros(6, 6, dtype=torch.complex64))
        self.scalar = nn.Parameter(torch.zeros(()))
        self.narrow = nn.Linear(12, 2)
        self.classifier = nn.Linear(12, 20)


def select(model: nn.Module, **settings: Any) -> TargetTable:
    config = GaLoreConfig(**{"rank": 2, **settings})
    return select_targets(model, [{"params": list(model.parameters())}], config)[1]


def taken(model: nn.Module, **settings: Any) -> set[str]:
    return {row.name for row in select(model, **settings).taken}


def reasons(table: TargetTable) -> dict[str, str]:
    return {row.name: row.reason for row in table.rows if not row.target}


def test_all_linear_takes_every_linear_but_the_head() -> None:
    assert taken(TinyTransformer()) == LINEAR
    table = select(TinyTransformer())
    assert reasons(table)["lm_head.weight"] == "output head (all-linear leaves it out)"
    assert reasons(table)["embedding.weight"] == "not in target_modules"
    assert reasons(table)["norm.weight"] == "order 1: only matrices are projected"


def test_every_kind_of_parameter_has_its_reason() -> None:
    table = select(Zoo(), target_modules=".*")
    assert {row.name for row in table.taken} == {"body.weight", "conv.weight", "free", "classifier.weight"}
    expected = {
        "embed.weight": EMBEDDING,
        "body.bias": "order 1: only matrices are projected",
        "conv.bias": "order 1: only matrices are projected",
        "norm.weight": "order 1: only matrices are projected",
        "norm.bias": "order 1: only matrices are projected",
        "waves": "torch.complex64 is not a real floating-point type",
        "scalar": "order 0: only matrices are projected",
        "narrow.weight": "min(m, n) = 2 <= rank = 2: nothing would be saved",
        "narrow.bias": "order 1: only matrices are projected",
        "classifier.bias": "order 1: only matrices are projected",
    }
    assert reasons(table) == expected


@pytest.mark.parametrize("head", ["score", "qa_outputs", "lm_head", "heads"])
def test_heads_are_known_by_whole_parts_of_their_name(head: str) -> None:
    model = nn.Module()
    model.add_module(head, nn.Linear(8, 8))
    model.add_module(f"{head}_like", nn.Linear(8, 8))
    assert taken(model) == {f"{head}_like.weight"}
    assert taken(model, target_modules=".*") == {f"{head}_like.weight", f"{head}.weight"}


def test_head_that_the_model_declares_is_left_out() -> None:
    class Declares(Matrices):
        def get_output_embeddings(self) -> nn.Module:
            return self.layers[1]

    class Refuses(Matrices):
        def get_output_embeddings(self) -> nn.Module:
            raise NotImplementedError

    assert taken(Declares((8, 8), (8, 8))) == {"layers.0.weight"}
    assert taken(Refuses((8, 8), (8, 8))) == {"layers.0.weight", "layers.1.weight"}


def test_weight_tied_to_an_embedding_is_left_out_and_other_tied_weights_count_once() -> None:
    model = TinyTransformer()
    model.lm_head.weight = model.embedding.weight
    model.blocks[0].query.weight = model.blocks[0].key.weight  # type: ignore[union-attr]
    table = select(model, target_modules=".*")
    assert reasons(table)["embedding.weight"] == EMBEDDING
    assert [row.name for row in table.rows].count("lm_head.weight") == 0
    assert {row.name for row in table.taken} == LINEAR - {"blocks.0.key.weight"}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (r"blocks\.\d+\.(up|down)", {"up", "down"}),
        (["up", "down"], {"up", "down"}),
        ([r".*\.u."], {"up"}),
        (["que", r"blocks\.0\.down"], {"query", "down"}),
        (nn.Linear, {"query", "key", "value", "output", "up", "down"}),
        ([nn.Linear], {"query", "key", "value", "output", "up", "down"}),
        ("class:torch.nn.Linear", {"query", "key", "value", "output", "up", "down"}),
        (["class:torch.nn.modules.linear:Linear"], {"query", "key", "value", "output", "up", "down"}),
        (["class:torch.nn.Module"], {"query", "key", "value", "output", "up", "down"}),
    ],
)
def test_patterns(patterns: Any, expected: set[str]) -> None:
    names = taken(TinyTransformer(), target_modules=patterns, ignore_modules=["lm_head"])
    assert names == {f"blocks.0.{name}.weight" for name in expected}


def test_one_string_must_match_the_whole_name() -> None:
    with pytest.raises(NoTargetsError):
        select(TinyTransformer(), target_modules="up")


def test_explicit_pattern_may_take_the_head() -> None:
    assert "lm_head.weight" in taken(TinyTransformer(), target_modules=[nn.Linear])


@pytest.mark.parametrize("patterns", [["query", r".*\.down"], "query", [r"blocks\.0\.(query|down)"], nn.Linear])
def test_ignored_modules_are_left_out(patterns: Any) -> None:
    settings = {"target_modules": [r"class:torch.nn.Linear", "embedding"]}
    try:
        names = taken(TinyTransformer(), ignore_modules=patterns, **settings)
    except NoTargetsError as error:
        assert patterns is nn.Linear
        assert "(ignore_modules)" in str(error)  # noqa: PT017
        return
    assert "blocks.0.query.weight" not in names
    assert ("blocks.0.down.weight" in names) == (patterns == "query")
    table = select(TinyTransformer(), ignore_modules=patterns, **settings)
    assert reasons(table)["blocks.0.query.weight"] == "ignore_modules"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"target_modules": "att(n"}, r"target_modules='att\(n' is not a valid regular expression"),
        ({"ignore_modules": ["a[b"]}, r"ignore_modules='a\[b' is not a valid regular expression"),
        ({"target_modules": "class:torch.nn.Liner"}, r"target_modules='class:torch\.nn\.Liner': there is no class"),
        (
            {"ignore_modules": ["class:nowhere.At"]},
            r"ignore_modules='class:nowhere\.At': there is no class .*import path",
        ),
        ({"target_modules": "class:torch.float32"}, r"='class:torch\.float32': 'torch\.float32' is no class"),
    ],
)
def test_bad_pattern_is_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(TinyTransformer(), **setting)


def test_nothing_selected_names_what_there_is() -> None:
    with pytest.raises(NoTargetsError) as caught:
        select(TinyTransformer(), target_modules=["attention", "norm"], rank=16)
    text = str(caught.value)
    assert "target_modules=('attention', 'norm') with rank=16 and ignore_modules=() leaves no weight to project" in text
    assert "Matched but not projected: blocks.0.attention_norm.weight (order 1: only matrices are projected)" in text
    assert "Linear modules here: blocks.0.query, blocks.0.value, blocks.0.output, blocks.0.key" in text
    assert text.endswith("Name modules that hold matrices larger than the rank, or lower the rank.")


def test_model_without_linear_layers_says_so() -> None:
    with pytest.raises(NoTargetsError, match=r"There is no nn\.Linear here"):
        select(nn.Conv1d(2, 2, 2))


def test_a_root_that_is_linear_is_named() -> None:
    with pytest.raises(NoTargetsError, match=r"Linear modules here: the model itself\."):
        select(nn.Linear(8, 8), target_modules="nothing")


def test_rank_that_is_too_large_for_every_weight_is_said_first() -> None:
    with pytest.raises(NoTargetsError) as caught:
        select(TinyTransformer(), rank=1000)
    text = str(caught.value)
    assert text.startswith("rank=1000 is too large: the widest it may be here is 15 (min(m, n) - 1 of blocks.0.")
    assert text.endswith(
        "leaves no weight to project among 20 parameters: at min(m, n) and above nothing would be saved."
    )
    assert "bias" not in text
    assert taken(TinyTransformer(), rank=15)  # the remedy is one
    with pytest.raises(NoTargetsError, match=r"^rank=9 is too large: the widest it may be here is 7 .* of weight\)"):
        select(nn.Linear(8, 8), rank=9)
    # No rank would help a single row.
    with pytest.raises(
        NoTargetsError, match=r"Matched but not projected: weight \(min\(m, n\) = 1 <= rank = 1: [^;]*\. L"
    ):
        select(nn.Linear(8, 1), rank=1)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("_orig_mod.blocks.0.up", "blocks.0.up"),
        ("blocks._orig_mod.0.up", "blocks.0.up"),
        ("head._orig_mod", "head"),
        ("_orig_mod", ""),
        ("my_orig_mod.up", "my_orig_mod.up"),
    ],
)
def test_what_torch_compile_adds_to_a_name_is_removed(name: str, clean: str) -> None:
    assert clean_name(name) == clean


def test_compiled_modules_keep_their_names() -> None:
    plain = taken(TinyTransformer())
    assert taken(torch.compile(TinyTransformer())) == plain  # type: ignore[arg-type]
    inside = TinyTransformer()
    inside.blocks[0].up = torch.compile(inside.blocks[0].up)  # type: ignore[assignment,arg-type]
    inside.lm_head = torch.compile(inside.lm_head)  # type: ignore[assignment]
    assert taken(inside) == plain
    assert taken(inside, target_modules=r"blocks\.0\.up") == {"blocks.0.up.weight"}


def test_groups_override_rank_side_gap_and_scale() -> None:
    model = Matrices((8, 6), (8, 6), (8, 6), (8, 6))
    a, b, c, d = model.parameters()
    groups = [
        {"params": [a]},
        {"params": [b], "rank": 5, "proj_type": "left"},
        {"params": [c], "rank": None},
        {"params": [d], "proj_type": "full"},
    ]
    targets, table = select_targets(model, groups, GaLoreConfig(rank=2))
    found = {
        row.name: (target.projection.rank, target.projection.side) for row in table.taken if (target := row.target)
    }
    assert found == {"layers.0.weight": (2, "right"), "layers.1.weight": (5, "left"), "layers.3.weight": (2, "full")}
    assert reasons(table) == {"layers.2.weight": "rank=None in its param group"}
    assert set(targets) == {a, b, d}


def test_group_with_a_rank_selects_whatever_the_patterns_say() -> None:
    model = TinyTransformer()
    groups = [{"params": [model.embedding.weight, model.lm_head.weight, model.lm_head.bias], "rank": 16}]
    targets, table = select_targets(model, groups, GaLoreConfig(target_modules=["nothing"]))
    assert set(targets) == {model.embedding.weight, model.lm_head.weight}
    assert reasons(table)["lm_head.bias"] == "order 1: only matrices are projected"
    assert reasons(table)["blocks.0.up.weight"] == "not in this optimizer"
    groups[0]["rank"] = 17
    with pytest.raises(
        NoTargetsError, match=r"^rank=17 is too large: the widest it may be here is 16 \(min\(m, n\) of"
    ):
        select_targets(model, groups, GaLoreConfig())


def test_table_is_readable() -> None:
    model = Zoo()
    optimizer = GaLoreOptimizer(torch.optim.AdamW(model.parameters()), model, rank=2)
    lines = str(optimizer.targets_table()).splitlines()
    assert lines[0].split() == ["parameter", "shape", "side", "rank", "state", "bytes", "why", "not"]
    (row,) = (line for line in lines if line.startswith("body.weight"))
    # Moments 2 x 12 x 2 and a step in fp32, a basis 8 x 2.
    assert row.split() == ["body.weight", "12x8", "right", "2", str(4 * (2 * 24 + 1 + 16))]
    assert any(
        line.startswith("conv.weight") and "4x2x3x3" in line and line.endswith("not in target_modules")
        for line in lines
    )
    assert "scalar" in next(line for line in lines if line.startswith("scalar")).split()[1]
    assert lines[-1].startswith("1 of 14 parameters are projected, 96 of ")
    assert lines[-1].endswith("low-rank state 0.3 KiB.")


@pytest.mark.parametrize("storage_name", ["param", "bf16"])
@pytest.mark.parametrize("proj_type", ["std", "full"])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "Adafactor", "RMSprop"])
def test_planned_bytes_are_those_held(name: str, proj_type: Any, storage_name: Any) -> None:
    model = TinyTransformer()
    settings = {"momentum": 0.9} if name == "SGD" else {}
    base = getattr(torch.optim, name)(model.parameters(), lr=0.01, **settings)
    optimizer = GaLoreOptimizer(base, model, rank=4, proj_type=proj_type, basis_storage=storage_name)
    planned = {row.name: row.state_bytes for row in optimizer.targets_table().taken}
    train(model, optimizer, range(1))
    held = {target.name: storage.nbytes(optimizer.state[weight]) for weight, target in optimizer.targets.items()}
    assert planned == held
    assert {row.name: row.state_bytes for row in optimizer.targets_table().taken} == held


def test_asking_for_bytes_leaves_the_optimizer_alone() -> None:
    model = TinyTransformer()
    base = torch.optim.AdamW(model.parameters())
    calls: list[str] = []
    base.register_step_pre_hook(lambda *args: calls.append("pre"))
    scheduler = torch.optim.lr_scheduler.ConstantLR(base)
    optimizer = GaLoreOptimizer(base, model, rank=4)
    optimizer.targets_table()
    assert not calls
    assert not optimizer.state
    assert not hasattr(base, "_opt_called") or not base._opt_called
    assert scheduler.last_epoch == 0


def test_a_frozen_backbone_may_come_later() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    model[0].requires_grad_(False)
    optimizer = GaLoreOptimizer(torch.optim.AdamW(model[1].parameters()), model, rank=2)
    assert not optimizer.targets
    reasons = {row.name: row.reason for row in optimizer.targets_table().rows}
    assert reasons["0.weight"] == "not in this optimizer (frozen; projected once it is added)"
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    model(torch.ones(3, 8)).sum().backward()
    optimizer.step()
    assert [target.name for target in optimizer.targets.values()] == ["0.weight"]
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (8, 2)


def test_a_parametrized_weight_says_so() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    optimizer = GaLoreOptimizer(torch.optim.AdamW(model.parameters()), model, rank=2)
    (row,) = (row for row in optimizer.targets_table().rows if row.name.endswith("original1"))
    assert row.reason == "parametrized: the weight is computed from it"
