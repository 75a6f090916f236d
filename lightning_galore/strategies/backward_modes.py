# SPDX-License-Identifier: Apache-2.0
"""Wiring of modes "project" and "layerwise": which backward is the last of its step, and what clipping gets to see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from lightning_galore.config import GaLoreConfig, Mode
from lightning_galore.optimizer import GaLoreOptimizer


class BackwardModes(Strategy):
    """The part of every GaLore strategy that arms the hooks of its optimizers. Nothing of it acts in mode "step"."""

    config: GaLoreConfig
    _accumulating: bool = False
    # Whether the user has said for which optimizer a backward in manual optimization is.
    _declared: bool = False
    _armed_for_backward: GaLoreOptimizer | None = None

    def _galore_optimizers(self) -> list[GaLoreOptimizer]:
        return [optimizer for optimizer in self.optimizers if isinstance(optimizer, GaLoreOptimizer)]

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the closure as the last backward of its step: Lightning runs those of earlier micro-batches elsewhere."""
        if self.config.mode == "step":
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        if not isinstance(optimizer, GaLoreOptimizer):
            with self._backward_is_for(optimizer, last=True):
                return super().optimizer_step(optimizer, closure, model, **kwargs)
        hooks = optimizer.hooks

        module = self.lightning_module
        automatic = module is not None and module.automatic_optimization

        def last_closure() -> Any:
            with self._backward_is_for(optimizer, last=True, streams=automatic):
                result = closure()
            # Until the optimizer steps, a GradScaler and clipping look for gradients in its groups.
            hooks.expose(optimizer.param_groups)
            return result

        try:
            return super().optimizer_step(optimizer, last_closure, model, **kwargs)
        finally:
            hooks.unexpose()

    @contextmanager
    def layerwise_updates(self, optimizer: Optimizer) -> Iterator[None]:
        """Say which optimizer a backward in manual optimization is for, when there are several.

        Args:
            optimizer: What ``self.optimizers()`` gave.

        Example::

            with self.trainer.strategy.layerwise_updates(generator_optimizer):
                self.manual_backward(loss)
            generator_optimizer.step()
        """
        with self._backward_is_for(getattr(optimizer, "_optimizer", optimizer), last=not self._accumulating):
            yield

    @contextmanager
    def _backward_is_for(self, optimizer: Optimizer, *, last: bool, streams: bool = False) -> Iterator[None]:
        """Let a backward inside move the weights of this optimizer only, if it is the last one of its step."""
        self._disarm()
        before, self._declared = self._declared, True
        try:
            hooks = optimizer.hooks if isinstance(optimizer, GaLoreOptimizer) else None
            with hooks.arming(last, streams=streams) if hooks is not None else nullcontext():
                yield
        finally:
            self._declared = before

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Mark every backward of a step but the last, for gradient accumulation in manual optimization."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        """In manual optimization, let a plain ``manual_backward`` move the weights of the optimizer that it is for."""
        super().pre_backward(closure_loss)
        self._disarm()
        module = self.lightning_module
        if self.config.mode != "layerwise" or module is None or module.automatic_optimization:
            return
        if not self._accumulating and not self._declared:
            optimizer = the_one_in_training(self.optimizers)
            if isinstance(optimizer, GaLoreOptimizer) and not optimizer.hooks.held:
                self._armed_for_backward = optimizer
                optimizer.hooks.armed = True

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        except RuntimeError as error:
            if self.config.mode == "layerwise" and "modified by an inplace operation" in str(error):
                raise RuntimeError(
                    'mode="layerwise" moves weights in backward, so no graph made before may go backward after it. Run '
                    "the forward of each backward after the backward before it, mark all but the last backward of a "
                    'step with accumulate(), or use mode="project". (With fused_backward=True neither may a weight be '
                    "used outside its nn.Linear too.)"
                ) from error
            raise

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        self._disarm()
        super().post_backward(closure_loss)

    def _disarm(self) -> None:
        """Undo what :meth:`pre_backward` did; late, if a backward has raised."""
        if self._armed_for_backward is not None:
            self._armed_for_backward.hooks.armed = False
            self._armed_for_backward = None

    @override
    def setup_precision_plugin(self) -> None:
        """Let ``clip_gradients`` of a backward mode see what it may, wherever it is called from."""
        super().setup_precision_plugin()
        if self.config.mode != "step":
            guard_clipping(self.precision_plugin, self.config.mode)

    @override
    def teardown(self) -> None:
        self._remove_hooks()
        unguard_clipping(self.precision_plugin)
        super().teardown()

    def _remove_hooks(self) -> None:
        for optimizer in self._galore_optimizers():
            optimizer.detach()


def the_one_in_training(optimizers: Sequence[Optimizer]) -> Optimizer:
    """The optimizer whose parameters a backward in manual optimization is for.

    Raises:
        MisconfigurationException: If there are several whose parameters require gradients.
    """
    if len(optimizers) == 1:
        return optimizers[0]
    active = [
        optimizer
        for optimizer in optimizers
        if any(param.requires_grad for group in optimizer.param_groups for param in group["params"])
    ]
    if len(active) != 1:
        raise MisconfigurationException(
            f'mode="layerwise" with {len(optimizers)} optimizers: this backward may reach the parameters of several, '
            "and only those it is for may move. Wrap it in `with self.trainer.strategy.layerwise_updates(optimizer):`, "
            "call self.toggle_optimizer(optimizer) before it, pass a closure to optimizer.step(), or use "
            'mode="project".'
        )
    return active[0]


def guard_clipping(plugin: Precision, mode: Mode) -> None:
    """Replace the plugin's ``clip_gradients``, which would find no gradients and silently do nothing."""
    if "clip_gradients" in vars(plugin):
        return
    clip = plugin.clip_gradients

    def clip_gradients(
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        inner: Any = getattr(optimizer, "_optimizer", optimizer)
        if not isinstance(inner, GaLoreOptimizer) or clip_val <= 0:
            clip(inner, clip_val, gradient_clip_algorithm)
            return
        by_value = gradient_clip_algorithm == GradClipAlgorithmType.VALUE
        if mode == "layerwise":
            if by_value and inner.hooks.clip_value is not None:
                return  # done in the hooks
            raise MisconfigurationException(
                'mode="layerwise" has applied and freed the gradients: nothing is left to clip. Use mode="project".'
            )
        if by_value:
            raise MisconfigurationException(
                'mode="project" has only low-rank gradients, with other entries: clip by norm, or use mode="step".'
            )
        shown = inner.hooks.exposed
        inner.hooks.expose(inner.param_groups)
        try:
            clip(inner, clip_val, gradient_clip_algorithm)
        finally:
            if not shown:
                inner.hooks.unexpose()

    plugin.clip_gradients = clip_gradients  # type: ignore[method-assign]


def unguard_clipping(plugin: Precision) -> None:
    """Give the plugin its own ``clip_gradients`` back."""
    vars(plugin).pop("clip_gradients", None)
