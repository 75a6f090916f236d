# SPDX-License-Identifier: Apache-2.0
"""Stand-ins without data: a copy of a module, a batch, and its training step, of which nothing is allocated."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from lightning_galore.storage import Int8Tensor

Loop = Literal["lightning", "plain"]
Step: TypeAlias = Callable[[nn.Module, Any], Tensor]

#: What a precision of Lightning's Trainer makes of the weights, and of the operations.
PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "64-true": (torch.float64, None),
    "32-true": (torch.float32, None),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained: a module, what it is fed and how its loss comes about.

    Args:
        name: For people.
        module: On any device, the meta device too; it is never changed.
        batch: One batch as the step takes it, on any device; None when nothing is known of it.
        step: Makes the loss of a batch; :func:`training_loss` by default.
        precision: A key of ``PRECISIONS``; None leaves the module's dtypes as they are.
        micro_batches: Backward passes before each step.
        loop: When gradients are cleared. ``lightning``: between forward and backward, as Lightning's Trainer does, so
            that those of the last step are alive in the forward pass. ``plain``: right after the step.
    """

    name: str
    module: nn.Module
    batch: Any
    step: Step
    precision: str | None = None
    micro_batches: int = 1
    loop: Loop = "lightning"

    @property
    def dtypes(self) -> tuple[torch.dtype | None, torch.dtype | None]:
        """That of the weights, and that of autocast."""
        if self.precision is None:
            return None, None
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision={self.precision!r} is not known to the planner; choose one of {', '.join(PRECISIONS)}."
            )
        return PRECISIONS[self.precision]

    def autocast(self) -> AbstractContextManager[Any]:
        """What a mixed precision runs the forward pass in."""
        dtype = self.dtypes[1]
        return torch.autocast("cpu", dtype=dtype) if dtype is not None else nullcontext()


def fake_mode() -> FakeTensorMode:
    """Tensors made inside have a shape, a dtype and the device "cpu", and no memory."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_copy(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> nn.Module:
    """A deep copy of a module whose parameters and buffers are fakes; parameters that are shared stay shared.

    Args:
        module: On any device.
        mode: Makes the fakes.
        dtype: Of floating-point parameters and buffers; None keeps theirs.
    """
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        # Int8 weights of an earlier run begin as what they stand for: a candidate decides anew.
        fake: Tensor = fake_tensor(tensor, mode, dtype if tensor.is_floating_point() else None)
        if isinstance(tensor, (nn.Parameter, Int8Tensor)):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = fake
    copied = copy.deepcopy(module, memo)
    # The mode remembers weakly what it has made of a shape for the first time, and int8 weights swap parameters that
    # nothing may refer to.
    mode.fake_tensor_converter.tensor_memo.clear()
    return copied


def fake_tensor(tensor: Tensor, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> Tensor:
    """One of the same shape and strides without memory."""
    with mode:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=dtype or tensor.dtype, device="cpu")


def fake_batch(batch: Any, mode: FakeTensorMode) -> Any:
    """A batch with fakes in place of its tensors."""
    return tree_map_only(Tensor, lambda tensor: fake_tensor(tensor, mode), batch)


def training_loss(module: nn.Module, batch: Any) -> Tensor:
    """The loss of one batch: ``training_step`` of a LightningModule, ``.loss`` of a Transformers model, else the sum.

    Args:
        module: Is called with a mapping as keywords, with a list or tuple as arguments, with anything else as it is.
        batch: What it is fed.
    """
    training_step = getattr(module, "training_step", None)
    if training_step is not None:
        return loss_in(training_step(batch, 0))
    if isinstance(batch, Mapping):
        return loss_in(module(**batch))
    return loss_in(module(*batch) if isinstance(batch, (list, tuple)) else module(batch))


def loss_in(output: Any) -> Tensor:
    """The loss in what a training step returns, 0-D.

    Raises:
        ValueError: If there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if isinstance(loss, (list, tuple)) and loss:
        loss = loss[0]
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"The training step gave {type(output).__name__}, in which there is no loss. Pass step=, a function of the "
            "module and the batch that returns the loss."
        )
    return loss if loss.ndim == 0 else loss.sum()


@contextmanager
def quietly() -> Iterator[None]:
    """Without the advice that a module gives which is not in a Trainer, and the random numbers it may draw."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _taken_for_real():
        warnings.filterwarnings("ignore", message=r"You are trying to `self\.log")
        warnings.filterwarnings("ignore", message=".*stay as they are")
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable.* is deprecated")
        yield


@contextmanager
def _taken_for_real() -> Iterator[None]:
    """Let Transformers take fakes for what they stand for: for fakes it makes attention masks that it else leaves out.

    A mask turns torch's fused attention into another kernel, with other temporaries.
    """
    module = sys.modules.get("transformers.utils.import_utils")
    if module is None or not hasattr(module, "is_fake_tensor"):  # older versions do not ask
        yield
        return
    with patch.object(module, "is_fake_tensor", lambda value: False):
        yield
