# SPDX-License-Identifier: Apache-2.0
"""What is compared: one row a variant."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from lightning_galore import GaLoreConfig
from lightning_galore.config.presets import METHODS

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
        shares: Settings in steps that go with the length of the run, as shares of it.
        text: What it is, for the table's reader.
        moments_in_8bit: Whether bitsandbytes' AdamW8bit takes the place of torch's AdamW; for ``galore`` and ``adamw``.
        bf16: Whether all weights are in bf16 alone.
        sgd: Whether torch's SGD is wrapped instead, over the matrices alone, with AdamW for the others; for ``galore``.
    """

    kind: Kind
    settings: Mapping[str, Any] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    text: str = ""
    moments_in_8bit: bool = False
    bf16: bool = False
    sgd: bool = False

    @property
    def optional(self) -> dict[str, Any]:
        """The fields that few variants have, where they have them: older runs know nothing of them."""
        return {name: True for name in ("moments_in_8bit", "bf16", "sgd") if getattr(self, name)}

    def of_length(self, steps: int) -> Variant:
        """The variant in a run of ``steps`` optimizer steps: shares become steps, at least one."""
        scaled = {name: max(1, round(share * steps)) for name, share in self.shares.items()}
        return replace(self, settings={**self.settings, **scaled}, shares={})


def _galore(
    text: str,
    *,
    shares: Mapping[str, float] | None = None,
    moments_in_8bit: bool = False,
    bf16: bool = False,
    sgd: bool = False,
    **settings: Any,
) -> Variant:
    return Variant(
        kind="galore",
        settings=settings,
        shares=shares or {},
        text=text,
        moments_in_8bit=moments_in_8bit,
        bf16=bf16,
        sgd=sgd,
    )


def _changed(text: str, **settings: Any) -> Variant:
    """The randomized finder with fixed gaps, all weights at once and moments kept, but for ``settings``."""
    return _galore(text, method="galore2", **settings)


VARIANTS: dict[str, Variant] = {
    "adamw": Variant(kind="adamw", text="torch AdamW, full rank"),
    "adamw-8bit": Variant(kind="adamw", text="bitsandbytes' AdamW8bit, full rank", moments_in_8bit=True),
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
    "spam": _galore(
        "the defaults, SPAM's clipping and resets", method="spam", shares={"reset_gap": 0.5, "reset_warmup": 0.05}
    ),
    "stable-spam": _galore("the defaults, Stable-SPAM", method="stable-spam", shares={"reset_gap": 0.5}),
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
    "golore": _galore("GoLore, random bases in the last fifth", method="golore", shares={"random_after": 0.8}),
    "swan": _galore("whitened in the subspace, over SGD", method="swan", sgd=True),
    "apollo": _galore("full gradient, scaled by channel in a random subspace", method="apollo"),
    "apollo-reset": _galore("the same, moments begin anew", method="apollo", moments="reset"),
    "apollo-svd": _galore("the same, moments kept, exact SVD", method="apollo-svd"),
    "apollo-mini": _galore("full gradient, scaled as a whole, rank 1", method="apollo-mini", rank=1, scale=128**0.5),
    "apollo-mini-reset": _galore(
        "the same, moments begin anew", method="apollo-mini", rank=1, scale=128**0.5, moments="reset"
    ),
    "q-apollo": _galore("scaled by channel, int8 weights", method="q-apollo"),
    "fira": _galore("exact SVD, moments kept, and the scaled residual", method="fira"),
    "galore-8bit": _galore("as published, 8-bit moments", method="galore-8bit", moments_in_8bit=True),
}
_SAME_ON_MATRICES = {"tensor-galore": "galore"}  # presets that are another's twin where every weight is a matrix
_OF_THE_COMPARISON = ("rank", "scale", "update_proj_gap")  # that a preset may say otherwise


def _preset(name: str) -> Variant:
    row = {key: METHODS[name][key] for key in _OF_THE_COMPARISON if key in METHODS[name]}
    return _galore(f"method={name!r}", method=name, **row)


# A preset that is compared as it comes needs no line above.
VARIANTS |= {name: _preset(name) for name in METHODS if name not in VARIANTS and name not in _SAME_ON_MATRICES}
#: Every preset, between full rank and the defaults: ``--presets``.
PRESETS: tuple[str, ...] = (
    "adamw",
    "adamw-8bit",
    "default",
    *(name for name in METHODS if name not in _SAME_ON_MATRICES),
)


def config_of(variant: Variant, *, rank: int, seed: int = 0, **common: Any) -> GaLoreConfig | None:
    """The whole configuration of a variant of this package, None for others.

    Args:
        variant: Which.
        rank: Of the comparison.
        seed: Of random subspaces.
        common: What else the comparison sets where the variant is silent; ``update_proj_gap=GAP`` and ``scale=1``
            where it does not either.

    Raises:
        TypeError: If the package does not know a setting.
        ValueError: If it does not know a value.
    """
    if variant.kind != "galore":
        return None
    return GaLoreConfig(
        **{"rank": rank, "update_proj_gap": GAP, "scale": 1.0, "seed": seed, **common, **variant.settings}
    )


def why_not(variant: Variant, *, rank: int, **common: Any) -> str | None:
    """Why a variant cannot run here; None if it can.

    Args:
        variant: Which.
        rank: Of the comparison.
        common: As for :func:`config_of`.
    """
    needed = {"soap": "pytorch_optimizer", "galore-torch": "galore_torch"}.get(variant.kind)
    needed = "bitsandbytes" if variant.moments_in_8bit else needed
    if needed and importlib.util.find_spec(needed) is None:
        return f"the package {needed} is not installed"
    if variant.kind == "muon" and not hasattr(torch.optim, "Muon"):
        return f"torch {torch.__version__} has no Muon"
    try:
        config_of(variant, rank=rank, **common)
    except (TypeError, ValueError) as error:
        return str(error)
    return None
