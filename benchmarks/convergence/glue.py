# SPDX-License-Identifier: Apache-2.0
"""A GLUE task from local files: MiniLM's weights in RoBERTa's classes, fine-tuned for a few steps."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from benchmarks.convergence.model import matrices
from benchmarks.convergence.runner import Result, Schedule, Spec, Trial, Watch, carry_through
from lightning_galore.tasks.glue_files import find_split, read_rows
from lightning_galore.tasks.glue_tasks import TASKS, GlueTask, get_task
from lightning_galore.tasks.minilm import MINILM, minilm_as_roberta, tokenizer_source

#: Environment variable of the folder that holds one folder for each task.
FOLDER_VARIABLE = "LIGHTNING_GALORE_GLUE_DIR"
#: Learning rates of the matrices; the ends are moved as those of any grid.
RATES = (3e-4, 1.2e-3)
#: Tasks of one validation split whose answers are right or wrong.
NAMES = tuple(sorted(name for name, task in TASKS.items() if "accuracy" in task.metrics and len(task.validation) == 1))
_DENSE_LR = 3e-4  # full-rank AdamW's best on the demo's task, head and embeddings included
_EVAL_BATCH = 109

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Fine(Schedule):
    """A few steps of fine-tuning.

    Args:
        task: One of ``NAMES``.
        rank: Of the low-rank variants.
        steps: Optimizer steps.
        batch: Rows a step.
        length: Tokens to which rows are cut.
        layers: How many of the encoder's layers are kept, from the first.
        gaps: Refreshes of a basis in a run, where the schedule is fixed.
    """

    task: str = "sst2"
    rank: int = 8
    steps: int = 40
    batch: int = 16
    length: int = 24
    layers: int = 6
    gaps: int = 3
    judged_at: ClassVar[tuple[float, ...]] = (1.0,)  # which takes as long as several steps

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "batch", "length", "layers", "gaps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.task not in NAMES:
            raise ValueError(f"task={self.task!r} is not one of those that are compared: {', '.join(NAMES)}.")

    @property
    @override
    def common(self) -> dict[str, Any]:
        return {"rank": self.rank, "update_proj_gap": math.ceil(self.steps / self.gaps)}

    @property
    @override
    def title(self) -> str:
        return (
            f"Validation loss and accuracy, {self.task}: MiniLM, {self.layers} of 6 layers, rank {self.rank}, "
            f"{self.steps} steps of {self.batch} rows of at most {self.length} tokens"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """A tokenized task.

    Args:
        name: Of the task.
        train: ``input_ids``, ``attention_mask`` ``(rows, length)``, ``labels`` ``(rows,)``.
        validation: The same.
        sha256: Of the rows as they were read.
        classes: How many answers there are.
    """

    name: str
    train: Batch
    validation: Batch
    sha256: str
    classes: int

    def facts(self) -> dict[str, str | int]:
        """What the results record of the data."""
        sizes = {"train_rows": len(self.train["labels"]), "validation_rows": len(self.validation["labels"])}
        return {"name": self.name, **sizes, "sha256": self.sha256}


def folder_of(task: str, folder: Path | None) -> Path:
    """Where the files of a task are.

    Args:
        task: Its name.
        folder: What the user said; else the task's folder in the one that the environment names.

    Raises:
        ValueError: If nobody said.
    """
    if folder is not None:
        return folder
    root = os.environ.get(FOLDER_VARIABLE)
    if not root:
        raise ValueError(f"task={task!r} is read from local files: say where with --text, or set {FOLDER_VARIABLE}.")
    sentences = Path(root) / f"{task}-sentence"  # SST-2 is also shipped with its phrases
    return sentences if sentences.is_dir() else Path(root) / task


def load_rows(folder: Path, plan: Fine) -> Rows:
    """Read and tokenize a task.

    Args:
        folder: Its files, by their usual names.
        plan: Which task, and how long rows may be.

    Raises:
        ValueError: If a split is not there.
    """
    from transformers import AutoTokenizer

    task = get_task(plan.task)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(MINILM))
    splits, digest = {}, hashlib.sha256()
    for split in ("train", "validation"):
        paths = find_split(folder, split, task)
        if not paths:
            raise ValueError(
                f"the folder {str(folder)!r} holds no {split} file of task={plan.task!r}; name another one."
            )
        table = read_rows(paths, task)
        digest.update(table.to_csv(index=False).encode())
        splits[split] = _tokenized(table, task, tokenizer, plan.length)
    return Rows(name=plan.task, **splits, sha256=digest.hexdigest(), classes=task.num_labels)


def _tokenized(table: Any, task: GlueTask, tokenizer: Any, length: int) -> Batch:
    texts = [table[name].tolist() for name in task.text]
    encoded = tokenizer(*texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
    labels = torch.tensor(table["label"].tolist())
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}


def train(spec: Spec, rows: Rows, *, watch: Watch | None = None) -> Result:
    """Do one run.

    Args:
        spec: Which.
        rows: Those of ``spec.text_sha256``.
        watch: Sees the gradients of the matrices at every step.
    """
    plan = spec.experiment
    if not isinstance(plan, Fine):
        raise TypeError(f"experiment={plan} is not one of fine-tuning.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)  # of the head, and of dropout
        model: Any = minilm_as_roberta(num_labels=rows.classes).train()
        model.roberta.encoder.layer = model.roberta.encoder.layer[: plan.layers]
        trial = Trial(
            model=model,
            weights=matrices(model),
            dense_lr=_DENSE_LR,
            loss_of=_loss,
            batches=batches(rows.train, size=plan.batch, seed=spec.seed),
            judge=lambda: _judge(model, rows.validation),
            ignorant=2 * math.log(rows.classes),  # short of that it may only be too sure of itself
        )
        return carry_through(spec, trial, watch=watch)


def batches(rows: Batch, *, size: int, seed: int) -> Iterator[Batch]:
    """Rows in a random order, epoch after epoch, each batch cut to its longest row.

    Args:
        rows: All of them.
        size: Of a batch; what is left over at the end of an epoch is dropped.
        seed: Of the orders.

    Raises:
        ValueError: If there are fewer rows than a batch takes.
    """
    count = len(rows["labels"])
    if count < size:
        raise ValueError(f"batch={size} is more than the {count} rows that there are.")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        for chosen in order[: count - count % size].view(-1, size):
            yield _cut({name: values[chosen] for name, values in rows.items()})


def _cut(batch: Batch) -> Batch:
    longest = int(batch["attention_mask"].sum(1).max())
    return {name: values[:, :longest] if values.ndim > 1 else values for name, values in batch.items()}


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


@torch.no_grad()
def _judge(model: nn.Module, rows: Batch) -> tuple[float, float]:
    """Mean cross entropy in nats, and the share of right answers."""
    model.eval()
    loss, right = 0.0, 0
    order = rows["attention_mask"].sum(1).argsort()  # rows of like length together: less padding
    for chosen in order.split(_EVAL_BATCH):
        batch = _cut({name: values[chosen] for name, values in rows.items()})
        logits = model(**{name: values for name, values in batch.items() if name != "labels"}).logits.float()
        loss += F.cross_entropy(logits, batch["labels"], reduction="sum").item()
        right += int((logits.argmax(-1) == batch["labels"]).sum())
    model.train()
    count = len(rows["labels"])
    return loss / count, right / count
