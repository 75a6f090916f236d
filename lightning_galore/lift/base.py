# SPDX-License-Identifier: Apache-2.0
"""What every way from a low-rank update to a weight update must do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor
from typing_extensions import Self

from lightning_galore.bases import StoredBases
from lightning_galore.config import GaLoreConfig
from lightning_galore.subspace import Projection


@dataclass(frozen=True, kw_only=True)
class Turned:
    """The wrapped optimizer's first moment before and after its coordinates changed, before this step's gradient.

    Args:
        old: The bases before, as they were kept.
        before: The moment in their coordinates, as the optimizer keeps it: its bias is not corrected.
        after: The same in the new coordinates.
        share: How much of it the next moment takes over, per share of the next gradient: ``beta1 / (1 - beta1)``.
    """

    old: StoredBases
    before: Tensor
    after: Tensor
    share: float


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a step has come to in low rank, with what a lift may make more of.

    Args:
        projection: The weight's geometry ``(m, n)``.
        bases: Of ``projection.basis_shapes``; none unless the lift needs them.
        low_update: What the wrapped optimizer added to the proxy, of ``projection.low_shape``: its direction, times
            minus the learning rate.
        low_grad: The gradient that it saw, of the same shape.
        grad: The full gradient ``(m, n)``, clipped and with a coupled decay in it, as ``low_grad``; but without what
            :meth:`Lift.left_over` added to that. None unless the lift needs it.
        scale: Factor on what is added to the weight (``scale``, ``shape_factor``).
        shrink: Factor on the weight, of a decoupled decay.
        lr: The learning rate of the weight's group; 1.0 where the wrapped optimizer finds its own.
        shape_factor: What corrects a learning rate that the wrapped optimizer adjusts to the shape of the proxy; it is
            in ``scale`` too.
        turned: What a new basis did to the first moment; None where nothing, or unless the lift asks for it.
        ascends: Whether the group maximizes, so that the weight goes along the gradient.
        entries: What the lift keeps for this weight from step to step, by name; it may change and add entries.
    """

    projection: Projection
    bases: tuple[Tensor, ...]
    low_update: Tensor
    low_grad: Tensor
    grad: Tensor | None = None
    scale: float = 1.0
    shrink: float = 1.0
    lr: float | Tensor = 1.0
    shape_factor: float = 1.0
    turned: Turned | None = None
    ascends: bool = False
    entries: dict[str, Tensor] = field(default_factory=dict)

    def add_back_(
        self,
        matrix: Tensor,  # (m, n)
        low: Tensor,  # projection.low_shape
        *,
        alpha: float,
        beta: float = 1.0,
    ) -> None:
        """``matrix`` becomes ``beta`` times itself and ``alpha`` times ``low`` as the bases lift it, rounded once."""
        self.projection.add_back_(matrix, low, self.bases, alpha=alpha, beta=beta)


class Lift(ABC):
    """Writes what the wrapped optimizer made of the low-rank gradient onto the weight.

    A subclass may use the full gradient too, and keep tensors for each weight. Holds nothing itself.
    """

    #: Whether :attr:`Update.grad` is wanted. Then mode "project", which frees it at once, is refused.
    needs_grad: ClassVar[bool] = False
    #: Whether :attr:`Update.bases` are wanted; if not they are not read for it, and it gets none.
    needs_bases: ClassVar[bool] = True
    #: Whether ``P P^T`` must be a projection, which it is for orthonormal bases only.
    needs_orthonormal: ClassVar[bool] = False
    #: Whether it compares channel by channel, which side "full" has none of.
    per_channel: ClassVar[bool] = False
    #: Whether :meth:`left_over` ever gives something.
    leaves_over: ClassVar[bool] = False
    #: Whether :attr:`Update.turned` is wanted.
    follows_moment: ClassVar[bool] = False
    #: Whether it takes the low-rank update as one matrix. Then weights in parts (FSDP2) are refused.
    needs_whole: ClassVar[bool] = False

    @classmethod
    def build(cls, config: GaLoreConfig) -> Self:
        """The lift with the settings that concern it."""
        return cls()

    @abstractmethod
    def apply_(
        self,
        weight: Tensor,  # (m, n)
        update: Update,
    ) -> None:
        """Multiply ``weight`` by ``update.shrink`` and add the update, in place, in its own dtype, rounded once."""

    def left_over(self, entries: Mapping[str, Tensor]) -> Tensor | None:
        """What earlier steps have left of their gradients ``(m, n)``, to be added to the next; None for nothing."""
        return None

    def kept_shapes(self, projection: Projection) -> dict[str, tuple[int, ...]]:
        """Shapes of the entries that it keeps for a weight: scalars in fp32 at least, others in the weight's dtype."""
        return {}
