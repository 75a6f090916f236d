# SPDX-License-Identifier: Apache-2.0
"""A causal language model as a LightningModule that knows nothing of GaLore: pre-trained or fine-tuned."""

from typing import Any, cast

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_galore.named_optimizers import named_optimizer
from lightning_galore.tasks.causal_models import causal_network
from lightning_galore.tasks.lora import with_lora
from lightning_galore.tasks.optimizing import decay_groups
from lightning_galore.tasks.schedules import check_schedule, with_schedule
from lightning_galore.tasks.tokenizing import largest_id

IGNORED = -100  # the label of a token that is not predicted, as Transformers and torch have it


class CausalLMModule(LightningModule):
    """A causal language model, trained to predict the next token.

    The network is made in ``configure_model``: nothing is loaded before a run (or ``load_from_checkpoint``) needs it,
    and it is made directly in the run's precision and on its device. Random weights are drawn from the global seed
    alone, so that two runs under one seed start from equal weights.

    It logs ``train/loss``, ``train/tokens`` (seen so far, on all devices), ``val/loss`` (the mean over tokens) and
    ``val/perplexity``.

    Args:
        model: A size of the GaLore paper with random weights (``"60m"``, ``"130m"``, ``"350m"``, ``"1b"``, ``"7b"``),
            or the folder or hub name of any causal language model, with its weights.
        config: Changes to the model's configuration, as ``{hidden_size: 192, num_hidden_layers: 4}``.
        from_scratch: Draw the weights of a model by folder or hub name instead of loading them.
        lr: Peak learning rate.
        betas: Decay rates of the moments.
        eps: Added to the denominator of the update.
        weight_decay: Decoupled weight decay; normalisation weights and biases get none.
        warmup_ratio: Share of the steps in which the learning rate rises.
        min_lr_ratio: What it falls to by the end of the run along a ``cosine``, of the peak.
        optimizer: By name, as ``"adamw8bit"``, or by class, as ``"torch.optim.NAdam"``: takes ``lr``, ``betas`` and
            ``eps`` where it has them. A callable on the parameter groups (in YAML a class with settings of its own)
            replaces them.
        lr_scheduler: By name: ``linear``, ``cosine`` and ``polynomial`` (down to 0 or ``min_lr_ratio`` over the run),
            ``constant``, ``constant_with_warmup``, ``inverse_sqrt``. Any scheduler as a callable on the optimizer (in
            YAML its class with its settings), which replaces ``warmup_ratio`` and is stepped after each optimizer step.
        lora_rank: Freeze the network and train LoRA's factors of this rank beside its linear layers (``peft``;
            ``lora_alpha`` is the rank). 0 trains the whole network.
        checkpointing: Recompute activations in backward: about a third more time for much less memory.
        vocab_size: Rows of the word embeddings, where a tokenizer is trained on the text. From the command line that of
            the data.

    Example:
        >>> module = CausalLMModule(model="60m", config={"num_hidden_layers": 2}, lr=0.01)
        >>> module.model
        '60m'
    """

    def __init__(
        self,
        model: str,
        config: dict[str, Any] | None = None,
        from_scratch: bool = False,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.1,
        min_lr_ratio: float = 0.1,
        optimizer: str | OptimizerCallable = "adamw",
        lr_scheduler: str | LRSchedulerCallable = "cosine",
        lora_rank: int = 0,
        checkpointing: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        # A callable would be pickled into the checkpoint, which torch then refuses to load as weights only.
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        for name, value, end in (("warmup_ratio", warmup_ratio, 1), ("min_lr_ratio", min_lr_ratio, 1.000001)):
            if not 0 <= value < end:
                raise ValueError(f"{name}={value} must be a share between 0 and 1.")
        self.model = model
        self.config = {**(config or {}), **({} if vocab_size is None else {"vocab_size": vocab_size})}
        self.from_scratch, self.checkpointing, self.lora_rank = from_scratch, checkpointing, lora_rank
        self.warmup_ratio, self.min_lr_ratio, self.weight_decay = warmup_ratio, min_lr_ratio, weight_decay
        check_schedule(lr_scheduler)
        self.lr_scheduler = lr_scheduler
        if isinstance(optimizer, str):
            optimizer = named_optimizer(optimizer, lr=lr, betas=betas, eps=eps)
        self.make_optimizer = optimizer
        self.net: nn.Module | None = None
        # Weighted by tokens; its exponential is the perplexity. torchmetrics' Perplexity would go over all logits anew.
        self.mean_loss = MeanMetric()
        self.tokens_seen = 0

    @override
    def configure_model(self) -> None:
        """Make the network; a second call does nothing."""
        if self.net is not None:
            return
        with torch.random.fork_rng():
            torch.manual_seed(torch.initial_seed())
            net: Any = causal_network(self.model, self.config, from_scratch=self.from_scratch)
            net = with_lora(net, self.lora_rank, task_type="CAUSAL_LM")
        if self.checkpointing:
            # Transformers 5 has another name for it, and warns of the old one.
            enable = getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.net = net.train()

    @override
    def forward(self, **batch: Tensor) -> Any:
        """Run the network; with ``labels`` in the batch the output has a ``loss``, the mean over its tokens."""
        if self.net is None:
            raise RuntimeError("CausalLMModule has no network yet: call configure_model(), as the Trainer does, first.")
        return self.net(**batch)

    @override
    def on_fit_start(self) -> None:
        """Check the data's tokens."""
        self._check_tokens()

    @override
    def on_validation_start(self) -> None:
        """Check the data's tokens."""
        self._check_tokens()

    @override
    def on_test_start(self) -> None:
        """Check the data's tokens."""
        self._check_tokens()

    def _check_tokens(self) -> None:
        """Every token must be a row of the embeddings: on a GPU the error that else follows cannot be read."""
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is None:
            return
        rows, largest = cast("Any", self.net).get_input_embeddings().num_embeddings, largest_id(tokenizer)
        if largest >= rows:
            raise ValueError(
                f"The tokenizer has tokens up to {largest}, but model={self.model!r} has embeddings for {rows}: set "
                f"model.config={{vocab_size: {largest + 1}}}, or name the model's own tokenizer with "
                "data.tokenizer_name=..."
            )

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One step's loss."""
        loss = self(**batch).loss
        # Blocks are full. Of padded batches the padding counts, and other devices' batches are taken to be as long: to
        # know better every step would have to wait for the device.
        self.tokens_seen += batch["input_ids"].numel() * self.trainer.world_size
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/tokens", float(self.tokens_seen))
        return loss

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score one batch."""
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score one batch."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: dict[str, Tensor]) -> None:
        loss = self(**batch).loss
        self.mean_loss.update(loss, (batch["labels"][:, 1:] != IGNORED).sum())
        self.log(f"{stage}/loss", self.mean_loss, prog_bar=True, on_epoch=True, batch_size=len(batch["labels"]))

    @override
    def on_validation_epoch_end(self) -> None:
        """Log the perplexity."""
        self.log("val/perplexity", self.mean_loss.compute().exp(), prog_bar=True)

    @override
    def on_test_epoch_end(self) -> None:
        """Log the perplexity."""
        self.log("test/perplexity", self.mean_loss.compute().exp(), prog_bar=True)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the count of tokens."""
        checkpoint["tokens_seen"] = self.tokens_seen

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the count of tokens."""
        self.tokens_seen = checkpoint.get("tokens_seen", 0)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer in two groups, with and without decay, and its schedule over the whole run."""
        optimizer = self.make_optimizer(decay_groups(self, self.weight_decay))
        return with_schedule(
            self,
            optimizer,
            self.lr_scheduler,
            warmup_ratio=self.warmup_ratio,
            monitor="val/loss",
            min_lr_ratio=self.min_lr_ratio,
        )
