# SPDX-License-Identifier: Apache-2.0
"""Engines that divide a model in ways which leave no matrix to project, or none that can be: refused by name.

FSDP1 and DeepSpeed's ZeRO flatten weights into vectors. An optimizer that looks for matrices would find none, and train
all of them at full rank without a word.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_galore import dtensors

_INSTEAD = "Use FSDP2 (GaLoreModelParallelStrategy, or torch's fully_shard), or DDP (GaLoreDDPStrategy)."
#: Lightning's strategies, by class name: a subclass counts too.
_STRATEGIES = {
    "DeepSpeedStrategy": "DeepSpeed flattens weights into vectors, which cannot be projected",
    "FSDPStrategy": "FSDP1 flattens weights into vectors, which cannot be projected",
    "XLAStrategy": "TPUs are not supported",
}


def check_parameters(params: Iterable[Tensor]) -> None:
    """Refuse parameters that another engine has flattened, or holds where they cannot be stepped.

    Raises:
        ValueError: With what to use instead.
    """
    for param in params:
        said = _odd(param)
        if said is not None:
            raise ValueError(f"A parameter of shape {tuple(param.shape)} {said}")


def _odd(param: Tensor) -> str | None:
    """What is wrong with a parameter, and the remedy; None if it is as it should be."""
    if hasattr(param, "ds_id") or hasattr(param, "ds_tensor"):
        return f"belongs to DeepSpeed's ZeRO, which holds it as a flat part of a vector. {_INSTEAD}"
    if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
        return f"belongs to FSDP1 (FullyShardedDataParallel), which flattens weights into vectors. {_INSTEAD}"
    if param.device.type == "xla":
        return "is on a TPU (xla), which is not supported: refreshes would compile anew each time. Use GPUs or CPUs."
    if dtensors.is_sharded(param):
        here, mesh = dtensors.local(param).device.type, param.device_mesh.device_type
        if here not in (mesh, "meta"):
            return (
                f"is kept on {here} and its mesh on {mesh} (CPU offload of FSDP2): what refreshes send and gather "
                "must be on the mesh's device. Leave offload_policy out; bases in int4 (basis_storage) and "
                "basis_placement='shard' save memory too."
            )
    return None


def check_model(model: nn.Module | None) -> None:
    """Refuse a model that FSDP1 has wrapped, or one that trains under a strategy of Lightning which flattens weights.

    Raises:
        ValueError: With what to use instead.
    """
    if model is None:
        return
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for name, module in model.named_modules():
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(
                f"{name or 'The model'} is wrapped in FullyShardedDataParallel (FSDP1), which flattens weights into "
                f"vectors. {_INSTEAD}"
            )
    strategy = getattr(getattr(model, "_trainer", None), "strategy", None)
    for cls in type(strategy).__mro__:
        if cls.__name__ in _STRATEGIES:
            raise ValueError(
                f"GaLoreOptimizer with strategy={type(strategy).__name__}: {_STRATEGIES[cls.__name__]}. {_INSTEAD}"
            )


def check_groups(groups: Sequence[Mapping[str, Any]], targets: Collection[Tensor]) -> None:
    """Refuse groups in which something else has taken the place of all projected weights.

    Args:
        groups: Param groups of a wrapped optimizer.
        targets: The weights that were chosen among them.

    Raises:
        RuntimeError: With what to use instead.
    """
    shown = [param for group in groups for param in group["params"]]
    if targets and shown and not any(param in targets for param in shown):
        raise RuntimeError(
            f"None of the {len(targets)} projected weights is in the param groups any more; the first parameter there "
            f"has shape {tuple(shown[0].shape)}. DeepSpeed's ZeRO puts flat vectors in their place, which cannot be "
            f"projected. {_INSTEAD}"
        )
