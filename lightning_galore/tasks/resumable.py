# SPDX-License-Identifier: Apache-2.0
"""Loaders that go on where a checkpoint left them, in the middle of an epoch too.

Lightning asks a loader for its state when it saves. By then it may have fetched batches that are not trained on yet, so
the state is that of the last batch that was: the Trainer's own count says which.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeAlias, TypeVar

import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, get_worker_info
from typing_extensions import override

#: What a loader must know of the run: the batches trained on in this epoch, whether that was the last of the epoch, and
#: the batches of all epochs.
Progress: TypeAlias = Callable[[], tuple[int, bool, int]]
#: What a stream yields: the batch, the worker that made it, and where that worker stood afterwards.
Stated: TypeAlias = tuple[dict[str, Any], int, dict[str, Any]]


def progress_of(trainer: Trainer) -> Progress:
    """The batches that a Trainer has trained on."""

    def progress() -> tuple[int, bool, int]:
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress
        done = batches.current.processed
        return done, done >= trainer.num_training_batches, batches.total.processed

    return progress


class ResumableLoader(DataLoader[Any]):
    """Rows of a data set in an order that depends on a seed and the epoch alone.

    Args:
        dataset: With a length.
        seed: Of the order, the same for every process.
        rank: Of this process.
        world_size: How many processes share the rows.
        progress: What the run has done; without one, every batch that was handed out counts.
        **options: Of ``DataLoader``.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        sampler = options.pop("sampler", None)  # Lightning's own, where it makes such a loader anew
        if sampler is None:
            sampler = _SkippingSampler(dataset, num_replicas=world_size, rank=rank, seed=seed)
        super().__init__(dataset, sampler=sampler, **options)
        self.seed, self.rank, self.world_size, self.progress = seed, rank, world_size, progress
        self._handed_out = 0
        #: Whether it has been read from, since it was made or told where to go on.
        self.begun = False
        # Of the next pass, once a state has said it: Lightning's own count falls behind where a run is resumed at the
        # ends of epochs again and again.
        self._epoch: int | None = None

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: nothing is read before the first batch is asked for, when the epoch is known.
        self.begun, sampler = True, self.sampler
        if self._epoch is not None and isinstance(sampler, _SkippingSampler):
            sampler.set_epoch(self._epoch)
            self._epoch += 1
        self._handed_out = sampler.skip // (self.batch_size or 1) if isinstance(sampler, _SkippingSampler) else 0
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and the batches of it that were trained on."""
        done, ended = (
            (self._handed_out, self._handed_out >= len(self)) if self.progress is None else self.progress()[:2]
        )
        epoch = getattr(self.sampler, "epoch", 0)
        state = {"epoch": epoch + 1, "batches": 0} if ended else {"epoch": epoch, "batches": done}
        return {**state, "batch_size": self.batch_size, "world_size": self.world_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches of a state.

        Raises:
            ValueError: If the epoch was cut into other batches.
        """
        if not isinstance(self.sampler, _SkippingSampler):
            return
        if state["batches"]:
            for name, now in (("batch_size", self.batch_size), ("world_size", self.world_size)):
                if state[name] != now:
                    raise ValueError(
                        f"The checkpoint was written in the middle of an epoch with {name}={state[name]}, now it is "
                        f"{now}: the rest of that epoch cannot be told. Go on with {name}={state[name]}, or from a "
                        "checkpoint at the end of an epoch."
                    )
        self.begun, self._epoch = False, state["epoch"]
        self.sampler.set_epoch(state["epoch"])
        self.sampler.skip = state["batches"] * (self.batch_size or 1)


class _SkippingSampler(DistributedSampler[Any]):
    """A DistributedSampler whose next pass leaves out its first ``skip`` rows."""

    skip = 0

    @override
    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        return islice(super().__iter__(), skip, None)


class StatedStream(IterableDataset[Stated | None]):
    """An endless stream of batches, each with the state in which it left its worker. Derive ``batches`` from it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = 0  # the batch that comes next, counted over the whole run
        self.states: dict[int, dict[str, Any]] = {}

    def batches(self, state: dict[str, Any] | None) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """This worker's batches, each with the state after it.

        Args:
            state: Where the worker stood; None at the start.
        """
        raise NotImplementedError

    @override
    def __iter__(self) -> Iterator[Stated | None]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        if worker < self.first % workers:
            yield None  # a loader asks worker 0 first; the next batch is that of a later one
        for batch, state in self.batches(self.states.get(worker)):
            yield batch, worker, state


def _as_it_is(stated: Any) -> Any:
    return stated


class ResumableStream(DataLoader[Any]):
    """Batches of a :class:`StatedStream`.

    Args:
        dataset: The stream, of this process.
        rank: Of this process.
        world_size: How many processes there are, each with a stream of its own.
        progress: What the run has done; without one, every batch that was handed out counts.
        **options: Of ``DataLoader``.
    """

    def __init__(
        self,
        dataset: StatedStream,
        *,
        rank: int = 0,
        world_size: int = 1,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, **{"collate_fn": _as_it_is, **options, "batch_size": None})
        self.rank, self.world_size, self.progress = rank, world_size, progress
        #: Whether it has been read from, since it was made or told where to go on.
        self.begun = False
        # The states after the last few batches: Lightning fetches one ahead.
        self._after: deque[tuple[int, dict[int, dict[str, Any]]]] = deque([(0, {})], maxlen=8)

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.begun, stream = True, self.dataset
        assert isinstance(stream, StatedStream)
        count, states = stream.first, stream.states = self._now()
        for stated in super().__iter__():
            if stated is None:
                continue
            batch, worker, state = stated
            count, states = count + 1, {**states, worker: state}
            self._after.append((count, states))
            yield batch

    def _now(self) -> tuple[int, dict[int, dict[str, Any]]]:
        """The batches that were trained on, and where each worker stood then."""
        done = self._after[-1][0] if self.progress is None else self.progress()[2]
        known = dict(self._after)
        # A run that has just been resumed has not counted yet.
        return (done, known[done]) if done in known else self._after[-1]

    def state_dict(self) -> dict[str, Any]:
        """Where the workers of every process stand. All processes must call it together."""
        count, states = self._now()
        own = {str(worker): state for worker, state in states.items()}
        ranks: list[Any] = [own]
        if self.world_size > 1:
            ranks = [None] * self.world_size
            torch.distributed.all_gather_object(ranks, own)
        return {"batches": count, "num_workers": max(1, self.num_workers), "ranks": ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches of a state.

        Raises:
            ValueError: If the text was divided among other workers or processes.
        """
        now = {"num_workers": max(1, self.num_workers), "world_size": self.world_size}
        then = {"num_workers": state["num_workers"], "world_size": len(state["ranks"])}
        for name in now:
            if now[name] != then[name]:
                raise ValueError(
                    f"The checkpoint was written with {name}={then[name]}, now it is {now[name]}: each worker has a "
                    f"part of the text of its own, and goes on in that alone. Resume with {name}={then[name]}."
                )
        self.begun = False
        states = {int(worker): where for worker, where in state["ranks"][self.rank].items()}
        self._after = deque([(state["batches"], states)], maxlen=8)


Loader = TypeVar("Loader", ResumableLoader, ResumableStream)


class ResumableData(LightningDataModule):
    """Data whose training loader goes on where a checkpoint left it."""

    def __init__(self) -> None:
        super().__init__()
        self._train_loader: ResumableLoader | ResumableStream | None = None
        self._resume: dict[str, Any] | None = None

    def _process(self) -> dict[str, Any]:
        """The place of this process among all, and what the run has done."""
        if self.trainer is None:
            return {"rank": 0, "world_size": 1, "progress": None}
        return {
            "rank": self.trainer.global_rank,
            "world_size": self.trainer.world_size,
            "progress": progress_of(self.trainer),
        }

    def _seed(self) -> int:
        """That of the rows' order: the global seed, the same in all processes."""
        seed = torch.initial_seed() % 2**31
        return int(self.trainer.strategy.broadcast(seed)) if self.trainer is not None else seed

    def _workers(self, count: int) -> dict[str, Any]:
        """Options of a loader with this many worker processes, which stay from epoch to epoch."""
        # Starting them draws a number, which an unbroken run does less often: not from the global generator, then.
        own = torch.Generator().manual_seed(self._seed()) if count else None
        return {"num_workers": count, "persistent_workers": count > 0, "generator": own}

    def _resumed(self, loader: Loader) -> Loader:
        if self._train_loader is not None and self._train_loader.begun:
            self._resume = None  # done: this loader is of a later epoch, or of another run
        self._train_loader = loader
        if self._resume is not None:
            loader.load_state_dict(self._resume)
        return loader

    @override
    def state_dict(self) -> dict[str, Any]:
        """Where the training loader stands. Lightning keeps it too, but gives it back to loaders made late only."""
        return {"train": self._train_loader.state_dict()} if self._train_loader is not None else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the training loader stood."""
        self._resume = state_dict.get("train")
        if self._train_loader is not None and self._resume is not None:
            self._train_loader.load_state_dict(self._resume)
