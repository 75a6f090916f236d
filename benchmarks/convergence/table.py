# SPDX-License-Identifier: Apache-2.0
"""What the runs say: mean and spread of each variant, and its difference to the baseline at the same seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median, stdev
from typing import Any

from benchmarks.convergence.store import Run, Store
from benchmarks.convergence.sweep import Sweep
from benchmarks.convergence.variants import VARIANTS
from benchmarks.results import Report, Table

FULL_RANK = "adamw"  # whose optimizer time is 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant.

    Args:
        variant: Its name.
        lr: Its learning rate: the best of the grid at the tuning seed.
        lr_at_edge: Whether a better one may lie beyond what was tried.
        tuning_loss: Validation loss at the tuning seed, of which ``lr`` is the best: not comparable with ``mean``.
        losses: Validation loss at each other seed; None if it diverged.
        mean: Of ``losses``; None if there are none, or one diverged.
        deviation: Their standard deviation, from two seeds on.
        difference: Mean over seeds of the loss minus the baseline's at that seed; negative is better.
        error: Standard error of ``difference``, from two seeds on.
        refreshes: Of a weight's basis in a run, on average.
        state_bytes: Of optimizer state that the matrices hold, on average over the runs.
        matrix_bytes: Of the matrices.
        optimizer_time: CPU time of the optimizer steps of a run, as a multiple of full-rank AdamW's.
        optimizer_share: Of the CPU time of training.
        scores: Share of right answers at each other seed; empty where there are no answers.
        score: Mean of ``scores``.
        score_error: Its standard error, from two seeds on.
        score_difference: Mean over seeds of the score minus the baseline's at that seed; positive is better.
        score_difference_error: Standard error of ``score_difference``, from two seeds on.
    """

    variant: str
    lr: float | None
    lr_at_edge: bool
    tuning_loss: float | None
    losses: dict[int, float | None]
    mean: float | None
    deviation: float | None
    difference: float | None
    error: float | None
    refreshes: float | None
    state_bytes: float
    matrix_bytes: int
    optimizer_time: float | None
    optimizer_share: float
    scores: dict[int, float | None] = field(default_factory=dict)
    score: float | None = None
    score_error: float | None = None
    score_difference: float | None = None
    score_difference_error: float | None = None


def rows_of(sweep: Sweep, store: Store) -> list[Row]:
    """A row for each variant of which a run is finished; the best first, unfinished ones last.

    Args:
        sweep: The comparison.
        store: Its finished runs, and perhaps others.
    """
    baseline = sweep.seed_runs(sweep.baseline, store)
    unit = _optimizer_seconds(_runs(sweep, FULL_RANK, store))
    rows = [_row(sweep, store, name, baseline, unit) for name in sweep.variants if _runs(sweep, name, store)]
    return sorted(rows, key=lambda row: (math.inf if row.mean is None else row.mean, row.tuning_loss or math.inf))


def losses_by_seed(runs: Mapping[int, Run]) -> dict[int, float | None]:
    """Validation loss of each run at its end; None where it diverged."""
    return {seed: None if run.result.diverged else run.result.loss for seed, run in runs.items()}


def scores_by_seed(runs: Mapping[int, Run]) -> dict[int, float | None]:
    """Share of right answers of each run at its end; empty where there are no answers."""
    return {seed: run.result.score for seed, run in runs.items() if run.result.score is not None}


def _scores(sweep: Sweep, runs: Mapping[int, Run], baseline: Mapping[int, Run], name: str) -> dict[str, Any]:
    scores = scores_by_seed(runs)
    nothing: dict[int, float | None] = dict.fromkeys(scores, 0.0)
    mean, error = paired(scores, nothing)
    against = (None, None) if name == sweep.baseline else paired(scores, scores_by_seed(baseline))
    return {
        "scores": scores,
        "score": mean,
        "score_error": error,
        "score_difference": against[0],
        "score_difference_error": against[1],
    }


def _runs(sweep: Sweep, variant: str, store: Store) -> list[Run]:
    return [*sweep.tuning_runs(variant, store).values(), *sweep.seed_runs(variant, store).values()]


def _optimizer_seconds(runs: Sequence[Run]) -> float | None:
    return median(run.result.optimizer_seconds for run in runs) if runs else None


def _row(sweep: Sweep, store: Store, name: str, baseline: Mapping[int, Run], unit: float | None) -> Row:
    tuning, tuned = sweep.tuning(name, store), sweep.tuning_runs(name, store)
    by_seed = sweep.seed_runs(name, store)
    losses = losses_by_seed(by_seed)
    runs = _runs(sweep, name, store)
    finite = [loss for loss in losses.values() if loss is not None]
    whole = len(finite) == len(losses)
    own = _optimizer_seconds(runs)
    difference, error = paired(losses, losses_by_seed(baseline)) if name != sweep.baseline and whole else (None, None)
    counted = [run.result.refreshes for run in runs if run.result.refreshes is not None]
    return Row(
        variant=name,
        lr=tuning.best,
        lr_at_edge=tuning.at_edge,
        tuning_loss=None if tuning.best is None else tuned[tuning.best].result.loss,
        losses=losses,
        mean=fmean(finite) if finite and whole else None,
        deviation=stdev(finite) if len(finite) > 1 and whole else None,
        difference=difference,
        error=error,
        refreshes=fmean(counted) if counted else None,
        state_bytes=fmean(run.result.state_bytes for run in runs),
        matrix_bytes=runs[0].result.matrix_bytes,
        optimizer_time=own / unit if own is not None and unit else None,
        optimizer_share=median(run.result.optimizer_seconds / run.result.train_seconds for run in runs),
        **_scores(sweep, by_seed, baseline, name),
    )


def paired(
    losses: Mapping[int, float | None], baseline: Mapping[int, float | None]
) -> tuple[float | None, float | None]:
    """Mean difference at the seeds that both have, and its standard error (from two seeds on).

    Args:
        losses: Seed to loss.
        baseline: The same of what is compared with.

    Example:
        >>> paired({1: 2.0, 2: 3.5}, {1: 2.0, 2: 3.0, 3: 9.0})
        (0.25, 0.25)
    """
    both = [(losses[seed], baseline[seed]) for seed in losses.keys() & baseline.keys()]
    differences = [own - other for own, other in both if own is not None and other is not None]
    if not differences:
        return None, None
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return fmean(differences), error


_SCORES = ("accuracy", "+- se", "minus {baseline}", "+- se")
_HEADER = (
    "variant",
    "loss, mean",
    "+- sd",
    "seeds",
    "minus {baseline}",
    "+- se",
    "lr",
    "tuning loss",
    "refreshes",
    "state MB",
    "state / weights",
    "optimizer time",
)


def table_of(sweep: Sweep, rows: Sequence[Row]) -> Table:
    """The rows for people."""
    scored = any(row.scores for row in rows)
    header = (*_HEADER, *_SCORES) if scored else _HEADER
    return Table(
        title=sweep.experiment.title,
        header=tuple(title.format(baseline=sweep.baseline) for title in header),
        rows=[(*_cells(row), *_score_cells(row)) if scored else _cells(row) for row in rows],
    )


def _cells(row: Row) -> tuple[str, ...]:
    diverged = sum(loss is None for loss in row.losses.values())
    return (
        row.variant,
        f"{diverged} diverged" if diverged else _number(row.mean),
        _number(row.deviation),
        str(len(row.losses)),
        _number(row.difference, sign="+"),
        _number(row.error),
        "-" if row.lr is None else f"{row.lr:g}" + ("*" if row.lr_at_edge else ""),
        _number(row.tuning_loss),
        "-" if row.refreshes is None else f"{row.refreshes:.0f}",
        f"{row.state_bytes / 1e6:.3f}",
        f"{row.state_bytes / row.matrix_bytes:.2f}",
        "-" if row.optimizer_time is None else f"{row.optimizer_time:.2f}",
    )


def _score_cells(row: Row) -> tuple[str, ...]:
    return (
        _number(row.score),
        _number(row.score_error),
        _number(row.score_difference, sign="+"),
        _number(row.score_difference_error),
    )


def _number(value: float | None, *, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def report_of(
    sweep: Sweep, store: Store, *, name: str, machine: dict[str, Any], left_out: Sequence[str] = ()
) -> Report:
    """The comparison as the benchmarks tell it.

    Args:
        sweep: The comparison.
        store: Its finished runs.
        name: Of the report.
        machine: On which the table was made.
        left_out: A line for each variant that could not run.

    Raises:
        ValueError: If no run is finished.
    """
    rows = rows_of(sweep, store)
    if not rows:
        raise ValueError(f"no run of variants={list(sweep.variants)} is finished; run the sweep first.")
    return Report(
        name=name,
        machine=machine,
        settings={
            "experiment": asdict(sweep.experiment),
            "text": sweep.text.facts(),
            "tuning_seed": sweep.seeds[0],
            "seeds": list(sweep.seeds[1:]),
            "rates": list(sweep.rates),
            "most_extra_rates": sweep.most_extra,
            "baseline": sweep.baseline,
        },
        measurements=[
            {
                **asdict(row),
                "kind": VARIANTS[row.variant].kind,
                "settings": dict(VARIANTS[row.variant].of_length(sweep.experiment.steps).settings),
                "text": VARIANTS[row.variant].text,
                "runs": [asdict(run) for run in _runs(sweep, row.variant, store)],
            }
            for row in rows
        ],
        tables=[table_of(sweep, rows)],
        notes=[*_notes(sweep, rows, store), *left_out],
    )


def _notes(sweep: Sweep, rows: Sequence[Row], store: Store) -> list[str]:
    notes = [
        f"learning rates tuned at seed {sweep.seeds[0]} (its loss stands in 'tuning loss'), means over the other "
        f"seeds; 'minus {sweep.baseline}' is taken seed by seed.",
        "state / weights: bytes of optimizer state on the matrices, over their own; optimizer time: CPU time of all "
        "optimizer steps, over full-rank fused AdamW's.",
    ]
    if any(row.lr_at_edge for row in rows):
        notes.append("*: the best learning rate is the smallest or largest that was tried.")
    short = [row.variant for row in rows if len(row.losses) < len(sweep.seeds) - 1]
    if short:
        notes.append(f"not finished: {', '.join(short)}.")
    commits = {str(run.machine.get("commit")) for row in rows for run in _runs(sweep, row.variant, store)}
    if len(commits) > 1:
        notes.append(f"runs of several commits: {', '.join(sorted(commits))}.")
    return notes
