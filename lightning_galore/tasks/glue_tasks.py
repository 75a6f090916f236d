# SPDX-License-Identifier: Apache-2.0
"""What the module and the data need to know about each GLUE task: one row a task."""

from dataclasses import dataclass
from typing import Literal, get_args

TaskName = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "demo"]
MetricName = Literal["accuracy", "f1", "mcc", "pearson", "spearman"]

#: Other names of the same column, from the original releases of the data sets (lower case).
COLUMN_ALIASES: dict[str, tuple[str, ...]] = {
    "label": ("gold_label", "quality", "is_duplicate", "score"),
    "sentence1": ("#1 string",),
    "sentence2": ("#2 string",),
    "premise": ("sentence1",),
    "hypothesis": ("sentence2",),
}


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """One task: its columns, its labels and how it is scored."""

    name: str
    text: tuple[str, ...]  # one column, or two for a sentence pair
    labels: tuple[str, ...]  # in the order of the class index; empty for a regression
    metrics: tuple[MetricName, ...]  # the first one is the task's published metric
    validation: tuple[str, ...] = ("validation",)
    test: tuple[str, ...] = ("test",)
    headerless: tuple[tuple[str, ...], ...] = ()  # column names of files that come without a header

    @property
    def num_labels(self) -> int:
        """Width of the classifier's output: the number of classes, 1 for a regression."""
        return len(self.labels) or 1

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number instead of a class."""
        return not self.labels

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What is appended to the logged names, one a validation split: ``("",)`` or ``("_matched", ...)``."""
        return tuple(split.removeprefix("validation") for split in self.validation)

    @property
    def monitor(self) -> str:
        """The logged name of the published metric, for ``ModelCheckpoint(monitor=...)``."""
        return f"val/{self.metrics[0]}{self.suffixes[0]}"


_PAIR = ("sentence1", "sentence2")

_ROWS = (
    GlueTask(
        name="cola",
        text=("sentence",),
        labels=("unacceptable", "acceptable"),
        metrics=("mcc", "accuracy"),
        headerless=(("source", "label", "mark", "sentence"),),
    ),
    GlueTask(
        name="sst2",
        text=("sentence",),
        labels=("negative", "positive"),
        metrics=("accuracy",),
        headerless=(("sentence", "label"),),
    ),
    GlueTask(
        name="mrpc",
        text=_PAIR,
        labels=("not_equivalent", "equivalent"),
        metrics=("f1", "accuracy"),
        headerless=(("label", "id1", "id2", "sentence1", "sentence2"),),
    ),
    GlueTask(name="stsb", text=_PAIR, labels=(), metrics=("pearson", "spearman")),
    GlueTask(
        name="qqp", text=("question1", "question2"), labels=("not_duplicate", "duplicate"), metrics=("accuracy", "f1")
    ),
    GlueTask(
        name="mnli",
        text=("premise", "hypothesis"),
        labels=("entailment", "neutral", "contradiction"),
        metrics=("accuracy",),
        validation=("validation_matched", "validation_mismatched"),
        test=("test_matched", "test_mismatched"),
    ),
    GlueTask(
        name="qnli", text=("question", "sentence"), labels=("entailment", "not_entailment"), metrics=("accuracy",)
    ),
    GlueTask(
        name="rte",
        text=_PAIR,
        labels=("entailment", "not_entailment"),
        metrics=("accuracy",),
        headerless=(("index", "sentence1", "sentence2", "label"),),
    ),
    GlueTask(name="wnli", text=_PAIR, labels=("not_entailment", "entailment"), metrics=("accuracy",)),
    GlueTask(
        name="demo",
        text=("sentence",),
        labels=("negative", "positive"),
        metrics=("accuracy",),
        headerless=(("sentence", "label"),),
    ),
)

TASKS: dict[str, GlueTask] = {task.name: task for task in _ROWS}


def get_task(name: str) -> GlueTask:
    """Look a task up by its name.

    Raises:
        ValueError: If there is no such task; the message lists those that exist.
    """
    if name not in TASKS:
        raise ValueError(f"task={name!r} is not known. Choose one of: {', '.join(get_args(TaskName))}.")
    return TASKS[name]
