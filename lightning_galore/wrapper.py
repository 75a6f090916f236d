# SPDX-License-Identifier: Apache-2.0
"""An optimizer around another one: it owns nothing, and passes for the one that it wraps."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override


class OptimizerWrapper(Optimizer):
    """Shares ``param_groups``, ``state``, ``defaults`` and step hooks with the wrapped optimizer.

    As torch's own ``PostLocalSGDOptimizer`` does, but the instance's class also derives from the wrapped one's:
    callbacks and user code that ask ``isinstance(optimizer, torch.optim.SGD)`` go on working, as with Lightning's
    LightningOptimizer.

    Args:
        base: The wrapped optimizer.
    """

    # The GradScaler asks this before it lets a fused optimizer unscale by itself. It would hand the scale to this
    # object, and base would never see it: so it has to unscale as for any other optimizer.
    _step_supports_amp_scaling = False

    def __init__(self, base: Optimizer) -> None:
        # No super().__init__(), which would make groups, state and hooks of its own.
        name = f"GaLore{type(base).__name__}"
        self.__class__ = type(name, (type(self), type(base)), {"__doc__": type(self).__doc__})
        self.base = base
        self._patch_step_function()

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer, under the name by which Lightning's LearningRateMonitor unwraps one."""
        return self.base

    @property  # type: ignore[explicit-override]  # of the setter, which cannot be decorated so
    @override
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's groups, with the real parameters. Never cached: torch rebinds the list on load."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups
        self._groups_changed()

    @property
    @override
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """The wrapped optimizer's state by real parameter."""
        return cast("dict[Tensor, Any]", self.base.state)

    @property
    @override
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's defaults."""
        return self.base.defaults

    def __getattr__(self, name: str) -> Any:
        if name == "base" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self.base, name)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict: tensors and numbers only, so it loads with ``weights_only=True``."""
        return self.base.state_dict()

    def _groups_changed(self) -> None:
        """Called when the list of groups has been replaced."""
