# SPDX-License-Identifier: Apache-2.0
"""Ranges of settings, and what is said when a value is out of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_galore.config.presets import CLASS_PREFIX, Rank


def check_int(name: str, value: object, *, minimum: int, remedy: str) -> None:
    """Refuse what is no integer from ``minimum`` on."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an integer; {remedy}.")
    if value < minimum:
        raise ValueError(f"{name}={value!r} must be at least {minimum}; {remedy}.")


def check_positive(name: str, value: object, *, remedy: str) -> None:
    """Refuse what is no positive, finite number."""
    _check_number(name, value, remedy=remedy)
    if not 0 < value < float("inf"):  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} must be positive and finite; {remedy}.")


def check_share(name: str, value: object, *, remedy: str, below_one: bool = False) -> None:
    """Refuse what is no number in (0, 1], or in [0, 1) with ``below_one``."""
    _check_number(name, value, remedy=remedy)
    inside = 0 <= value < 1 if below_one else 0 < value <= 1  # type: ignore[operator]
    if not inside:
        raise ValueError(f"{name}={value!r} must be in {'[0, 1)' if below_one else '(0, 1]'}; {remedy}.")


def _check_number(name: str, value: object, *, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} must be a number; {remedy}.")


def as_rank(name: str, value: Any) -> Rank:
    """A rank with its entries, if it has several, in a tuple (a list in YAML); refused out of range."""
    rank: Rank = tuple(value) if isinstance(value, list) else value
    check_rank(name, rank)
    return rank


def check_rank(name: str, value: object) -> None:
    """Refuse what is neither a width, a fraction, nor a width for each mode."""
    if isinstance(value, tuple):
        for one in value:
            check_int(name, one, minimum=1, remedy="each mode has a rank of 1 or more, e.g. rank=(16, 16, 3, 3)")
        if len(value) < 3:
            raise ValueError(f"{name}={value!r} must have a rank for each of three modes or more; a matrix has one.")
        return
    remedy = "the paper uses a quarter of the hidden size, e.g. rank=128; rank=0.25 is a quarter of the short side"
    if isinstance(value, float) and not 0 < value < 1:
        raise ValueError(f"{name}={value!r} must be an integer, or a fraction in (0, 1); {remedy}.")
    if not isinstance(value, float):
        check_int(name, value, minimum=1, remedy=remedy)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse what is not among the names."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(repr(c) for c in choices)}.")


def check_bool(name: str, value: object) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False.")


def as_patterns(name: str, value: str | type | Sequence[str | type]) -> tuple[str, ...]:
    """Write module classes as strings, so that a configuration is made of primitives and can be saved."""
    if not isinstance(value, (str, type, Sequence)):
        raise TypeError(f"{name}={value!r} must hold module names, expressions or classes, not be {value!r}.")
    items = [value] if isinstance(value, (str, type)) else list(value)
    patterns = []
    for item in items:
        if isinstance(item, type):
            item = f"{CLASS_PREFIX}{item.__module__}:{item.__qualname__}"
        if not isinstance(item, str) or not item:
            raise TypeError(f"{name}={value!r} must hold module names, expressions or classes, not {item!r}.")
        patterns.append(item)
    return tuple(patterns)


def as_rank_pattern(name: str, value: Any) -> tuple[tuple[str, Rank], ...]:
    """Ranks by module name as pairs in the order given, which can be hashed and saved."""
    if value is None:
        return ()
    try:
        pairs = tuple((pattern, rank) for pattern, rank in (value.items() if isinstance(value, Mapping) else value))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f'{name}={value!r} must map module names to ranks, e.g. {{"mlp": 64, "attention": 0.25}}.'
        ) from error
    for pattern, rank in pairs:
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(f"{name}={value!r} must map module names to ranks, not {pattern!r}.")
        as_rank(f"{name}[{pattern!r}]", rank)
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name}: {pattern!r} is not a valid regular expression ({error}).") from error
    return tuple((pattern, as_rank(name, rank)) for pattern, rank in pairs)


def names(pattern: str, module: str) -> bool:
    """Whether a substring or expression names a module."""
    return pattern in module or re.fullmatch(pattern, module) is not None
