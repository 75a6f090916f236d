# SPDX-License-Identifier: Apache-2.0
"""``basis_storage="seed"``: a number in place of a random basis."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_galore import GaLoreOptimizer, bases
from lightning_galore.bases import DRAWN_BYTES, UNIT, DrawnBases, source_of
from lightning_galore.sharding import Sharding
from lightning_galore.shards import Shards
from lightning_galore.state_keys import BASIS, SOURCE
from lightning_galore.subspace import SUBSPACES, Projection, seeded_generator
from tests.helpers import Matrices, TinyTransformer, assert_orthonormal, same_bits, train

SUBSPACES_DRAWN: list[Any] = ["gaussian", "random_orthonormal"]
SIDES: list[Any] = ["left", "right", "full"]
CPU = torch.device("cpu")


def start(subspace: str = "gaussian", *, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    model = TinyTransformer(dtype=dtype)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    settings = {"rank": 4, "update_proj_gap": 3, "scale": 1.0, "basis_storage": "seed", **settings}
    return model, GaLoreOptimizer(base, model, subspace=subspace, **settings)


def drawn(number: int, *shapes: tuple[int, int], orthonormal: bool = False) -> DrawnBases:
    return DrawnBases(number=number, shapes=shapes, device=CPU, orthonormal=orthonormal)


@pytest.mark.parametrize("subspace", SUBSPACES_DRAWN)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_read_is_what_was_found(subspace: str, side: Any, dtype: torch.dtype) -> None:
    projection = Projection(shape=(20, 12), side=side, rank=5)
    generator = seeded_generator(CPU, seed=3, name="w", draw=2)
    found = SUBSPACES[subspace]().find(torch.ones(20, 12, dtype=dtype), projection, generator=generator)
    assert found is not None
    kept = drawn(generator.initial_seed(), *projection.basis_shapes, orthonormal=subspace != "gaussian")
    assert same_bits(kept.read(dtype), [basis.to(dtype) for basis in found.bases])
    assert same_bits(kept.read(dtype), kept.read(dtype))
    assert (kept.rank, kept.nbytes, kept.is_coded, kept.parts) == (5, DRAWN_BYTES, True, ())
    if subspace != "gaussian":
        assert_orthonormal(kept.read(torch.float64)[0])


def test_stand_ins_are_unit_vectors() -> None:
    left, right = drawn(UNIT, (6, 2), (4, 2)).read(torch.bfloat16)
    assert torch.equal(left, torch.eye(6, 2, dtype=torch.bfloat16))
    assert torch.equal(right, torch.eye(4, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize("mode", ["step", "project", "layerwise"])
@pytest.mark.parametrize("side", ["std", "full"])
@pytest.mark.parametrize("subspace", SUBSPACES_DRAWN)
def test_training_is_that_with_the_basis_kept(subspace: str, side: str, mode: str) -> None:
    """Staggered too, where weights begin with unit vectors."""
    runs, numbers = [], set()
    for kept in ("seed", "fp32"):
        model, optimizer = start(subspace, basis_storage=kept, mode=mode, proj_type=side, stagger=True)
        train(model, optimizer, range(1))
        numbers.update(state[BASIS] for state in optimizer.state.values() if isinstance(state.get(BASIS), int))
        train(model, optimizer, range(1, 10))
        runs.append(list(model.parameters()))
        for weight in model.matrices():
            assert isinstance(optimizer.state[weight][BASIS], int if kept == "seed" else Tensor)
    assert same_bits(*runs)
    assert UNIT in numbers
    assert len(numbers) > 1


def test_a_step_keeps_no_basis_and_holds_those_of_one_weight_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """AP-2."""
    model, optimizer = start(stagger=False, mode="step")
    train(model, optimizer, range(1))
    alive: list[int] = []
    held: list[Any] = []
    draw = bases.draw

    def counted(*args: Any, **kwargs: Any) -> Any:
        import gc
        import weakref

        gc.collect()
        alive.append(sum(one() is not None for one in held))
        made = draw(*args, **kwargs)
        held.extend(weakref.ref(one) for one in made)
        return made

    monkeypatch.setattr(bases, "draw", counted)
    train(model, optimizer, range(1, 3))
    assert len(alive) >= 2 * 2 * len(model.matrices())  # to project and to project back
    assert max(alive) <= 1
    state = optimizer.state[model.matrices()[0]]
    assert {key for key, value in state.items() if isinstance(value, Tensor)} == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("subspace", SUBSPACES_DRAWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["std", "full"])
@pytest.mark.parametrize("mode", ["step", "project", "layerwise"])
def test_resumed_run_equals_the_unbroken_one(
    subspace: str, dtype: torch.dtype, mode: str, side: str, tmp_path: Path
) -> None:
    settings = {"dtype": dtype, "mode": mode, "proj_type": side}
    whole, optimizer = start(subspace, **settings)
    train(whole, optimizer, range(10))
    first, optimizer = start(subspace, **settings)
    train(first, optimizer, range(4))
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    second, resumed = start(subspace, **settings)
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, range(4, 10))
    assert same_bits(second.parameters(), whole.parameters())


def test_a_state_of_another_rank_or_side_is_refused() -> None:
    model, optimizer = start()
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"has rank=4, side=right and bases \(\(16, 4\),\); this run has rank=3"):
        start(rank=3)[1].load_state_dict(saved)
    with pytest.raises(ValueError, match=r"has rank=4, side=right .* this run has rank=4, side=left"):
        start(proj_type="left")[1].load_state_dict(saved)


@pytest.mark.parametrize("now", ["seed", "param", "svd"])
def test_another_setting_takes_a_run_over(now: str) -> None:
    """The state says itself how its bases are kept, until the next refresh keeps them in the new way."""
    model, optimizer = start(moments="keep")
    train(model, optimizer, range(4))
    settings = {"seed": {}, "param": {"basis_storage": "param"}, "svd": {"basis_storage": "param", "moments": "keep"}}
    other, resumed = start("svd" if now == "svd" else "gaussian", **settings[now])
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(other, resumed, range(4, 5))
    state = resumed.state[other.matrices()[0]]
    # A number means orthonormal bases to another subspace: not these, so there is a refresh at once.
    assert isinstance(state[BASIS], Tensor if now == "svd" else int)
    train(other, resumed, range(5, 8))
    state = resumed.state[other.matrices()[0]]
    assert isinstance(state[BASIS], int) == (SOURCE in state) == (now == "seed")
    if now == "param":
        train(model, optimizer, range(4, 8))
        assert same_bits(other.parameters(), model.parameters())


# -- AP-3: another kind of device draws other numbers ------------------------------------------------------------------


def test_sources_tell_kinds_of_devices_and_of_bases_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert source_of(CPU, orthonormal=False) == source_of(torch.device("cpu", 0), orthonormal=False)

    class Properties:
        multi_processor_count, max_threads_per_multi_processor = 132, 2048

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    found = [source_of(CPU, orthonormal=False), source_of(CPU, orthonormal=True)]
    found.append(source_of(torch.device("cuda", 6), orthonormal=False))
    Properties.multi_processor_count = 40
    found.append(source_of(torch.device("cuda", 7), orthonormal=False))
    source_of.cache_clear()
    assert len(set(found)) == 4
    assert all(0 <= source < 2**32 for source in found)


@pytest.mark.parametrize("mode", ["step", "project", "layerwise"])
def test_a_number_of_another_device_is_replaced_before_it_is_used(mode: str) -> None:
    model, optimizer = start(mode=mode, update_proj_gap=100, stagger=False)
    train(model, optimizer, range(3))
    weight = model.matrices()[0]
    state = optimizer.state[weight]
    number, others = state[BASIS], [optimizer.state[one][BASIS] for one in model.matrices()[1:]]
    state[SOURCE] += 1
    train(model, optimizer, range(3, 4))
    state = optimizer.state[weight]
    assert state[BASIS] != number
    assert (state["galore_refreshes"], state["galore_refreshed_at"]) == (2, 3)
    assert state[SOURCE] == source_of(CPU, orthonormal=False)
    assert [optimizer.state[one][BASIS] for one in model.matrices()[1:]] == others
    train(model, optimizer, range(4, 6))
    assert optimizer.state[weight]["galore_refreshes"] == 2


class Members:
    """A team of two, of which the other one's numbers differ or not."""

    def __init__(self, *, differ: bool) -> None:
        self.rank, self.size, self.sent, self._differ = 0, 2, 0, differ

    def differing(self, tensors: dict[str, Tensor]) -> list[str]:
        assert [int(one) for one in tensors.values()] == [source_of(CPU, orthonormal=False)]
        return list(tensors) if self._differ else []


def test_processes_on_different_devices_are_refused() -> None:
    _, optimizer = start()
    optimizer._projector.join(Members(differ=False))
    with pytest.raises(ValueError, match=r"basis_storage='seed' on processes with different kinds of devices"):
        optimizer._projector.join(Members(differ=True))
    _, optimizer = start("random_orthonormal")
    with pytest.raises(ValueError, match=r"subspace='random_orthonormal' on 2 processes: each would make its bases"):
        optimizer._projector.join(Members(differ=False))
    start("random_orthonormal", basis_storage="param")[1]._projector.join(Members(differ=True))


def test_every_part_of_a_divided_weight_keeps_the_number() -> None:
    sharding = Sharding(Shards(mesh=None, axis=None), (12, 8), 0)  # type: ignore[arg-type]
    kept = drawn(5, (8, 2))
    assert sharding.at_rest(kept, "right", divide=True) is kept
    assert not sharding.gathers(kept, "right")


def test_param_groups_and_ranks_of_their_own() -> None:
    model = Matrices((12, 8), (8, 12))
    first, second = model.parameters()
    groups = [{"params": [first], "rank": 2}, {"params": [second], "rank": 8}]
    optimizer = GaLoreOptimizer(torch.optim.AdamW(groups), model, subspace="gaussian", basis_storage="seed", rank=3)
    for step in range(3):
        model.give_gradients(step)
        optimizer.step()
    assert [optimizer.state[one]["galore_rank"] for one in (first, second)] == [2, 8]
    assert [optimizer.state[one]["exp_avg"].shape for one in (first, second)] == [(12, 2), (8, 12)]
