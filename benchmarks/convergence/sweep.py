# SPDX-License-Identifier: Apache-2.0
"""The budget: every variant's learning rate is tuned over the same grid at one seed, then it runs at the others."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.convergence.language import train
from benchmarks.convergence.runner import Result, Schedule, Spec
from benchmarks.convergence.store import Run, Store
from benchmarks.convergence.variants import BASELINE, VARIANTS

RATES = (7.5e-4, 1.5e-3, 3e-3, 6e-3)
SEEDS = (0, 1, 2, 3, 4)
MOST_EXTRA = 3  # learning rates beyond the grid


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Where the search for a learning rate stands.

    Args:
        missing: Learning rates that are still to be run.
        best: The best so far; None before the first run, and where every run diverged.
        at_edge: Whether the search ended with the smallest or the largest, so that a better one may lie beyond.
    """

    missing: tuple[float, ...]
    best: float | None
    at_edge: bool


def tune(
    losses: Mapping[float, float | None], grid: Sequence[float] = RATES, *, most_extra: int = MOST_EXTRA
) -> Tuning:
    """What to run next: the grid, and while the best lies at an edge, one more on that side.

    Args:
        losses: Learning rate to validation loss of what was run; None is a diverged run. Rates that this rule would
            not have asked for do not count.
        grid: At least two learning rates, ascending.
        most_extra: How many may be added to it.
    """
    missing = tuple(lr for lr in grid if lr not in losses)
    tried = {lr: losses[lr] for lr in grid if lr in losses}
    for _ in range(0 if missing else most_extra):
        extra = _beyond(sorted(tried), _best(tried))
        if extra is None:
            break
        if extra not in losses:
            missing = (extra,)
            break
        tried[extra] = losses[extra]
    best = _best(tried)
    at_edge = not missing and best is not None and best in (min(tried), max(tried))
    return Tuning(missing=missing, best=best, at_edge=at_edge)


def _beyond(rates: Sequence[float], best: float | None) -> float | None:
    """The next learning rate on the side where ``best`` is the outermost of ``rates``, else None.

    To four digits, so that 0.012 is one number however it was computed.
    """
    if best == rates[0]:
        return float(f"{rates[0] ** 2 / rates[1]:.4g}")
    if best == rates[-1]:
        return float(f"{rates[-1] ** 2 / rates[-2]:.4g}")
    return None


def _best(losses: Mapping[float, float | None]) -> float | None:
    finite = {lr: loss for lr, loss in losses.items() if loss is not None}
    return min(finite, key=lambda lr: finite[lr]) if finite else None


class Data(Protocol):
    """What is learnt from."""

    @property
    def name(self) -> str:
        """For the picture."""

    @property
    def sha256(self) -> str:
        """Of all that is read."""

    def facts(self) -> dict[str, str | int]:
        """What the results record."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The runs of a comparison, done and to be done.

    Args:
        experiment: What all runs share.
        text: What is learnt from.
        variants: Their names.
        seeds: The first tunes the learning rate and is reported by itself; the mean is over the others.
        rates: The grid, ascending.
        baseline: The variant that the others are compared with, seed by seed.
        most_extra: Learning rates beyond the grid, at most.
    """

    experiment: Schedule
    text: Data
    variants: tuple[str, ...]
    seeds: tuple[int, ...] = SEEDS
    rates: tuple[float, ...] = RATES
    baseline: str = BASELINE
    most_extra: int = MOST_EXTRA

    def __post_init__(self) -> None:
        unknown = [name for name in (*self.variants, self.baseline) if name not in VARIANTS]
        if unknown:
            raise ValueError(f"variants={unknown} are not known; choose among {', '.join(VARIANTS)}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} must be different numbers, at least one.")
        if len(self.rates) < 2 or list(self.rates) != sorted(set(self.rates)) or self.rates[0] <= 0:
            raise ValueError(f"rates={list(self.rates)} must be at least two positive learning rates, ascending.")

    def spec(self, variant: str, lr: float, seed: int) -> Spec:
        """One run of the sweep."""
        return Spec(
            experiment=self.experiment,
            variant=VARIANTS[variant].of_length(self.experiment.steps),
            lr=lr,
            seed=seed,
            text_sha256=self.text.sha256,
        )

    def tuning_runs(self, variant: str, store: Store) -> dict[float, Run]:
        """The finished runs at the first seed, by learning rate: those of the grid, and those that it led to."""
        runs: dict[float, Run] = {}
        asked: tuple[float, ...] = self.rates
        while found := {lr: run for lr in asked if (run := store.find(self.spec(variant, lr, self.seeds[0])))}:
            runs |= found
            asked = tuple(lr for lr in self._tuning_of(runs).missing if lr not in self.rates)
        return runs

    def tuning(self, variant: str, store: Store) -> Tuning:
        """Where the search for the learning rate of a variant stands."""
        return self._tuning_of(self.tuning_runs(variant, store))

    def _tuning_of(self, runs: Mapping[float, Run]) -> Tuning:
        losses = {lr: None if run.result.diverged else run.result.loss for lr, run in runs.items()}
        return tune(losses, self.rates, most_extra=self.most_extra)

    def seed_runs(self, variant: str, store: Store) -> dict[int, Run]:
        """The finished runs at the other seeds and the best learning rate, by seed; none before it is known."""
        tuning = self.tuning(variant, store)
        if tuning.missing or tuning.best is None:
            return {}
        found = {seed: store.find(self.spec(variant, tuning.best, seed)) for seed in self.seeds[1:]}
        return {seed: run for seed, run in found.items() if run is not None}

    def to_do(self, variant: str, store: Store) -> Iterator[tuple[float, int]]:
        """Learning rate and seed of what is not finished, each asked for when the one before is in ``store``."""
        while missing := self.tuning(variant, store).missing:
            yield missing[0], self.seeds[0]
        best = self.tuning(variant, store).best
        if best is None:
            return
        for seed in self.seeds[1:]:
            if store.find(self.spec(variant, best, seed)) is None:
                yield best, seed


def carry_out(
    sweep: Sweep,
    store: Store,
    *,
    machine: dict[str, Any],
    said: Callable[[str], object],
    run_one: Callable[[Spec, Any], Result] = train,
) -> list[str]:
    """Do what is not finished. A variant whose run raises is given up, and the next one begins.

    Args:
        sweep: The comparison.
        store: Finished runs, to which is added.
        machine: The machine and the commit, noted with each run.
        said: Hears one line after each run.
        run_one: Does a run.

    Returns:
        A line for each variant that was given up.
    """
    failures = []
    for variant in sweep.variants:
        try:
            for lr, seed in sweep.to_do(variant, store):
                run = _run(sweep, variant, lr, seed, machine, run_one)
                store.add(run)
                loss = "diverged" if run.result.diverged else f"{run.result.loss:.4f}"
                said(f"{variant:14} lr {lr:<8g} seed {seed}  {loss}  {run.result.train_seconds:.1f} s")
        except Exception as error:  # whatever it is, it is this variant's, and hours of other runs may follow
            said(traceback.format_exc())
            failures.append(f"{variant} failed: {type(error).__name__}: {error}")
    return failures


def _run(
    sweep: Sweep, variant: str, lr: float, seed: int, machine: dict[str, Any], run_one: Callable[[Spec, Any], Result]
) -> Run:
    spec = sweep.spec(variant, lr, seed)
    return Run(
        key=spec.key(),
        variant=variant,
        lr=lr,
        seed=seed,
        config=spec.config(),
        result=run_one(spec, sweep.text),
        machine=machine,
    )
