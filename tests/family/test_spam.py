# SPDX-License-Identifier: Apache-2.0
"""SPAM and Stable-SPAM: beside the plain formulas, resumed, composed, and where the peers' versions fail."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_galore import GaLoreOptimizer
from lightning_galore.config import GaLoreConfig
from lightning_galore.lift import LIFTS, Lift
from lightning_galore.memory import held_bytes
from lightning_galore.state_keys import BASIS, transform_entries
from lightning_galore.transforms import TRANSFORMS, Restarts, check_transform
from lightning_galore.transforms.restarts import SEEN, STEPS
from lightning_galore.transforms.spam import Spam
from lightning_galore.transforms.stable_spam import StableSpam
from tests.helpers import TinyTransformer, train
from tests.reference import spam_reference as reference

from .loops import RANKS, SHAPES, assert_resume_is_exact, assert_same_state, copied, gradient, make, run

KINDS = ["spam", "stable-spam"]
MODES: list[Any] = ["step", "project", "layerwise"]
#: Short gaps, so that 30 steps hold refreshes and resets; a threshold that clips.
SETTINGS: dict[str, Any] = {
    "update_proj_gap": 8,
    "scale": 0.5,
    "spam_theta": 300.0,
    "reset_gap": 10,
    "reset_warmup": 4,
    "subspace": "svd",
    "moments": "keep",
    "stagger": False,
    "fix_signs": False,  # moments are kept, so the signs must be the reference's
}


def settings_of(kind: str, **more: Any) -> dict[str, Any]:
    return {"method": kind, "rank": 3, **SETTINGS, **more}


def references(kind: str, params: list[nn.Parameter], rank: int, *, decay: float = 0.0) -> list[reference.Spam]:
    return [
        reference.Spam(
            lr=1e-2,
            rank=rank if param.ndim == 2 else None,
            gap=8,
            scale=0.5,
            theta=300.0,
            stabilizer=reference.Stabilizer() if kind == "stable-spam" else None,
            reset_gap=10,
            reset_warmup=4,
            decay=decay,
        )
        for param in params
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_thirty_steps_are_those_of_the_formulas(kind: str, rank: int, shape: tuple[int, int], mode: Any) -> None:
    decay = 0.1
    model, optimizer = make(
        settings_of(kind, rank=rank, mode=mode),
        [shape],
        base=lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=decay),
    )
    params = list(model.parameters())
    expected, rules = copied(params), references(kind, params, rank, decay=decay)
    for step in range(30):
        run(optimizer, params, [step])
        for rule, weight in zip(rules, expected, strict=True):
            rule.apply_(weight, gradient(step, weight.shape, spikes=True))
        for param, weight in zip(params, expected, strict=True):
            torch.testing.assert_close(param.detach(), weight, rtol=0, atol=1e-6)
    assert [optimizer.state[param]["galore_refreshes"] for param in optimizer.targets] == [4]


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_something_to_the_gradient_itself(kind: str) -> None:
    """A mask that is indexed and then changed in place changes a copy (PO-5)."""
    transform = Spam(100.0) if kind == "spam" else StableSpam()
    grad = torch.ones(4, 3)
    entries = transform.apply_(grad, {}, second=None)
    grad = torch.ones(4, 3)
    grad[1, 2] = -1e6
    transform.apply_(grad, entries, second=torch.ones(4, 3))
    if kind == "spam":
        expected = torch.ones(4, 3)
        expected[1, 2] = -10.0
        torch.testing.assert_close(grad, expected)
    else:
        assert float(torch.linalg.vector_norm(grad)) < 1.0
        assert float(grad[1, 2]) < 0


def test_entries_without_a_history_are_not_clipped_to_zero() -> None:
    """The row of a token that comes for the first time: ``theta v`` is zero there."""
    embedding = nn.Embedding(6, 4)
    model = nn.Sequential(embedding, nn.Linear(4, 8, bias=False))
    optimizer = GaLoreOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), model, method="spam", rank=2
    )
    before = embedding.weight.detach().clone()
    for token in (0, 0, 5):
        optimizer.zero_grad()
        model(torch.tensor([token])).sum().backward()
        optimizer.step()
    moved = (embedding.weight.detach() != before).any(1)
    assert moved.tolist() == [True, False, False, False, False, True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", [7, 10, 11])
def test_a_resumed_run_ends_with_the_same_bits(kind: str, mode: Any, stop: int) -> None:
    """Before, at and after a reset: its step counter is saved (SS-2)."""
    assert_resume_is_exact(settings_of(kind, mode=mode), stop=stop)
    assert_resume_is_exact(settings_of(kind, mode=mode), stop=stop, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_state_holds_tensors_and_numbers_of_the_predicted_bytes(kind: str) -> None:
    model, optimizer = make(settings_of(kind), dtype=torch.float32)
    predicted, of_each = optimizer.footprint(), held_bytes(optimizer.base, optimizer.targets, optimizer.config)
    assert predicted.transforms == (3 * 16 if kind == "stable-spam" else 0)
    run(optimizer, list(model.parameters()), range(3))
    entries = [transform_entries(state) for state in optimizer.state.values()]
    assert sum(value.nbytes for one in entries for value in one.values()) == predicted.transforms
    assert optimizer.footprint() == predicted
    assert held_bytes(optimizer.base, optimizer.targets, optimizer.config) == of_each
    held = {
        p: sum(v.nbytes for v in s.values() if torch.is_tensor(v) and v.ndim + v.numel() > 0)
        for p, s in optimizer.state.items()
    }
    steps = 4  # AdamW's counter
    for param, target in optimizer.targets.items():
        assert held[param] - of_each[target] in (0, steps)


# -- momentum reset ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_reset_begins_with_fresh_moments_in_the_same_step(mode: Any) -> None:
    """The update of that step knows nothing of the old moments (SS-1): it equals the first one of a fresh optimizer."""
    settings = {"rank": 3, "transform": "none", "reset_gap": 5, "update_proj_gap": 50, "stagger": False, "mode": mode}
    model, optimizer = make(settings)
    params = list(model.parameters())
    run(optimizer, params, range(5))
    before = copied(params)
    run(optimizer, params, [5])
    counts = [float(optimizer.state[param]["step"]) for param in params]
    assert counts == [1.0] * len(params)
    for param, old in zip(params, before, strict=True):
        # Adam's first step is lr * sign(g), whatever came before.
        moved = param.detach() - old
        if param in optimizer.targets:
            projection = optimizer.targets[param].projection
            low = projection.project(gradient(5, param.shape, spikes=True), (optimizer.state[param][BASIS],))
            expected = torch.zeros_like(moved)
            projection.add_back_(expected, -1e-2 * low.sign(), (optimizer.state[param][BASIS],), alpha=0.25)
        else:
            expected = -1e-2 * gradient(5, param.shape, spikes=True).sign()
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-9)


def test_all_are_reset_at_the_same_step_and_who_misses_it_at_the_next_one() -> None:
    model, optimizer = make({"rank": 3, "reset_gap": 4, "update_proj_gap": 50}, bias=True)
    params = list(model.parameters())
    first, *others = params
    for step in range(7):
        optimizer.zero_grad()
        for param in params if step not in (0, 4, 5) else others:
            param.grad = gradient(step, param.shape)
        optimizer.step()
        counts = [float(optimizer.state[param]["step"]) if param in optimizer.state else 0 for param in params]
        others_count = step % 4 + 1
        assert counts[1:] == [others_count] * len(others)
        assert counts[0] == [0, 1, 2, 3, 3, 3, 1][step]
    assert optimizer.param_groups[0][STEPS] == 7
    assert {optimizer.state[param][SEEN] for param in params} == {1}


def test_a_group_that_comes_later_takes_part() -> None:
    model, optimizer = make({"rank": 3, "reset_gap": 4}, bias=False)
    run(optimizer, list(model.parameters()), range(3))
    late = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [late]})
    params = [*model.parameters(), late]
    run(optimizer, params, [3])
    assert [group[STEPS] for group in optimizer.param_groups] == [4, 4]
    run(optimizer, params, [4])
    assert [float(optimizer.state[param]["step"]) for param in params] == [1.0] * 3


def test_learning_rate_rises_along_a_cosine_and_stays_the_users() -> None:
    groups = [{"params": [], "lr": 0.5}, {"params": [], "lr": torch.tensor(2.0)}]
    restarts = Restarts(gap=6, warmup=4)
    factors = []
    for _ in range(8):
        with restarts.warmed(groups):
            factors.append(groups[0]["lr"] / 0.5)
            assert float(groups[1]["lr"]) == pytest.approx(2 * factors[-1])
        assert groups[0]["lr"] == 0.5
        assert groups[1]["lr"] == torch.tensor(2.0)
        restarts.count(groups)
    rising = [(1 - math.cos(math.pi * place / 4)) / 2 for place in (1, 2, 3, 4)]
    assert factors == pytest.approx([*rising, 1.0, 1.0, *rising[:2]])
    with pytest.raises(KeyError), Restarts(6, 4).warmed(groups):
        raise KeyError
    assert groups[0]["lr"] == 0.5


def test_scheduler_and_warm_up_share_the_learning_rate() -> None:
    model, optimizer = make({"rank": 3, "reset_gap": 4, "reset_warmup": 2})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for step in range(3):
        run(optimizer, list(model.parameters()), [step])
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 1e-2 * 0.5**3


def test_nothing_has_happened_where_the_optimizer_raises() -> None:
    class Failing(torch.optim.AdamW):
        fails = False

        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            if self.fails:
                raise ArithmeticError

    model, optimizer = make(settings_of("stable-spam"), base=lambda params: Failing(params, lr=1e-2))
    params = list(model.parameters())
    run(optimizer, params, range(10))
    before = [dict(optimizer.state[param]) for param in params]
    optimizer.base.fails = True
    with pytest.raises(ArithmeticError):
        run(optimizer, params, [10])
    optimizer.base.fails = False
    for param, state in zip(params, before, strict=True):
        assert_same_state(dict(optimizer.state[param]), state)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert optimizer.param_groups[0][STEPS] == 10


# -- composition -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["galore", "galore2", "galore-track", None])
@pytest.mark.parametrize("kind", KINDS)
def test_it_composes_with_any_method_and_keeps_what_it_comes_with(kind: str, method: Any) -> None:
    config = GaLoreConfig(method=method, transform=kind)  # type: ignore[arg-type]
    assert (config.reset_gap, config.reset_warmup) == ((500, 150) if kind == "spam" else (1000, 0))
    assert GaLoreConfig(transform=kind, reset_gap=0).reset_warmup == 0  # type: ignore[arg-type]
    assert GaLoreConfig(transform=kind, reset_gap=20).reset_warmup == (20 if kind == "spam" else 0)  # type: ignore[arg-type]
    model = TinyTransformer()
    optimizer = GaLoreOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-2), model, config, rank=4)
    losses = train(model, optimizer, [0] * 30)
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize("make_base", ["adam", "rmsprop", "8bit", "sgd", "adafactor"])
def test_other_optimizers(make_base: str) -> None:
    bases: dict[str, Any] = {
        "adam": lambda params: torch.optim.Adam(params, lr=1e-2, weight_decay=0.1, amsgrad=True),
        "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3),
        "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
        "adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    }
    if make_base == "8bit":
        bnb = pytest.importorskip("bitsandbytes")
        bases["8bit"] = lambda params: bnb.optim.AdamW8bit(params, lr=1e-2, min_8bit_size=16)
    for kind in KINDS:
        settings = {**settings_of(kind), "moments": "keep"}
        how: dict[str, Any] = {"base": bases[make_base], "dtype": torch.float32}
        if kind == "spam" and make_base in ("sgd", "adafactor"):
            with pytest.raises(
                ValueError, match=r"transform='spam' with base=.* keeps none. Use Adam, AdamW or RMSprop"
            ):
                make(settings, **how)
            continue
        assert_resume_is_exact(settings, **how)


def test_a_lift_with_the_full_gradient_sees_the_low_rank_one_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Watching(Lift):
        needs_grad = True

        def apply_(self, weight: Any, update: Any) -> None:
            seen.append((update.low_grad.clone(), update.projection.project(update.grad, update.bases)))

    monkeypatch.setitem(LIFTS, "project_back", Watching)
    model, optimizer = make(
        settings_of("stable-spam"), bias=False, base=lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1)
    )
    run(optimizer, list(model.parameters()), range(6))
    for low, projected in seen:
        torch.testing.assert_close(low, projected)


def test_sparse_gradients_are_refused_with_the_remedy() -> None:
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 8, bias=False))
    optimizer = GaLoreOptimizer(torch.optim.SGD(model.parameters(), lr=1e-2), model, method="stable-spam", rank=2)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"transform='stable-spam'.*sparse gradient.*nn.Embedding\(sparse=False\)"):
        optimizer.step()


def test_what_another_transform_remembered_goes() -> None:
    settings = settings_of("stable-spam")
    model, optimizer = make(settings)
    run(optimizer, list(model.parameters()), range(2))
    other, again = make({**settings, "method": "spam"})
    other.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    assert any(map(transform_entries, again.state.values()))
    run(again, list(other.parameters()), [2])
    assert not any(map(transform_entries, again.state.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_zero_gradients_stay_zero(kind: str) -> None:
    transform = Spam() if kind == "spam" else StableSpam()
    entries: dict[str, torch.Tensor] = {}
    for _ in range(3):
        grad = torch.zeros(3, 2)
        entries = transform.apply_(grad, entries, second=torch.zeros(3, 2))
        assert torch.equal(grad, torch.zeros(3, 2))
        assert all(bool(torch.isfinite(value)) for value in entries.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transform": "clip"}, r"transform='clip' is not known; choose one of 'auto', 'none', 'spam', 'stable-spam'"),
        ({"spam_theta": 0}, r"spam_theta=0 must be positive and finite; the paper uses 5000"),
        ({"reset_gap": -1}, r"reset_gap=-1 must be at least 0; the paper uses 500; 0 never resets"),
        ({"reset_warmup": -1}, r"reset_warmup=-1 must be at least 0"),
        ({"reset_gap": 5, "reset_warmup": 6}, r"reset_warmup=6 is longer than reset_gap=5: .* Lower it"),
        ({"reset_warmup": 6}, r"reset_warmup=6 is longer than reset_gap=0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaLoreConfig(**settings)


def test_a_warm_up_needs_a_learning_rate() -> None:
    base = torch.optim.AdamW([nn.Parameter(torch.ones(3))], lr=1e-2)
    base.param_groups[0]["lr"] = None  # as relative step sizes are written
    config = GaLoreConfig(reset_gap=5, reset_warmup=2)
    with pytest.raises(ValueError, match=r"reset_warmup=2 with lr=None .* AdamW: .* Set lr, or reset_warmup=0"):
        check_transform(base, [], config)


@pytest.mark.parametrize("kind", [*KINDS, "natural"])
def test_sharded_weights_are_refused_with_the_remedy(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_galore.admission.common_shards", lambda weights: object())
    with pytest.raises(ValueError, match=rf"transform='{kind}' with sharded weights \(FSDP2\).*GaLoreDDPStrategy"):
        make({"rank": 3, "transform": kind})


@pytest.mark.parametrize("kind", ["stable-spam", "natural"])
def test_int8_weights_and_random_rounding(kind: Any) -> None:
    """Dense weights in bf16 are stepped on proxies then, and begin anew like the others."""
    settings = {"rank": 3, "transform": kind, "reset_gap": 4, "weight_storage": "int8", "basis_storage": "int8"}
    assert_resume_is_exact(settings, shapes=[(64, 32)], dtype=torch.bfloat16, stop=5, end=10)
    model, optimizer = make(settings, [(64, 32)], dtype=torch.bfloat16)
    run(optimizer, list(model.parameters()), range(5))
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_no_transform_waits_for_the_device(kind: str) -> None:
    """The peers ask each parameter whether it has a spike (SS-3)."""
    transform, entries = TRANSFORMS[kind](), {}  # type: ignore[var-annotated]
    with Waits() as waits:
        for step in range(3):
            entries = transform.apply_(gradient(step, (4, 3), spikes=True), entries, second=torch.ones(4, 3).double())
    assert waits.count == 0
    with Waits() as waits:
        float(torch.ones(()))
    assert waits.count == 1
