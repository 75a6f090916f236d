# SPDX-License-Identifier: Apache-2.0
"""The convergence comparison on a tiny model: runs train and repeat, sweeps resume, tables say what the runs say."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks.convergence import __main__ as command
from benchmarks.convergence import build as building
from benchmarks.convergence import store as stores
from benchmarks.convergence import variants as rows
from benchmarks.convergence.build import Task, build, held_bytes
from benchmarks.convergence.data import Text, load_text, windows
from benchmarks.convergence.language import Experiment, save_gradients, train
from benchmarks.convergence.model import SIZES, UNIFORM_LOSS, ModelSize, build_model, matrices
from benchmarks.convergence.plot import picture
from benchmarks.convergence.runner import Result, Spec
from benchmarks.convergence.store import Store
from benchmarks.convergence.sweep import MOST_EXTRA, Sweep, carry_out, tune
from benchmarks.convergence.table import paired, report_of, rows_of
from benchmarks.convergence.variants import VARIANTS, Variant, why_not

SIZE = ModelSize(hidden=16, layers=1, heads=2, intermediate=24)
TINY = Experiment(size=SIZE, rank=4, steps=12, batch=4, length=16, validation_batches=2)


@pytest.fixture(scope="module")
def text() -> Text:
    content = bytes(itertools.islice(itertools.cycle(b"the rank of the gradient is low. "), 4000))
    halves = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for _ in range(2)]
    return Text(name="a sentence", train=halves[0], validation=halves[1], sha256="0" * 64, files=1)


def spec(variant: str | Variant, *, lr: float = 1e-2, seed: int = 0, experiment: Experiment = TINY) -> Spec:
    chosen = VARIANTS[variant] if isinstance(variant, str) else variant
    return Spec(experiment=experiment, variant=chosen, lr=lr, seed=seed, text_sha256="0" * 64)


# -- text --------------------------------------------------------------------------------------------------------------


def test_the_default_text_is_python_source_and_stays_the_same() -> None:
    first, second = load_text(), load_text()
    assert first.sha256 == second.sha256
    assert first.train.numel() > 1_000_000
    assert first.validation.numel() > 100_000
    assert b"def " in bytes(first.train[:100_000].tolist())
    assert first.facts()["sha256"] == first.sha256


def test_a_folder_is_split_by_file_and_a_file_by_its_end(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.txt").write_bytes(b"%03d" % number)
    folder = load_text(tmp_path)
    sides = [set(bytes(side.tolist()).split(b"\n")) for side in (folder.train, folder.validation)]
    assert sides[0] | sides[1] == {b"%03d" % number for number in range(60)}
    assert not sides[0] & sides[1]
    single = tmp_path / "single"
    single.write_bytes(bytes(range(100)))
    assert load_text(single).validation.tolist() == list(range(90, 100))
    (tmp_path / "7.txt").write_bytes(b"xxx")
    assert load_text(tmp_path).sha256 != folder.sha256


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gives 0 bytes to train on and 0"):
        load_text(tmp_path)


def test_windows_are_pieces_of_the_text_and_repeat() -> None:
    content = torch.arange(200, dtype=torch.uint8)
    drawn = [list(itertools.islice(windows(content, batch=3, length=5, seed=seed), 4)) for seed in (0, 0, 1)]
    assert all(torch.equal(one, other) for one, other in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0][0], drawn[2][0])
    assert not torch.equal(drawn[0][0], drawn[0][1])
    assert drawn[0][0].shape == (3, 6)
    assert (drawn[0][0].diff() == 1).all()
    whole = next(windows(content[:6], batch=2, length=5, seed=0))  # the only window there is
    assert whole.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    with pytest.raises(ValueError, match="length=6"):
        next(windows(content[:6], batch=2, length=6, seed=0))


# -- one run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "plain", "randomized", "muon"])
def test_a_variant_trains_and_repeats(name: str, text: Text) -> None:
    if reason := why_not(VARIANTS[name], rank=4):
        pytest.skip(reason)
    first, second = train(spec(name), text), train(spec(name), text)
    assert first.loss is not None
    assert first.loss < 0.95 * UNIFORM_LOSS
    assert first.loss < (train(spec(name, lr=0.0), text).loss or 0)  # the variant has its part in it
    assert first.loss == first.curve[-1][1]
    assert first.curve[-1][1] < first.curve[0][1]
    assert [step for step, _ in first.curve] == [2, 3, 6, 9, 12]
    assert (first.curve, first.train_curve) == (second.curve, second.train_curve)
    assert train(spec(name, seed=1), text).loss != first.loss
    assert 0 < first.optimizer_seconds < first.train_seconds


def test_all_variants_share_weights_batches_and_the_dense_rate(text: Text) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = build_model(SIZE, length=16, seed=0).state_dict()
    assert torch.rand(1) == expected  # the global random state is left alone, and not listened to
    again, other = (build_model(SIZE, length=16, seed=seed).state_dict() for seed in (0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    # At learning rate 0 for the matrices only the weights that every variant treats alike move.
    losses = {name: train(spec(name, lr=0.0), text).loss for name in ("adamw", "plain", "random")}
    assert len(set(losses.values())) == 1


def test_the_matrices_are_those_inside_the_layers() -> None:
    model = build_model(SIZE, length=16, seed=0)
    chosen = matrices(model)
    assert len(chosen) == 7
    assert not any("embed" in name or "lm_head" in name for name in chosen)
    task = Task(model=model, matrices=list(chosen.values()), common={"rank": 4}, lr=1.0)
    assert {id(p) for p in task.matrices} | {id(p) for p in task.dense} == {id(p) for p in model.parameters()}
    optimizer = build(VARIANTS["plain"], task)[0]
    assert [(group["lr"], len(group["params"])) for group in optimizer.param_groups] == [(1.0, 7), (3e-3, 5)]


def test_settings_that_project_other_weights_are_refused() -> None:
    model = build_model(SIZE, length=16, seed=0)
    fewer = Variant(kind="galore", settings={"ignore_modules": ["q_proj"]})
    with pytest.raises(ValueError, match="rank=4 project 6 weights, not the 7"):
        build(fewer, Task(model=model, matrices=list(matrices(model).values()), common={"rank": 4}, lr=1.0))


def test_refreshes_and_bytes_are_counted(text: Text) -> None:
    gap = Variant(kind="galore", settings={"method": "galore", "update_proj_gap": 5})
    assert train(spec(gap), text).refreshes == 3  # before steps 0, 5 and 10
    plain, full = train(spec("plain"), text), train(spec("adamw"), text)
    assert full.refreshes is None
    assert plain.refreshes == 1
    moments = 2 * 4 * (4 * 16 * 4 + 3 * 24 * 4)  # two, fp32, rank 4: four squares and three of the MLP
    bases = 4 * 7 * 16 * 4
    counters = plain.state_bytes - moments - bases
    assert 0 <= counters <= 7 * 100
    assert full.state_bytes - 2 * full.matrix_bytes == 7 * 4  # a step counter each


def test_a_view_counts_with_all_that_it_keeps_alive() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    whole = torch.zeros(100)
    optimizer.state[weight] = {"a": whole[:1], "b": [whole[5:], torch.zeros(3)]}
    assert held_bytes([optimizer], [weight]) == 412


def test_a_run_that_diverges_says_so(text: Text) -> None:
    result = train(spec(Variant(kind="adamw"), lr=1e30), text)
    assert result.diverged
    assert result.loss is None or result.loss > UNIFORM_LOSS
    json.dumps(dataclasses.asdict(result), allow_nan=False)


def test_learning_rates_rise_and_fall() -> None:
    factors = [Experiment(steps=100).lr_factor(step) for step in range(101)]
    assert factors[:11] == pytest.approx([*(step / 10 for step in range(1, 11)), 1.0])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.1)


def test_optimizers_see_scheduled_rates_and_clipped_gradients(monkeypatch: pytest.MonkeyPatch, text: Text) -> None:
    seen: list[tuple[float, float, float]] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            norms = [p.grad.norm() for group in self.param_groups for p in group["params"]]
            matrices_lr, dense_lr = (group["lr"] for group in self.param_groups)
            seen.append((matrices_lr, dense_lr, float(torch.stack(norms).norm())))

    monkeypatch.setattr(building, "build", lambda variant, task: [Spy(task.groups())])
    train(spec("adamw", lr=1e-2, experiment=dataclasses.replace(TINY, clip=0.01)), text)
    factors = [TINY.lr_factor(step) for step in range(TINY.steps)]
    assert [lr for lr, _, _ in seen] == pytest.approx([1e-2 * factor for factor in factors])
    assert [lr for _, lr, _ in seen] == pytest.approx([3e-3 * factor for factor in factors])
    assert [norm for _, _, norm in seen] == pytest.approx([0.01] * TINY.steps, rel=1e-3)


def test_gradients_are_saved_before_clipping(text: Text) -> None:
    kept = save_gradients(spec("adamw"), text, steps={0, 5})
    assert len(kept) == 14
    model = build_model(SIZE, length=16, seed=0)
    window = next(windows(text.train, batch=4, length=16, seed=0))
    logits = model(input_ids=window[:, :-1]).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()).backward()
    for name, weight in matrices(model).items():
        torch.testing.assert_close(kept[f"step 0: {name}"], weight.grad)
        assert not torch.equal(kept[f"step 5: {name}"], kept[f"step 0: {name}"])


def test_settings_that_the_package_does_not_know_are_a_reason() -> None:
    assert why_not(VARIANTS["plain"], rank=4) is None
    assert "novelty" in (why_not(Variant(kind="galore", settings={"novelty": 1}), rank=4) or "")
    assert "subspace='none'" in (why_not(Variant(kind="galore", settings={"subspace": "none"}), rank=4) or "")


def test_a_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows.importlib.util, "find_spec", lambda name: None)
    assert why_not(VARIANTS["soap"], rank=4) == "the package pytorch_optimizer is not installed"
    assert why_not(VARIANTS["galore-torch"], rank=4) == "the package galore_torch is not installed"


# -- sweeps ------------------------------------------------------------------------------------------------------------


def test_the_grid_grows_on_the_side_of_its_best() -> None:
    grid = (1.0, 2.0, 4.0)
    assert tune({}, grid).missing == grid
    begun = tune({1.0: 5.0}, grid)
    assert (begun.missing, begun.best, begun.at_edge) == ((2.0, 4.0), 1.0, False)
    inside = tune({1.0: 5.0, 2.0: 4.0, 4.0: 5.0, 8.0: 1.0}, grid)  # 8 was run for somebody else: it does not count
    assert (inside.missing, inside.best, inside.at_edge) == ((), 2.0, False)
    assert tune({1.0: 3.0, 2.0: 4.0, 4.0: 5.0}, grid).missing == (0.5,)
    assert tune({1.0: 5.0, 2.0: 4.0, 4.0: 3.0}, grid).missing == (8.0,)
    assert tune({1.0: 5.0, 2.0: 4.0, 4.0: 3.0, 8.0: 2.0}, grid).missing == (16.0,)
    ended = tune({1.0: 5.0, 2.0: 4.0, 4.0: 3.0, 8.0: None}, grid)
    assert (ended.missing, ended.best, ended.at_edge) == ((), 4.0, False)
    falling = {2.0**power: -float(power) for power in range(3 + MOST_EXTRA)}
    assert tune(falling, grid).at_edge
    assert tune(falling, grid).missing == ()
    lost = tune(dict.fromkeys(grid), grid)
    assert (lost.missing, lost.best) == ((), None)


class Scripted:
    """Stands for training: a loss with its minimum at ``best``, lowered a little by the seed."""

    def __init__(self, best: dict[str, float]) -> None:
        self.best = best
        self.ran: list[tuple[str, float, int]] = []

    def __call__(self, spec: Spec, text: Text) -> Result:
        name = next(name for name, variant in VARIANTS.items() if variant == spec.variant)
        self.ran.append((name, spec.lr, spec.seed))
        loss = 2.0 + math.log2(spec.lr / self.best[name]) ** 2 - 0.1 * spec.seed + self.best[name]
        return Result(
            loss=loss,
            diverged=False,
            curve=[(1, 3.0), (2, loss)],
            train_curve=[(2, loss)],
            refreshes=2.0 if spec.variant.kind == "galore" else None,
            state_bytes=10,
            matrix_bytes=20,
            optimizer_seconds=1.0 if name == "adamw" else 3.0,
            train_seconds=10.0,
        )


def sweep_of(text: Text, *names: str) -> Sweep:
    return Sweep(experiment=TINY, text=text, variants=names, seeds=(0, 1, 2), rates=(1.0, 2.0, 4.0))


def carried(sweep: Sweep, store: Store, run_one: Scripted) -> list[str]:
    return carry_out(sweep, store, machine={"commit": "abc"}, said=lambda line: None, run_one=run_one)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "folder" / "runs.jsonl")


def test_every_variant_is_tuned_and_then_repeated(text: Text, store: Store) -> None:
    runs = Scripted({"adamw": 2.0, "plain": 8.0})
    assert carried(sweep_of(text, "adamw", "plain"), store, runs) == []
    grid = [(lr, 0) for lr in (1.0, 2.0, 4.0)]
    assert [(lr, seed) for name, lr, seed in runs.ran if name == "adamw"] == [*grid, (2.0, 1), (2.0, 2)]
    further = [*grid, (8.0, 0), (16.0, 0), (8.0, 1), (8.0, 2)]
    assert [(lr, seed) for name, lr, seed in runs.ran if name == "plain"] == further


def test_a_stopped_sweep_goes_on_where_it_was(text: Text, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    sweep = sweep_of(text, "adamw", "plain")
    best = {"adamw": 2.0, "plain": 2.0}

    class Stopped(Scripted):
        def __call__(self, spec: Spec, text: Text) -> Result:
            if len(self.ran) == 6:
                raise KeyboardInterrupt
            return super().__call__(spec, text)

    first = Stopped(best)
    with pytest.raises(KeyboardInterrupt):
        carried(sweep, Store(path), first)
    with path.open("a") as file:
        file.write('{"key": "half a li')
    second = Scripted(best)
    carried(sweep, Store(path), second)
    assert len(first.ran) == 6
    assert len(second.ran) == 4
    assert not set(first.ran) & set(second.ran)
    third = Scripted(best)
    carried(sweep, Store(path), third)
    assert third.ran == []


def test_a_variant_that_fails_does_not_stop_the_others(text: Text, store: Store) -> None:
    runs = Scripted({"plain": 2.0})  # knows no adamw
    assert carried(sweep_of(text, "adamw", "plain"), store, runs) == ["adamw failed: KeyError: 'adamw'"]
    assert len(sweep_of(text, "plain").seed_runs("plain", store)) == 2


def test_runs_of_another_setting_do_not_count(text: Text, store: Store) -> None:
    sweep = sweep_of(text, "plain")
    carried(sweep, store, Scripted({"plain": 2.0}))
    assert not list(sweep.to_do("plain", store))
    longer = dataclasses.replace(sweep, experiment=dataclasses.replace(TINY, steps=13))
    other_text = dataclasses.replace(sweep, text=dataclasses.replace(text, sha256="1" * 64))
    for changed in (longer, other_text):
        assert next(changed.to_do("plain", store)) == (1.0, 0)
    run = store.find(sweep.spec("plain", 2.0, 1))
    assert run is not None
    assert run.config is not None
    # The package gave a setting another meaning since: the run is not of this variant any more.
    store.add(dataclasses.replace(run, config={**run.config, "subspace": "randomized"}))
    assert list(sweep.to_do("plain", store)) == [(2.0, 1)]


def test_two_processes_may_write_one_file(text: Text, tmp_path: Path) -> None:
    stores = [Store(tmp_path / "runs.jsonl") for _ in range(2)]
    best = {"adamw": 2.0, "plain": 2.0}
    carried(sweep_of(text, "adamw"), stores[0], Scripted(best))
    carried(sweep_of(text, "plain"), stores[1], Scripted(best))
    stores[0].refresh()
    again = Scripted(best)
    carried(sweep_of(text, "adamw", "plain"), stores[0], again)
    assert again.ran == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"variants": ("novelty",)}, "variants=.*novelty"),
        ({"seeds": (1, 1)}, "seeds="),
        ({"rates": (2.0, 1.0)}, "rates="),
        ({"rates": (1.0,)}, "rates="),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(text: Text, change: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        dataclasses.replace(sweep_of(text, "plain"), **change)


# -- tables ------------------------------------------------------------------------------------------------------------


def test_the_table_is_computed_from_the_runs(text: Text, store: Store) -> None:
    sweep = sweep_of(text, "adamw", "plain", "randomized")
    carried(sweep, store, Scripted({"adamw": 2.0, "plain": 4.0, "randomized": 2.0}))
    table = {row.variant: row for row in rows_of(sweep, store)}
    assert list(table) == ["adamw", "randomized", "plain"]  # the best first
    plain = table["plain"]
    assert plain.losses == {1: pytest.approx(5.9), 2: pytest.approx(5.8)}
    assert plain.mean == pytest.approx(5.85)
    assert plain.deviation == pytest.approx(0.1 / math.sqrt(2))
    assert (plain.lr, plain.lr_at_edge, plain.tuning_loss) == (4.0, False, 6.0)
    assert plain.difference is None
    assert table["adamw"].difference == pytest.approx(-2.0)
    assert table["adamw"].error == pytest.approx(0.0, abs=1e-12)
    assert (table["adamw"].optimizer_time, plain.optimizer_time) == (1.0, 3.0)
    assert (table["adamw"].refreshes, plain.refreshes) == (None, 2.0)
    report = report_of(sweep, store, name="x", machine={"commit": "abc"}, left_out=["soap is left out: why"])
    assert [cells[0] for cells in report.tables[0].rows] == list(table)
    assert "5.8500" in report.tables[0].rows[2]
    assert report.notes[-1] == "soap is left out: why"
    json.dumps(dataclasses.asdict(report), allow_nan=False)
    axes = picture(sweep, store, list(table.values()), headline="").axes
    assert [label.get_text() for label in axes[1].get_yticklabels()] == list(table)
    assert list(axes[0].get_lines()[0].get_ydata()) == [3.0, pytest.approx(3.85)]


def test_a_diverged_seed_leaves_no_mean(text: Text, store: Store) -> None:
    sweep = sweep_of(text, "plain")
    carried(sweep, store, Scripted({"plain": 2.0}))
    run = store.find(sweep.spec("plain", 2.0, 2))
    assert run is not None
    store.add(dataclasses.replace(run, result=dataclasses.replace(run.result, loss=None, diverged=True)))
    (row,) = rows_of(sweep, store)
    assert (row.mean, row.losses[2]) == (None, None)
    assert "1 diverged" in report_of(sweep, store, name="x", machine={}).tables[0].rows[0]


def test_differences_are_taken_seed_by_seed() -> None:
    mean, error = paired({1: 1.0, 2: 2.0, 3: 7.0}, {1: 1.5, 2: 2.1, 3: None, 4: 0.0})
    assert mean == pytest.approx(-0.3)
    assert error == pytest.approx(0.2)
    assert paired({1: 1.0}, {1: 0.5}) == (0.5, None)
    assert paired({1: 1.0}, {2: 0.5}) == (None, None)


def test_nothing_finished_is_said(text: Text, store: Store) -> None:
    with pytest.raises(ValueError, match="no run of"):
        report_of(sweep_of(text, "plain"), store, name="x", machine={})


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    monkeypatch.setitem(SIZES, "small", SIZE)
    monkeypatch.setattr(command, "Experiment", functools.partial(Experiment, validation_batches=1))
    file = tmp_path / "text"
    file.write_bytes(b"abcdefgh" * 1000)
    threads = torch.get_num_threads()
    shared = ["--text", str(file), "--runs", str(tmp_path / "runs.jsonl"), "--out", str(tmp_path / "out")]
    yield ["--steps", "2", "--seeds", "0", "1", "--rates", "1e-3", "1e-2", "--variants", "adamw", "plain", *shared]
    torch.set_num_threads(threads)


def test_the_command_runs_its_share_and_writes(
    tiny_command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*tiny_command, "--shard", "1/2"]) == 0
    assert "plain" not in {json.loads(line)["variant"] for line in (tmp_path / "runs.jsonl").read_text().splitlines()}
    assert command.main(tiny_command) == 0
    output = capsys.readouterr()
    assert "minus plain" in output.out
    (written,) = (tmp_path / "out").glob("*-convergence.json")
    report = json.loads(written.read_text())
    assert {row["variant"] for row in report["measurements"]} == {"adamw", "plain"}
    assert report["settings"]["experiment"]["rank"] == 4
    assert report["settings"]["text"]["sha256"]
    assert written.with_suffix(".png").stat().st_size > 1000
    finished = (tmp_path / "runs.jsonl").read_text()
    assert command.main([*tiny_command, "--table-only"]) == 0
    assert (tmp_path / "runs.jsonl").read_text() == finished


def test_the_command_saves_gradients(tiny_command: list[str], tmp_path: Path) -> None:
    path = tmp_path / "folder" / "gradients.pt"
    assert command.main([*tiny_command, "--save-gradients", str(path)]) == 0
    held: dict[str, Tensor] = torch.load(path, weights_only=True)
    assert len(held) == 14  # the seven matrices, before steps 0 and 1
    assert all(grad.ndim == 2 for grad in held.values())
    assert not (tmp_path / "runs.jsonl").exists()


@pytest.mark.parametrize("wrong", [["--shard", "3/2"], ["--rank", "99"], ["--variants", "novelty"], ["--steps", "0"]])
def test_the_command_refuses_nonsense(
    wrong: list[str], tiny_command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main([*tiny_command, *wrong])
    assert wrong[-1] in capsys.readouterr().err


def test_a_default_that_plays_no_part_may_move() -> None:
    fixed = {"schedule": "fixed", "grow_above": 0.9, "rank": 4}
    assert stores._agree(fixed, {**fixed, "grow_above": 0.7})
    assert not stores._agree(fixed, {**fixed, "rank": 5})
    adaptive = {**fixed, "schedule": "adaptive"}
    assert not stores._agree(adaptive, {**adaptive, "grow_above": 0.7})
