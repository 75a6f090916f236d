# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name, for recipes: ``adamw8bit`` and others, with Transformers' spellings."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from pkgutil import resolve_name
from types import ModuleType
from typing import Any, Literal

import torch
from torch.optim import Optimizer

Package = Literal["torch", "bitsandbytes", "torchao"]
_ADAM = frozenset({"lr", "betas", "eps"})


@dataclass(frozen=True, kw_only=True)
class Named:
    """Where an optimizer is to be had, and what it understands.

    Args:
        package: Brings it.
        cls: Its class there.
        takes: Settings that mean the same to it as to AdamW: of ``lr``, ``betas`` and ``eps``.
        settings: What the name says beside the class, by keyword.
    """

    package: Package
    cls: str
    takes: frozenset[str] = _ADAM
    settings: Mapping[str, Any] = field(default_factory=dict)


_LION, _NO_BETAS, _LR = frozenset({"lr", "betas"}), frozenset({"lr", "eps"}), frozenset({"lr"})
NAMED: dict[str, Named] = {
    "adamw": Named(package="torch", cls="AdamW"),
    "adamwfused": Named(package="torch", cls="AdamW", settings={"fused": True}),
    # What torch takes on a GPU where neither is asked for.
    "adamwforeach": Named(package="torch", cls="AdamW", settings={"foreach": True}),
    "adam": Named(package="torch", cls="Adam"),
    "sgd": Named(package="torch", cls="SGD", takes=_LR),
    "rmsprop": Named(package="torch", cls="RMSprop", takes=_NO_BETAS),
    "adagrad": Named(package="torch", cls="Adagrad", takes=_NO_BETAS),
    "adafactor": Named(package="torch", cls="Adafactor", takes=_LR),  # its eps are two others
    "muon": Named(package="torch", cls="Muon", takes=_LR),  # its eps is one of its iteration
    "adamw8bit": Named(package="bitsandbytes", cls="AdamW8bit"),
    "adam8bit": Named(package="bitsandbytes", cls="Adam8bit"),
    "lion": Named(package="bitsandbytes", cls="Lion", takes=_LION),
    "lion8bit": Named(package="bitsandbytes", cls="Lion8bit", takes=_LION),
    "sgd8bit": Named(package="bitsandbytes", cls="SGD8bit", takes=_LR, settings={"momentum": 0.9}),  # it needs one
    "rmsprop8bit": Named(package="bitsandbytes", cls="RMSprop8bit", takes=_NO_BETAS),
    "adagrad8bit": Named(package="bitsandbytes", cls="Adagrad8bit", takes=_NO_BETAS),
    "ademamix": Named(package="bitsandbytes", cls="AdEMAMix", takes=_NO_BETAS),  # its betas are three
    "ademamix8bit": Named(package="bitsandbytes", cls="AdEMAMix8bit", takes=_NO_BETAS),
    "pagedadamw": Named(package="bitsandbytes", cls="PagedAdamW"),
    "pagedadamw8bit": Named(package="bitsandbytes", cls="PagedAdamW8bit"),
    "pagedadam8bit": Named(package="bitsandbytes", cls="PagedAdam8bit"),
    "pagedademamix8bit": Named(package="bitsandbytes", cls="PagedAdEMAMix8bit", takes=_NO_BETAS),
    "pagedlion": Named(package="bitsandbytes", cls="PagedLion", takes=_LION),
    "pagedlion8bit": Named(package="bitsandbytes", cls="PagedLion8bit", takes=_LION),
    "torchaoadamw8bit": Named(package="torchao", cls="AdamW8bit"),
    "adamw4bit": Named(package="torchao", cls="AdamW4bit"),
    "adamwfp8": Named(package="torchao", cls="AdamWFp8"),
}
# Other spellings, as TrainingArguments(optim=...) of Transformers has them.
ALIASES: dict[str, str] = {
    "adamwtorch": "adamw",
    "adamwtorchfused": "adamwfused",
    "adamwbnb8bit": "adamw8bit",
    "adamwtorch8bit": "torchaoadamw8bit",
    "adamwtorch4bit": "adamw4bit",
    "torchaoadamw4bit": "adamw4bit",
    "torchaoadamwfp8": "adamwfp8",
    "lion32bit": "lion",
    "rmspropbnb8bit": "rmsprop8bit",
    "pagedadamw32bit": "pagedadamw",
    "pagedlion32bit": "pagedlion",
}

# How those names are written in the documentation whose words are set apart by underscores; all others as above.
_WRITTEN = (
    *("adamw_fused", "adamw_foreach", "paged_adamw", "paged_adamw8bit", "paged_adam8bit", "paged_ademamix8bit"),
    *("paged_lion", "paged_lion8bit", "torchao_adamw8bit", "adamw_fp8"),
    *("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_torch_8bit", "adamw_torch_4bit"),
    *("torchao_adamw4bit", "torchao_adamw_fp8", "lion_32bit", "rmsprop_bnb_8bit", "paged_adamw_32bit"),
    "paged_lion_32bit",
)
_WRITTEN_OF = {written.replace("_", ""): written for written in _WRITTEN}


def written(name: str) -> str:
    """A key of ``NAMED`` or ``ALIASES`` as the documentation writes it.

    Example:
        >>> written("pagedadamw8bit")
        'paged_adamw8bit'
    """
    return _WRITTEN_OF.get(name, name)


def named_optimizer(name: str, **settings: Any) -> Callable[..., Optimizer]:
    """The optimizer of a name, to be called with parameters or param groups and with its settings by keyword.

    The package that brings it is imported here, not at the call: torchao makes its tensor classes safe to load from a
    checkpoint in its import.

    Args:
        name: As ``"adamw8bit"``; case, ``_`` and ``-`` do not count. Transformers' names (``"adamw_bnb_8bit"``) are
            known too, any other class of ``torch.optim`` (``"NAdam"``), and of other packages by its path
            (``"bitsandbytes.optim.LARS"``).
        **settings: AdamW's ``lr``, ``betas`` and ``eps``. Used where the optimizer has the same; those of the call win.

    Returns:
        A callable ``(params, **settings) -> Optimizer``.

    Raises:
        ValueError: If the name is not known; the message has the closest ones.
        ImportError: If the package of the optimizer is not installed; the message says how to get it.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(4, 4))
        >>> named_optimizer("AdamW_torch", lr=0.5)([weight], weight_decay=0.0).defaults["lr"]
        0.5
    """
    plain = re.sub(r"[\s_-]", "", name).lower()
    known = NAMED.get(ALIASES.get(plain, plain))
    if known is None:
        own = _class_of(name)
        if own is not None:
            return _maker(own, _takes(own), {}, settings)
        close = difflib.get_close_matches(plain, [*NAMED, *ALIASES], n=3)
        hint = f"Did you mean {', '.join(repr(written(one)) for one in close)}? " if close else ""
        raise ValueError(f"optimizer={name!r} is not known. {hint}Known: {', '.join(map(written, NAMED))}.")
    cls = getattr(_PACKAGES[known.package](name), known.cls, None)
    if cls is None:
        raise ImportError(
            f"optimizer={name!r} needs {known.cls}, which the installed {known.package} does not have. Upgrade it: "
            f"pip install --upgrade {known.package}"
        )
    return _maker(cls, known.takes, known.settings, settings)


def _maker(
    cls: type[Optimizer], takes: frozenset[str], named: Mapping[str, Any], settings: Mapping[str, Any]
) -> Callable[..., Optimizer]:
    shared = {key: value for key, value in settings.items() if key in takes}

    def make(params: Any, **own: Any) -> Optimizer:
        return cls(params, **{**named, **shared, **own})

    return make


def _class_of(name: str) -> type[Optimizer] | None:
    """A class of ``torch.optim`` by its name in any case, or another one by its dotted path."""
    if "." in name:
        try:
            found = resolve_name(name)
        except AttributeError:
            found = None
        if not (isinstance(found, type) and issubclass(found, Optimizer)):
            raise ValueError(f"optimizer={name!r} is not known: it is not the path of an optimizer's class.")
        return found
    classes = [cls for cls in vars(torch.optim).values() if isinstance(cls, type) and issubclass(cls, Optimizer)]
    return next((cls for cls in classes if cls is not Optimizer and cls.__name__.lower() == name.lower()), None)


def _takes(cls: type[Optimizer]) -> frozenset[str]:
    """Which of AdamW's settings mean the same to a class that has no line above."""
    for known in NAMED.values():
        if known.cls == cls.__name__ and cls.__module__.startswith(known.package):
            return known.takes
    defaults = {name: parameter.default for name, parameter in signature(cls).parameters.items()}
    betas = isinstance(defaults.get("betas"), tuple) and len(defaults["betas"]) == 2
    alike = {"lr": "lr" in defaults, "betas": betas, "eps": isinstance(defaults.get("eps"), float)}
    return frozenset(name for name, same in alike.items() if same)


def _bitsandbytes(name: str) -> ModuleType:
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise ImportError(
            f"optimizer={name!r} needs bitsandbytes. Install it: pip install lightning-galore[bnb]"
        ) from error
    found: ModuleType = optim
    return found


def _torchao(name: str) -> ModuleType:
    try:
        from torchao import optim
    except ImportError as error:
        raise ImportError(f"optimizer={name!r} needs torchao. Install it: pip install torchao") from error
    found: ModuleType = optim
    return found


_PACKAGES: dict[Package, Callable[[str], ModuleType]] = {
    "torch": lambda name: torch.optim,
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
}
