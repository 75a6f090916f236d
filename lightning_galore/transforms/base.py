# SPDX-License-Identifier: Apache-2.0
"""What every transform of gradients must do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from typing_extensions import Self

from lightning_galore.change import Change
from lightning_galore.config import GaLoreConfig


class Transform(ABC):
    """Changes each gradient that the wrapped optimizer is about to see.

    Of a projected weight that is the low-rank gradient, of another parameter the gradient itself: in every mode, after
    ``clip_weight_norm`` and before a coupled weight decay joins it. Holds no state: what it remembers of a weight is
    handed in and out, and saved with the optimizer. Never waits for the device.
    """

    #: Whether it wants the wrapped optimizer's second moment.
    needs_second: ClassVar[bool] = False
    #: Whether parameters that are not projected stay as they are.
    projected_only: ClassVar[bool] = False

    @classmethod
    def build(cls, config: GaLoreConfig) -> Self:
        """The transform with the settings that concern it."""
        return cls()

    @abstractmethod
    def apply_(self, grad: Tensor, entries: Mapping[str, Tensor], *, second: Tensor | None) -> dict[str, Tensor]:
        """Change ``grad`` in place.

        Args:
            grad: What the wrapped optimizer will see.
            entries: What was remembered of this weight, by name; empty at its first step. It must not be changed: the
                step may still fail.
            second: The wrapped optimizer's second moment, of the shape of ``grad``, with the bias of its start; None
                before its first step, after a restart, and where it is not wanted.

        Returns:
            What to remember, all of it: new tensors of :meth:`kept_shapes`.
        """

    def carried(self, entries: Mapping[str, Tensor], change: Change | None) -> Mapping[str, Tensor]:
        """What was remembered, when the basis has changed.

        Args:
            entries: As :meth:`apply_` gave them.
            change: From the old coordinates to the new ones; None if there is no such thing (bases that are not
                orthonormal).
        """
        return entries

    def kept_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of what is remembered of a gradient of ``shape``.

        Scalars are kept in fp32 at least, others in the weight's dtype.
        """
        return {}
