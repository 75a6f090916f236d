# SPDX-License-Identifier: Apache-2.0
"""Modes "project" and "layerwise": hooks that consume each gradient in backward, as soon as it is complete.

A *window* is what one optimizer step sees: one backward, or several under gradient accumulation. The bases never change
inside a window. A weight whose refresh is due keeps its full gradient until the window's last backward, so that its new
basis comes from the whole window's gradient; every other gradient is projected and freed at once.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_galore.coordinates import Coordinates
from lightning_galore.distributed import OrderedAverage, Team
from lightning_galore.grad_norms import GradNorms
from lightning_galore.linalg import without_autocast
from lightning_galore.low_grad import LowGrad


class Consumer(Protocol):
    """What the hooks ask of the optimizer that they belong to."""

    def is_target(self, param: Tensor) -> bool:
        """Whether the weight is projected."""

    def is_due(self, param: Tensor) -> bool:
        """Whether the weight's next step refreshes its basis."""

    def waits(self, param: Tensor) -> bool:
        """Whether the weight's next step wants the gradient of the whole window."""

    def prepare(self, param: Tensor, *, due: bool) -> LowGrad:
        """Project ``param.grad``, with a new basis if one is due."""

    def is_fused(self, param: Tensor) -> bool:
        """Whether the weight's next step wants only the low-rank coordinates of its gradient, of bases that it has."""

    def coordinates(self, param: Tensor) -> Coordinates:
        """What the weight is projected with."""

    def prepare_low(self, param: Tensor, low: Tensor) -> LowGrad:
        """A low-rank gradient whose full one nobody has seen."""

    def move(self, param: Tensor, low_grad: LowGrad | None) -> None:
        """Update one parameter now: from its low-rank gradient, or from ``param.grad`` if it is not projected."""


class GradientHooks:
    """Post-accumulate-grad hooks on an optimizer's parameters, and the low-rank gradients that wait for its step.

    Args:
        consumer: The optimizer; held weakly, so that hooks left on parameters do not keep it alive.
        layerwise: Update each parameter in the hook, instead of in ``step``.
    """

    def __init__(self, consumer: Consumer, *, layerwise: bool) -> None:
        self._consumer = weakref.ref(consumer)
        self.layerwise = layerwise
        # Clamp each entry of a gradient to this before anything else (layerwise, where nobody else can).
        self.clip_value: float | None = None
        self.waiting: dict[Tensor, LowGrad] = {}
        # Whether the backward that runs now is the last of its window. A plain training loop has one backward a step.
        self.armed = True
        # Whether someone has said that it is not.
        self.held = False
        self._warned = self._warned_of_another = False
        self._due: dict[Tensor, bool] = {}
        self._fused: dict[Tensor, bool] = {}
        self._moved: dict[Tensor, None] = {}  # an ordered set, so that sums over it repeat
        self.norms = GradNorms()
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._removed = False
        # Where several processes train one model: what this window has gathered is averaged before it is used.
        self.team: Team | None = None
        # Whether refreshes wait for the step, where processes share them out: each holds a part of every gradient.
        self.defers = False
        # Whether a parameter's gradient is whole after this one backward, so that it can travel while that goes on.
        self.streams = False
        self._average: OrderedAverage | None = None
        self._settled = False
        self._exposed: list[tuple[dict[str, Any], list[Tensor]]] | None = None

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def install(self, params: list[Tensor]) -> None:
        """Hook the parameters that require a gradient and have no hook yet (frozen ones come later)."""
        owner = weakref.ref(self)

        def hook(param: Tensor) -> None:
            hooks = owner()
            if hooks is not None:
                hooks.on_grad(param)

        for param in params:
            if param.requires_grad and param not in self._handles and not self._removed:
                self._handles[param] = param.register_post_accumulate_grad_hook(hook)

    def attach(self, params: list[Tensor]) -> None:
        """Hook the parameters of an optimizer whose hooks may have been removed by an earlier run."""
        self._removed = False
        self.install(params)

    def remove(self) -> None:
        """Take all hooks off until :meth:`attach`, and forget what waits."""
        self._removed = True
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self.reset()

    def reset(self) -> None:
        """Begin a new window: what waits is dropped, refreshes included."""
        self.unexpose()
        self.waiting.clear()
        self.end_window()

    def end_window(self) -> None:
        """The step has been taken, or skipped."""
        if self._average is not None:
            self._average.drop()
        self._average, self._settled = None, False
        self._due.clear()
        self._fused.clear()
        self._moved.clear()
        self.norms.clear()

    @contextmanager
    def arming(self, armed: bool, *, streams: bool = False) -> Iterator[None]:
        """Say whether a backward inside is the last of its window, and whether it is the only one inside."""
        before = self.armed, self.held, self.streams
        self.armed, self.held, self.streams = armed, not armed, streams
        try:
            yield
        finally:
            self.armed, self.held, self.streams = before

    @torch.no_grad()
    def on_grad(self, param: Tensor) -> None:
        """Consume ``param.grad``, which is complete for this backward."""
        consumer = self._consumer()
        if consumer is None:
            return
        if param.grad is None:
            self._warn_of_another(param)
            return
        with without_autocast(param.device):
            self._consume(param, consumer)

    def _warn_of_another(self, param: Tensor) -> None:
        if not self._warned_of_another:
            self._warned_of_another = True
            warnings.warn(
                f"The gradient of a parameter of shape {tuple(param.shape)} had been taken before this optimizer saw "
                "it, so it does not move here. Another GaLoreOptimizer of the same parameters does that, in the "
                "backward modes: call its detach(), or delete it.",
                stacklevel=2,
            )

    def _consume(self, param: Tensor, consumer: Consumer) -> None:
        assert param.grad is not None
        if self.team is not None and param.grad.is_sparse:
            raise ValueError(
                f"A parameter of shape {tuple(param.shape)} has a sparse gradient, which is not averaged over several "
                'devices here: make it dense (nn.Embedding(sparse=False)), or use mode="step".'
            )
        self._check_first(param)
        target, moves = consumer.is_target(param), self.layerwise and self.armed
        travels = self.team is not None and self.armed and (moves or self.streams)
        if target and not moves and self.clip_value is not None:
            raise RuntimeError(
                f"Gradients are clipped by value to {self.clip_value}, but this backward is not the last one of its "
                'step: mode="layerwise" adds up low-rank gradients, whose entries cannot be clipped. Use mode="step".'
            )
        keeps_full = target and self._keeps_full(param, consumer)
        if travels:
            low_grad = self._project(param, consumer) if target and not keeps_full else None
            self._averages().put(param, param.grad if low_grad is None else low_grad.grad)
            return
        if keeps_full or not (target or moves):
            return
        self.norms.note(param, param.grad, exact=self.team is None)
        if moves and self.clip_value is not None:
            param.grad.clamp_(-self.clip_value, self.clip_value)
            self.norms.note_clamped(param, param.grad)
        low_grad = self._project(param, consumer) if target else None
        if moves:
            self._move(param, low_grad, consumer)
        elif low_grad is not None:
            low_grad.wait()

    # -- low-rank gradients that layers make themselves ----------------------------------------------------------------

    def fuses(self, param: Tensor) -> bool:
        """Whether a layer shall make the low-rank gradient itself in this window; asked by its forward pass."""
        consumer = self._consumer()
        if consumer is None or not consumer.is_target(param):  # what functional_call puts in its place, for a while
            return False
        if param not in self._fused:
            self._fused[param] = not self._removed and consumer.is_fused(param)
        return self._fused[param]

    def coordinates(self, param: Tensor) -> Coordinates:
        """What the weight is projected with in this window."""
        consumer = self._consumer()
        assert consumer is not None
        return consumer.coordinates(param)

    @torch.no_grad()
    def on_low_grad(self, param: Tensor, low: Tensor) -> None:
        """Take a low-rank gradient, complete for this backward, in place of the full one."""
        consumer = self._consumer()
        if consumer is None or self._removed:
            return
        self._check_first(param)
        with without_autocast(param.device):
            waits = self.waiting.get(param)
            low_grad = consumer.prepare_low(param, low) if waits is None else waits
            if waits is not None:
                waits.add_low_(low)
            self.waiting[param] = low_grad
            moves = self.layerwise and self.armed
            self.norms.settle(param, None, exact=False)
            if self.team is not None and self.armed and (moves or self.streams):
                self._averages().put(param, low_grad.grad)
            elif moves:
                self._move(param, low_grad, consumer)
            else:
                low_grad.wait()

    def _check_first(self, param: Tensor) -> None:
        """Refuse a gradient of what has been moved or sent in this window."""
        if param in self._moved or (self._average is not None and self._average.has(param)):
            consumed, other = "sent to the other processes", "step"
            if self.layerwise:
                consumed, other = 'updated in this step (mode="layerwise")', "project"
            raise RuntimeError(
                f"A parameter of shape {tuple(param.shape)} got a second gradient after it was {consumed}. Reentrant "
                "activation checkpointing and a second backward before step() do that: use "
                "checkpoint(use_reentrant=False), mark all but the last backward of a step with accumulate(), or use "
                f'mode="{other}". (With fused_backward=True so does a weight that is used outside its nn.Linear too.)'
            )

    def _keeps_full(self, param: Tensor, consumer: Consumer) -> bool:
        """Whether a refresh, or a look at the gradient's energy, must wait for the window's last backward."""
        if param not in self._due:
            self._due[param] = consumer.is_due(param)
        # Where there are several processes, until their gradients have been averaged, or shared out.
        later = not self.armed or self.team is not None or self.defers
        return later and param not in self.waiting and consumer.waits(param)

    def _project(self, param: Tensor, consumer: Consumer) -> LowGrad:
        """Add to the weight's low-rank gradient and free the full one."""
        assert param.grad is not None
        low_grad = self.waiting.get(param)
        if low_grad is None:
            low_grad = self.waiting[param] = consumer.prepare(param, due=self._due[param])
        else:
            if low_grad.refresh is not None and low_grad.refresh.due and not self._warned:
                self._warned = True
                warnings.warn(
                    f"{low_grad.target.name} got another gradient after its basis was found from the first one of this "
                    "step, which alone decides it. Reentrant activation checkpointing and several backwards a step do "
                    "that: use checkpoint(use_reentrant=False), or mark all but the last backward with accumulate().",
                    stacklevel=2,
                )
            low_grad.add_(param.grad)
        param.grad = None
        return low_grad

    def _move(self, param: Tensor, low_grad: LowGrad | None, consumer: Consumer) -> None:
        """Update the parameter now; nothing of its gradient stays but the norm."""
        self._moved[param] = None
        self.waiting.pop(param, None)
        if low_grad is not None and not self.norms.is_exact(param):
            self.norms.settle(param, low_grad.grad, exact=False)
        consumer.move(param, low_grad)
        param.grad = None

    # -- several processes ---------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Average over the processes what this window has gathered, once; every process calls it at the same point.

        In mode "layerwise" that moves the parameters which have not moved yet.
        """
        if self.team is None or self._settled:
            return
        self._settled = True
        order, average = self._order(), self._averages()
        with without_autocast(order[0].device if order else torch.device("cpu")), torch.no_grad():
            for param in order:
                low_grad = self.waiting.get(param)
                own = param.grad if low_grad is None else low_grad.grad
                if own is not None and not average.has(param):
                    average.put(param, own)
            for param in average.finish(self._zeros):
                self.waiting.pop(param, None)
                param.grad = None
        self._average = None

    def _order(self) -> list[Tensor]:
        """All hooked parameters, in about the order in which backward reaches them, alike on every process."""
        return list(reversed(self._handles))

    def _averages(self) -> OrderedAverage:
        if self._average is None:
            assert self.team is not None
            self._average = OrderedAverage(self.team, self._order(), done=self._averaged)
        return self._average

    def _averaged(self, param: Tensor) -> None:
        consumer = self._consumer()
        if not self.layerwise or consumer is None:
            return
        low_grad = self.waiting.get(param)
        self.norms.settle(param, param.grad if low_grad is None else None, exact=low_grad is None)
        if low_grad is None:  # its full gradient has been averaged
            low_grad = self._project(param, consumer) if consumer.is_target(param) else None
        self._move(param, low_grad, consumer)

    def _zeros(self, param: Tensor) -> Tensor:
        """What stands for a gradient that this process has not got, of the shape that the others send."""
        consumer = self._consumer()
        param.grad = torch.zeros_like(param)
        if consumer is None or not consumer.is_target(param) or self._keeps_full(param, consumer):
            return param.grad
        return self._project(param, consumer).grad

    # -- norms ---------------------------------------------------------------------------------------------------------

    def grad_norm(self, groups: Sequence[Mapping[str, Any]]) -> Tensor:
        """Norm of all gradients of this window, 0-D: those still held, those waiting, and those already consumed."""
        self.settle()
        params = [param for group in groups for param in group["params"]]  # proxies and the residual, while exposed
        grads, residual = [param.grad for param in params if param.grad is not None], None
        if self._exposed is None:
            grads += [low_grad.grad for low_grad in self.waiting.values()]
            residual = self.norms.residual_sq(self.waiting)
        return self.norms.total(grads, self._moved, residual)

    # -- showing what waits --------------------------------------------------------------------------------------------

    @property
    def exposed(self) -> bool:
        """Whether the groups show proxies now."""
        return self._exposed is not None

    def expose(self, groups: Sequence[dict[str, Any]]) -> None:
        """Put the waiting proxies into the groups, so that a GradScaler unscales them and clipping sees the true norm.

        One more parameter carries the norm of what projecting left out; only its gradient is ever looked at.

        Args:
            groups: The optimizer's param groups; :meth:`unexpose` puts them back.
        """
        self.settle()
        if self._exposed is not None or not self.waiting:
            return
        self._exposed = [(group, group["params"]) for group in groups]
        for group in groups:
            shown = [self.waiting[param].proxy if param in self.waiting else param for param in group["params"]]
            group["params"] = shown
        residual = self.norms.residual_sq(self.waiting)
        if residual is not None:
            norm = self.norms.carrier(residual.sum().sqrt())
            carrier = nn.Parameter(torch.zeros_like(norm))
            carrier.grad = norm
            groups[0]["params"] = [*groups[0]["params"], carrier]

    def unexpose(self) -> None:
        """Undo :meth:`expose`."""
        for group, params in self._exposed or ():
            group["params"] = params
        self._exposed = None
