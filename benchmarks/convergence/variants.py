# SPDX-License-Identifier: Apache-2.0
"""What is compared: one row a variant, and how each kind of row becomes an optimizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.convergence.model import matrices
from lightning_galore import GaLoreConfig, GaLoreOptimizer

BETAS = (0.9, 0.99)
EPS = 1e-8
DENSE_LR = 3e-3
GAP = 50  # eight refreshes in a run of 400 steps
BASELINE = "plain"  # what the others are compared with, seed by seed

Kind = Literal["adamw", "muon", "soap", "galore-torch", "galore"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the comparison.

    Args:
        kind: Who makes the optimizer; ``galore`` is this package.
        settings: For ``galore`` those of :class:`~lightning_galore.GaLoreConfig`, on top of the rank, ``scale=1`` and
            the gap ``GAP``.
        text: What it is, for the table's reader.
        moments_in_8bit: Whether bitsandbytes' AdamW8bit is wrapped instead of torch's AdamW; for ``galore``.
        bf16: Whether all weights are in bf16 alone.
        sgd: Whether torch's SGD is wrapped instead, over the matrices alone, with AdamW for the others; for ``galore``.
    """

    kind: Kind
    settings: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    moments_in_8bit: bool = False
    bf16: bool = False
    sgd: bool = False

    @property
    def optional(self) -> dict[str, Any]:
        """The fields that few variants have, where they have them: older runs know nothing of them."""
        return {name: True for name in ("moments_in_8bit", "bf16", "sgd") if getattr(self, name)}


def _galore(
    text: str, *, moments_in_8bit: bool = False, bf16: bool = False, sgd: bool = False, **settings: Any
) -> Variant:
    return Variant(kind="galore", settings=settings, text=text, moments_in_8bit=moments_in_8bit, bf16=bf16, sgd=sgd)


def _changed(text: str, **settings: Any) -> Variant:
    """The randomized finder with fixed gaps, all weights at once and moments kept, but for ``settings``."""
    return _galore(text, method="galore2", **settings)


VARIANTS: dict[str, Variant] = {
    "adamw": Variant(kind="adamw", text="torch AdamW, full rank"),
    "muon": Variant(kind="muon", text="torch Muon, momentum 0.95, updates as large as AdamW's"),
    "soap": Variant(kind="soap", text="SOAP, betas 0.95, a new eigenbasis every 10 steps"),
    "galore-torch": Variant(kind="galore-torch", text="galore_torch 1.0, its AdamW"),
    "plain": _galore("exact SVD, fixed gaps, moments kept: as published", method="galore"),
    "randomized": _changed("randomized finder"),
    "random": _changed("random orthonormal bases", subspace="random_orthonormal"),
    "power": _changed("power iteration from the last basis", subspace="power"),
    "reverse-std": _changed("the longer side", proj_type="reverse_std"),
    "rotate": _changed("both moments rotated", moments="rotate"),
    "rotate-first": _changed("first moment rotated", moments="rotate_first"),
    "reset": _changed("moments begin anew", moments="reset"),
    "stagger": _changed("refreshes spread over the gap", stagger=True),
    "adaptive": _changed("gap follows the overlap", schedule="adaptive"),
    "cos": _changed("Q-GaLore's rule for the gap", schedule="cos"),
    "energy": _changed("refresh when the basis is used up", schedule="energy"),
    "warmup": _changed("short gaps in the first 100 steps", refresh_warmup=100),
    "rank-energy": _changed("rank by energy held", rank_rule="energy"),
    "rank-noise": _changed("rank by noise edge", rank_rule="noise_edge"),
    "default": _galore("the package's defaults"),
    "fused": _galore("the defaults, fused layers", mode="project", fused_backward=True),
    "compressed": _galore("the same, all on the right", mode="project", fused_backward=True, compress_activations=True),
    "8bit": _galore("as published, 8-bit moments", method="galore-8bit", moments_in_8bit=True),
    "int4": _galore("the defaults, bases in int4", basis_storage="int4"),
    "q-galore": _galore("int8 weights, int4 bases, 8-bit moments", method="q-galore", moments_in_8bit=True),
    "q-galore-nearest": _galore(
        "the same, rounded to the nearest", method="q-galore", moments_in_8bit=True, stochastic_round=False
    ),
    "bf16": _galore("the defaults, weights in bf16", bf16=True),
    "bf16-stochastic": _galore("the same, rounded stochastically", bf16=True, stochastic_round=True),
    "track-1": _galore("tracked basis, every step", method="galore-track", update_proj_gap=1),
    "track-5": _galore("tracked basis, every 5 steps", method="galore-track", update_proj_gap=5),
    "spam": _galore("the defaults, SPAM's clipping and resets", method="spam", reset_gap=200, reset_warmup=20),
    "stable-spam": _galore("the defaults, Stable-SPAM", method="stable-spam", reset_gap=200),
    "track-stable-spam": _galore(
        "tracked basis, every step, Stable-SPAM without resets",
        method="galore-track",
        update_proj_gap=1,
        transform="stable-spam",
        reset_gap=0,
    ),
    "natural-galore": _galore("as published, natural gradient in the subspace", method="natural-galore"),
    "adarankgrad": _galore("ranks that only shrink, both moments rotated", method="adarankgrad"),
    "galore-plus": _galore("heads share a basis, others randomized", method="galore-plus", head_size=32),
    "track-10": _galore("tracked basis, every 10 steps", method="galore-track", update_proj_gap=10),
    "ldadam": _galore("LDAdam: a basis a step, error feedback", method="ldadam", update_proj_gap=1),
    "ldadam-no-feedback": _galore("the same without", method="ldadam", update_proj_gap=1, lift="project_back"),
    "frugal": _galore("FRUGAL, columns at random, signs of the rest", method="frugal"),
    "frugal-block": _galore("the same, a block of columns", method="frugal", subspace="block"),
    "frugal-svd": _galore("the same, singular vectors", method="frugal", subspace="svd"),
    "golore": _galore("GoLore, random bases after 320 steps", method="golore", random_after=320),
    "swan": _galore("whitened in the subspace, over SGD", method="swan", sgd=True),
    "apollo": _galore("full gradient, scaled by channel in a random subspace", method="apollo"),
    "apollo-reset": _galore("the same, moments begin anew", method="apollo", moments="reset"),
    "apollo-svd": _galore("the same, moments kept, exact SVD", method="apollo", subspace="svd"),
    "apollo-mini": _galore("full gradient, scaled as a whole, rank 1", method="apollo-mini", rank=1, scale=128**0.5),
    "apollo-mini-reset": _galore(
        "the same, moments begin anew", method="apollo-mini", rank=1, scale=128**0.5, moments="reset"
    ),
    "q-apollo": _galore("scaled by channel, int8 weights", method="q-apollo"),
    "fira": _galore("exact SVD, moments kept, and the scaled residual", method="fira"),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a variant gets to make its optimizer of.

    Args:
        model: The model.
        rank: Of the low-rank variants.
        lr: Of the matrices; the other weights have ``DENSE_LR``.
        seed: Of random subspaces.
    """

    model: nn.Module
    rank: int
    lr: float
    seed: int = 0

    @property
    def matrices(self) -> list[nn.Parameter]:
        """The weights inside the layers."""
        return list(matrices(self.model).values())

    @property
    def dense(self) -> list[nn.Parameter]:
        """All others: embedding, head, norms."""
        chosen = {id(weight) for weight in self.matrices}
        return [weight for weight in self.model.parameters() if id(weight) not in chosen]

    def groups(self, **keys: Any) -> list[dict[str, Any]]:
        """Param groups of one optimizer over all; ``keys`` go into the group of the matrices."""
        return [
            {"params": self.matrices, "lr": self.lr, **keys},
            {"params": self.dense, "lr": DENSE_LR},
        ]


def build(variant: Variant, task: Task) -> list[Optimizer]:
    """The optimizers of a variant, over every weight of the model once.

    Args:
        variant: Which.
        task: Model and learning rate.

    Raises:
        ValueError: If the package would project other weights than those that are compared.
    """
    return _BUILDERS[variant.kind](variant, task)


def config_of(variant: Variant, *, rank: int, seed: int = 0) -> GaLoreConfig | None:
    """The whole configuration of a variant of this package, None for others.

    Args:
        variant: Which.
        rank: Of the comparison.
        seed: Of random subspaces.

    Raises:
        TypeError: If the package does not know a setting.
        ValueError: If it does not know a value.
    """
    if variant.kind != "galore":
        return None
    return GaLoreConfig(**{"rank": rank, "update_proj_gap": GAP, "scale": 1.0, "seed": seed, **variant.settings})


def why_not(variant: Variant, *, rank: int) -> str | None:
    """Why a variant cannot run here; None if it can.

    Args:
        variant: Which.
        rank: Of the comparison.
    """
    needed = {"soap": "pytorch_optimizer", "galore-torch": "galore_torch"}.get(variant.kind)
    needed = "bitsandbytes" if variant.moments_in_8bit else needed
    if needed and importlib.util.find_spec(needed) is None:
        return f"the package {needed} is not installed"
    if variant.kind == "muon" and not hasattr(torch.optim, "Muon"):
        return f"torch {torch.__version__} has no Muon"
    try:
        config_of(variant, rank=rank)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _adamw(groups: list[dict[str, Any]]) -> Optimizer:
    return torch.optim.AdamW(groups, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)


def _adamw8bit(groups: list[dict[str, Any]]) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit

    optimizer: Optimizer = AdamW8bit(groups, betas=BETAS, eps=EPS, weight_decay=0.0)
    return optimizer


def _full_rank(variant: Variant, task: Task) -> list[Optimizer]:
    return [_adamw(task.groups())]


def _muon(variant: Variant, task: Task) -> list[Optimizer]:
    # Updates with the root mean square of AdamW's, so that one grid of learning rates serves both.
    muon = torch.optim.Muon(task.matrices, lr=task.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, _adamw([{"params": task.dense, "lr": DENSE_LR}])]


def _soap(variant: Variant, task: Task) -> list[Optimizer]:
    from pytorch_optimizer import SOAP

    # The paper's and the library's own betas and frequency.
    soap = SOAP(task.matrices, lr=task.lr, betas=(0.95, 0.95), eps=EPS, weight_decay=0.0, precondition_frequency=10)
    return [soap, _adamw([{"params": task.dense, "lr": DENSE_LR}])]


def _galore_torch(variant: Variant, task: Task) -> list[Optimizer]:
    from galore_torch import GaLoreAdamW

    groups = task.groups(rank=task.rank, update_proj_gap=GAP, scale=1.0, proj_type="std")
    return [GaLoreAdamW(groups, betas=BETAS, eps=EPS, weight_decay=0.0, no_deprecation_warning=True)]


def _this_package(variant: Variant, task: Task) -> list[Optimizer]:
    config = config_of(variant, rank=task.rank, seed=task.seed)
    base = _adamw8bit(task.groups()) if variant.moments_in_8bit else _adamw(task.groups())
    others: list[Optimizer] = []
    if variant.sgd:
        base, others = torch.optim.SGD(task.matrices, lr=task.lr), [_adamw([{"params": task.dense, "lr": DENSE_LR}])]
    optimizer = GaLoreOptimizer(base, task.model, config)
    if {id(weight) for weight in optimizer.targets} != {id(weight) for weight in task.matrices}:
        raise ValueError(
            f"settings={dict(variant.settings)} and rank={task.rank} project {len(optimizer.targets)} weights, not the "
            f"{len(task.matrices)} that are compared; choose settings that project just these."
        )
    return [optimizer, *others]


_BUILDERS: dict[Kind, Callable[[Variant, Task], list[Optimizer]]] = {
    "adamw": _full_rank,
    "muon": _muon,
    "soap": _soap,
    "galore-torch": _galore_torch,
    "galore": _this_package,
}


def held_bytes(optimizers: Iterable[Optimizer], weights: Iterable[nn.Parameter]) -> int:
    """Bytes of memory that optimizer state holds for some weights; what a view keeps alive counts whole.

    Args:
        optimizers: All of them.
        weights: The weights whose state is counted.
    """
    held: dict[int, int] = {}
    weights = list(weights)
    for optimizer in optimizers:
        for weight in weights:
            if weight in optimizer.state:
                _count(optimizer.state[weight], held)
    return sum(held.values())


def _count(value: object, held: dict[int, int]) -> None:
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, Mapping):
        for inner in value.values():
            _count(inner, held)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _count(inner, held)
    elif hasattr(value, "ortho_matrix"):  # galore_torch keeps its basis in an object
        _count(value.ortho_matrix, held)


def refreshes(optimizers: Iterable[Optimizer], weights: Iterable[nn.Parameter]) -> float | None:
    """How often a weight's basis was refreshed, on average over ``weights``; None if nobody counted."""
    counts = [
        float(optimizer.state[weight]["galore_refreshes"])
        for optimizer in optimizers
        for weight in weights
        if weight in optimizer.state and "galore_refreshes" in optimizer.state[weight]
    ]
    return sum(counts) / len(counts) if counts else None
