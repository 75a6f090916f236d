# SPDX-License-Identifier: Apache-2.0
"""Which weights are projected: by names, classes, shapes and param groups."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any

from torch import Tensor, nn

from lightning_galore.config import CLASS_PREFIX, GaLoreConfig, Rank, names
from lightning_galore.geometry import projection_of
from lightning_galore.target_table import Target, TargetRow, TargetTable

# What the last layer is called in Transformers, timm, torchvision and fairseq; compared with whole parts of a name.
HEAD_NAMES = frozenset(
    {
        "lm_head",
        "classifier",
        "score",
        "head",
        "heads",
        "qa_outputs",
        "cls",
        "embed_out",
        "output_projection",
        "pre_classifier",
    }
)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class NoTargetsError(ValueError):
    """No weight at all would be projected."""


def clean_name(name: str) -> str:
    """A module's or parameter's name without the wrapper that ``torch.compile`` puts around a module."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


class Selector:
    """Answers, for each parameter, whether it is projected and why not.

    Args:
        model: Gives the names and classes of modules; without it only param-group keys select.
        config: What is asked for.
    """

    def __init__(self, model: nn.Module | None, config: GaLoreConfig) -> None:
        self.config = config
        self.names: dict[Tensor, str] = {}
        self.matched: set[Tensor] = set()
        self.ignored: set[Tensor] = set()
        self.heads: set[Tensor] = set()
        self.embeddings: set[Tensor] = set()
        self.linear: set[Tensor] = set()
        self.named_embeddings: set[Tensor] = set()
        # Of each matrix that is refused for its rank alone: the widest it could have, and the sentence that says so.
        self.too_wide: list[tuple[int, str]] = []
        modules = [(clean_name(name), module) for name, module in model.named_modules()] if model is not None else []
        self.linear_names = [name for name, module in modules if isinstance(module, nn.Linear)]
        self.linear_names = [name or "the model itself" for name in self.linear_names]
        for pattern, rank in config.rank_patterns if modules else ():
            if not any(names(pattern, name) for name, _ in modules):
                raise ValueError(f"rank_pattern[{pattern!r}]={rank} names no module of the model; mend or remove it.")
        output_modules = set(_output_embeddings(module for _, module in modules))
        for name, module in modules:
            own = [param for param in module._parameters.values() if param is not None]
            for local, param in module._parameters.items():
                if param is not None:
                    self.names.setdefault(param, f"{name}.{local}".lstrip("."))
            self._note_class(module, own)
            if module in output_modules or not HEAD_NAMES.isdisjoint(name.split(".")):
                self.heads.update(own)
            if _matches(config.target_modules, name, module, "target_modules"):
                self.matched.update(own)
            if _matches(config.ignore_modules, name, module, "ignore_modules"):
                self.ignored.update(own)
        self._note_named_embeddings(modules)

    def _note_named_embeddings(self, modules: Sequence[tuple[str, nn.Module]]) -> None:
        """Which embeddings are meant: a pattern as wide as ``.*`` or ``encoder`` does not ask for them."""
        patterns = self.config.target_modules
        if patterns == "all-linear":
            return
        assert not isinstance(patterns, type)  # the configuration has written classes as strings
        for item in [patterns] if isinstance(patterns, str) else [(one,) for one in patterns]:
            hit = [module for name, module in modules if _matches(item, name, module, "target_modules")]
            owned = [[p for p in module._parameters.values() if p is not None and p.ndim > 1] for module in hit]
            found = {param for params in owned for param in params}
            if all(isinstance(m, _EMBEDDINGS) for m, params in zip(hit, owned, strict=True) if params):
                self.named_embeddings.update(found)

    def _note_class(self, module: nn.Module, own: list[nn.Parameter]) -> None:
        if isinstance(module, nn.Linear):
            self.linear.update(own)
        elif isinstance(module, _EMBEDDINGS):
            self.embeddings.update(own)

    def select(self, param: Tensor, group: Mapping[str, Any], fallback_name: str) -> tuple[Target | None, str]:
        """The target of ``param``, or None and the reason.

        Args:
            param: A parameter of the optimizer.
            group: Its param group; the keys ``rank`` and ``proj_type`` win over the configuration, and a ``rank`` there
                selects every matrix of the group (``None`` selects none).
            fallback_name: Name of a parameter that the model does not have.
        """
        reason = self._reason(param, group)
        if reason:
            return None, reason
        name, config = self.names.get(param, fallback_name), self.config.for_group(group)
        projection, reason = projection_of(param, config, module=name.rpartition(".")[0], named=group.get("rank"))
        if projection is None and not (config.by_modes and param.ndim > 2):
            self._note_too_wide(param, config, name=name, named=group.get("rank"))
        if (
            config.compress_activations
            and param in self.linear
            and projection is not None
            and projection.side == "left"
        ):
            projection, reason = replace(projection, side="right"), "(on the right: compress_activations)"
        return None if projection is None else Target(name=name, projection=projection), reason

    def _note_too_wide(self, param: Tensor, config: GaLoreConfig, *, name: str, named: Rank | None) -> None:
        short = min(param.shape[0], math.prod(param.shape[1:]))
        widest, reckoned = (short, "min(m, n)") if named is not None else (short - 1, "min(m, n) - 1")
        rank = config.rank_named(name.rpartition(".")[0], named=named)
        said = f"rank={rank} is too large: the widest it may be here is {widest} ({reckoned} of {name}). Lower it."
        self.too_wide.append((widest, said))

    def _reason(self, param: Tensor, group: Mapping[str, Any]) -> str:
        """Why ``param`` cannot or shall not be projected, whatever its rank; empty when it can."""
        explicit = "rank" in group
        if explicit and group["rank"] is None:
            return "rank=None in its param group"
        if not explicit:
            reason = self._not_selected(param)
            if reason:
                return reason
        if param.ndim < 2:
            return _low_order(param)
        if not param.is_floating_point():
            return f"{param.dtype} is not a real floating-point type"
        return ""

    def _not_selected(self, param: Tensor) -> str:
        everything_linear = self.config.target_modules == "all-linear"
        if param not in self.names:
            return "not a parameter of the model"
        if param in self.ignored:
            return "ignore_modules"
        if "parametrizations" in self.names[param].split("."):
            return "parametrized: the weight is computed from it"
        if param not in self.matched:
            return "not in target_modules" if param.ndim > 1 else _low_order(param)
        if param in self.embeddings - self.named_embeddings:
            return "embedding, or tied to one (taken where a pattern names only embeddings)"
        if everything_linear and param in self.heads:
            return "output head (all-linear leaves it out)"
        return ""


def _low_order(param: Tensor) -> str:
    return f"order {param.ndim}: only matrices are projected"


def select_targets(
    model: nn.Module | None, param_groups: Sequence[Mapping[str, Any]], config: GaLoreConfig
) -> tuple[dict[Tensor, Target], TargetTable]:
    """Choose the weights of an optimizer that are projected.

    Args:
        model: The model that the parameters belong to, for names and module classes.
        param_groups: The optimizer's groups.
        config: What is asked for.

    Returns:
        The targets by parameter, and the table of every parameter of the groups and the model.

    Raises:
        NoTargetsError: If nothing is projected, and nothing frozen could be once it is added to the optimizer.
    """
    selector = Selector(model, config)
    targets: dict[Tensor, Target] = {}
    rows: list[TargetRow] = []
    for i, group in enumerate(param_groups):
        for j, param in enumerate(group["params"]):
            fallback = f"group{i}.param{j}"
            target, reason = selector.select(param, group, fallback)
            if target:
                targets[param] = target
                reason = reason if param.requires_grad else f"{reason} (frozen for now)".lstrip()
            name = selector.names.get(param, fallback)
            rows.append(TargetRow(name=name, shape=tuple(param.shape), target=target, reason=reason))
    given = {param for group in param_groups for param in group["params"]}
    later = False
    for param, name in selector.names.items():
        if param not in given:
            # Finetuning callbacks freeze a backbone and add it to the optimizer later, when it is projected.
            frozen = not param.requires_grad and selector.select(param, {}, name)[0] is not None
            later = later or frozen
            reason = "not in this optimizer" + (" (frozen; projected once it is added)" if frozen else "")
            rows.append(TargetRow(name=name, shape=tuple(param.shape), target=None, reason=reason))
    table = TargetTable(tuple(rows))
    if not targets and not later:
        raise NoTargetsError(_no_targets_message(table, selector))
    return targets, table


def _no_targets_message(table: TargetTable, selector: Selector) -> str:
    config = selector.config
    none_left = f"leaves no weight to project among {len(table.rows)} parameters"
    widest, too_wide = max(selector.too_wide, key=lambda one: one[0], default=(0, ""))
    if widest > 0:
        return (
            f"{too_wide} As it is, target_modules={config.target_modules!r} {none_left}: at min(m, n) and above "
            "nothing would be saved."
        )
    plain = {"not in target_modules", "not in this optimizer"}
    matched = {selector.names[param] for param in selector.matched}
    rows = [row for row in table.rows if row.reason not in plain and (len(row.shape) > 1 or row.name in matched)]
    # Biases beside a matrix say nothing that its own reason does not.
    matrices = [row for row in rows if len(row.shape) > 1]
    refused = [f"{row.name} ({row.reason})" for row in matrices or rows]
    linear = ", ".join(selector.linear_names[:8]) + (", ..." if len(selector.linear_names) > 8 else "")
    return (
        f"target_modules={config.target_modules!r} with rank={config.rank} and "
        f"ignore_modules={config.ignore_modules!r} {none_left}. "
        + (f"Matched but not projected: {'; '.join(refused[:8])}. " if refused else "")
        + (f"Linear modules here: {linear}. " if linear else "There is no nn.Linear here. ")
        + "Name modules that hold matrices larger than the rank, or lower the rank."
    )


def _matches(patterns: str | type | Sequence[str | type], name: str, module: nn.Module, argument: str) -> bool:
    if patterns == "all-linear":
        return isinstance(module, nn.Linear)
    if isinstance(patterns, str):
        return _class_or_full_match(patterns, name, module, argument)
    assert not isinstance(patterns, type)  # the configuration has written classes as strings
    return any(str(item) in name or _class_or_full_match(str(item), name, module, argument) for item in patterns)


def _class_or_full_match(pattern: str, name: str, module: nn.Module, argument: str) -> bool:
    if pattern.startswith(CLASS_PREFIX):
        path = pattern.removeprefix(CLASS_PREFIX)
        try:
            cls = resolve_name(path)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{argument}={pattern!r}: there is no class {path!r} ({error}); give its import path."
            ) from error
        if not isinstance(cls, type):
            raise ValueError(f"{argument}={pattern!r}: {path!r} is no class but {cls!r}; give a class's import path.")
        return isinstance(module, cls)
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"{argument}={pattern!r} is not a valid regular expression ({error}).") from error


def _output_embeddings(modules: Iterable[nn.Module]) -> Iterable[nn.Module]:
    """The output layers that Transformers' models declare."""
    for module in modules:
        getter = getattr(module, "get_output_embeddings", None)
        try:
            head = getter() if callable(getter) else None
        except (AttributeError, NotImplementedError):
            head = None
        if isinstance(head, nn.Module):
            yield head
