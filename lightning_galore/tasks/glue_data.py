# SPDX-License-Identifier: Apache-2.0
"""The GLUE tasks as a LightningDataModule, from the hub or from local files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_galore.tasks.extras import require
from lightning_galore.tasks.glue_files import UNLABELLED, find_split, missing_train_message, read_rows
from lightning_galore.tasks.glue_tasks import TaskName, get_task
from lightning_galore.tasks.minilm import tokenizer_source
from lightning_galore.tasks.resumable import ResumableData, ResumableLoader

if TYPE_CHECKING:
    from datasets import Dataset

_HUB_NAME = "nyu-mll/glue"

Files = str | list[str] | None


@dataclass(frozen=True, kw_only=True)
class _Encoder:
    """Tokenizes rows. An object of its own: it is copied with the data set, and pickled for its workers."""

    tokenizer: Any
    text: tuple[str, ...]
    max_length: int

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = self.tokenizer(*(rows[name] for name in self.text), truncation=True, max_length=self.max_length)
        return {**encoded, "labels": rows["label"]}


class GlueDataModule(ResumableData):
    """Loaders for one GLUE task, or for the demo task.

    The data comes from the hub unless ``data_dir`` or ``train_file`` names local files. Batches are padded to their
    longest row. The order of the training rows depends on the global seed and the epoch alone, so that two runs under
    one seed see the same batches, and so does a run that was stopped and resumed, in the middle of an epoch too.

    Args:
        task: One of the nine GLUE tasks, or ``"demo"`` (sentiment of movie-review sentences).
        tokenizer: The tokenizer's hub name or folder, or ``"minilm"``; normally the ``model`` of ``GlueModule``.
        data_dir: Folder with the files of the task, found by their usual names; the original releases are understood.
        train_file: Training file or files (CSV, TSV, JSON, JSON lines, Parquet); wins over ``data_dir``.
        validation_file: Validation file or files; for MNLI the matched and the mismatched one, in this order.
        test_file: Test file or files, with or without labels.
        max_length: Longer rows are cut to this many tokens.
        batch_size: Training rows a batch, on each device.
        eval_batch_size: Rows a batch elsewhere; twice ``batch_size`` by default.
        num_workers: Worker processes of each loader.
        train_limit: Train on this many rows only, drawn with ``split_seed``.
        validation_limit: Validate on this many rows only, drawn with ``split_seed``.
        validation_size: Rows (int) or share (float) held out of the training rows when there is no validation file.
        split_seed: Seed of those draws. It is apart from the global seed, so that runs under different seeds are
            measured on the same rows.

    Example:
        >>> data = GlueDataModule(task="rte", tokenizer="roberta-base", batch_size=16)
        >>> data.task.labels
        ('entailment', 'not_entailment')
    """

    def __init__(
        self,
        task: TaskName,
        tokenizer: str,
        data_dir: str | None = None,
        train_file: Files = None,
        validation_file: Files = None,
        test_file: Files = None,
        max_length: int = 512,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        train_limit: int | None = None,
        validation_limit: int | None = None,
        validation_size: int | float = 0.1,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        self.task = get_task(task)
        self.tokenizer_name = tokenizer
        self.data_dir = Path(data_dir) if data_dir is not None else None
        self.files = {"train": train_file, "validation": validation_file, "test": test_file}
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or 2 * batch_size
        self.num_workers = num_workers
        self.limits = {"train": train_limit, "validation": validation_limit}
        self.validation_size = validation_size
        self.split_seed = split_seed
        self._splits: dict[str, Dataset] = {}
        self._encode: _Encoder | None = None
        self._check_arguments()

    def _check_arguments(self) -> None:
        positive = {"max_length": self.max_length, "batch_size": self.batch_size, **self.limits}
        for name, value in positive.items():
            if value is not None and value < 1:
                argument = f"{name}_limit" if name in self.limits else name
                raise ValueError(f"{argument}={value} must be at least 1.")
        size = self.validation_size
        if not (0 < size < 1 if isinstance(size, float) else size >= 1):
            raise ValueError(
                f"validation_size={size} must be a number of rows (int) or a share between 0 and 1 (float)."
            )
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise FileNotFoundError(f"data_dir={str(self.data_dir)!r} is not a folder (task={self.task.name!r}).")
        local = self.data_dir is not None or self.files["train"] is not None
        if not local and (self.task.name == "demo" or self.files["validation"] or self.files["test"]):
            raise ValueError(
                f"task={self.task.name!r} is read from local files here: say where with train_file=... or data_dir=..."
            )
        self._is_local = local

    @override
    def prepare_data(self) -> None:
        """Download the task once a machine, before every process loads it."""
        if not self._is_local:
            self._load_hub()

    @override
    def setup(self, stage: str) -> None:
        """Load the rows and the tokenizer; a second call does nothing."""
        if self._splits:
            return
        tokenizer = require("transformers").AutoTokenizer.from_pretrained(tokenizer_source(self.tokenizer_name))
        self._encode = _Encoder(tokenizer=tokenizer, text=self.task.text, max_length=self.max_length)
        splits = self._load_local() if self._is_local else self._load_hub()
        for name, rows in splits.items():
            limit = self.limits.get(name.partition("_")[0])
            if limit is not None and limit < len(rows):
                rows = rows.shuffle(seed=self.split_seed).select(range(limit))
            self._splits[name] = rows

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training batches."""
        options = self._options(self._splits["train"])
        return self._resumed(
            ResumableLoader(batch_size=self.batch_size, seed=self._seed(), **self._process(), **options)
        )

    @override
    def val_dataloader(self) -> list[DataLoader[Any]]:
        """One loader a validation split: two for MNLI (matched, mismatched), else one."""
        return [self._in_order(name) for name in self.task.validation]

    @override
    def test_dataloader(self) -> list[DataLoader[Any]]:
        """The test splits when all of them have labels, else the validation splits: GLUE keeps its test labels."""
        labelled = all(
            name in self._splits and UNLABELLED not in self._splits[name]["label"] for name in self.task.test
        )
        names = self.task.test if labelled else self.task.validation
        return [self._in_order(name) for name in names]

    @override
    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """The test splits, with or without labels; the validation splits when there are none."""
        names = self.task.test if all(name in self._splits for name in self.task.test) else self.task.validation
        return [self._in_order(name) for name in names]

    def majority_share(self) -> float:
        """Share of the most frequent label in the first validation split: the accuracy of always answering it."""
        labels = torch.tensor(self._splits[self.task.validation[0]]["label"][:])
        return labels.bincount().max().item() / len(labels)

    def _in_order(self, split: str) -> DataLoader[Any]:
        return DataLoader(batch_size=self.eval_batch_size, **self._options(self._splits[split]))

    def _options(self, rows: "Dataset") -> dict[str, Any]:
        assert self._encode is not None, "setup() comes before the loaders"
        return {
            # Tokenized when a batch is read: no cache on disk, and the workers share the work.
            "dataset": rows.with_transform(self._encode),
            "collate_fn": require("transformers").DataCollatorWithPadding(self._encode.tokenizer),
            **self._workers(self.num_workers),
        }

    def _load_hub(self) -> "dict[str, Dataset]":
        datasets = require("datasets")
        try:
            return dict(datasets.load_dataset(_HUB_NAME, self.task.name))
        except OSError as error:  # no connection, offline mode, or not in the cache
            raise ConnectionError(
                f"Cannot load {_HUB_NAME}, task={self.task.name!r}, from the Hugging Face hub: "
                f"{str(error).rstrip('. ')}. Give local files with data_dir=..., or train_file=... and "
                "validation_file=..., instead."
            ) from error

    def _load_local(self) -> "dict[str, Dataset]":
        datasets = require("datasets")
        train = self._paths("train")
        if not train:
            assert self.data_dir is not None  # train_file is given otherwise
            raise FileNotFoundError(missing_train_message(self.data_dir, self.task))
        tables = {"train": read_rows(train, self.task)}
        for split in (*self.task.validation, *self.task.test):
            if paths := self._paths(split):
                tables[split] = read_rows(paths, self.task, labelled=split.startswith("validation"))
        splits = {name: datasets.Dataset.from_pandas(table, preserve_index=False) for name, table in tables.items()}
        missing = [name for name in self.task.validation if name not in splits]
        if missing and len(self.task.validation) > 1:
            raise FileNotFoundError(
                f"task={self.task.name!r} has the validation splits {', '.join(self.task.validation)}, but "
                f"{', '.join(missing)} is missing. Give the files with validation_file=[matched, mismatched]."
            )
        if missing:
            held_out = self._hold_out(splits["train"])
            splits |= {"train": held_out["train"], "validation": held_out["test"]}
        return splits

    def _hold_out(self, rows: "Dataset") -> "dict[str, Dataset]":
        if isinstance(self.validation_size, int) and self.validation_size >= len(rows):
            raise ValueError(
                f"validation_size={self.validation_size} leaves nothing to train on: the file has {len(rows)} rows. "
                "Lower it, or name a validation_file."
            )
        return rows.train_test_split(test_size=self.validation_size, seed=self.split_seed)

    def _paths(self, split: str) -> list[Path]:
        kind = split.partition("_")[0]
        files = self.files[kind]
        if files is None:
            return find_split(self.data_dir, split, self.task) if self.data_dir is not None else []
        paths: Sequence[Path] = [Path(files)] if isinstance(files, str) else [Path(file) for file in files]
        names = getattr(self.task, kind) if kind != "train" else ("train",)
        if len(names) == 1:
            return list(paths)
        if len(paths) != len(names):
            raise ValueError(
                f"{kind}_file={files!r} names {len(paths)} file(s), but task={self.task.name!r} needs {len(names)}: "
                f"{', '.join(names)}, in this order."
            )
        return [paths[names.index(split)]]
