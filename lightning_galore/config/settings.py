# SPDX-License-Identifier: Apache-2.0
"""The configuration: each setting with its meaning and its default, checked once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from lightning_galore.config.checks import (
    as_patterns,
    as_rank,
    as_rank_pattern,
    check_bool,
    check_choice,
    names,
)
from lightning_galore.config.opening import opened_axes
from lightning_galore.config.presets import (
    BY_MODES,
    CHOICES,
    GROUP_KEYS,
    HEADED,
    METHODS,
    NONE_IS_OPEN,
    AccumulatorStorage,
    BasisPlacement,
    BasisStorage,
    LiftName,
    Method,
    Mode,
    MomentsName,
    MomentStorage,
    ProjType,
    Rank,
    RankRuleName,
    ScheduleName,
    SubspaceName,
    TransformName,
    WeightStorage,
)
from lightning_galore.config.ranges import check_fused, check_numbers, check_resets, check_schedule, check_subspace


@dataclass(frozen=True, kw_only=True)
class GaLoreConfig:
    """How gradients are projected, which weights are, and how often the subspace is refreshed.

    Args:
        rank: Width ``r`` of the gradient subspace, or as a fraction in (0, 1) of the weight's short side. A weight
            with ``min(m, n) <= rank`` would save nothing and stays full-rank. With ``subspace="tucker"``, for a weight
            of order > 2: the rank of every mode, a tuple with one for each, or the share of the weight's entries that
            core and bases have together. ``auto`` is what ``method`` says, else 128.
        update_proj_gap: Optimizer steps between two refreshes of a weight's subspace (``T`` in the paper). None is
            what ``method`` says, else 200.
        scale: Factor on the projected-back update, or on the scaled gradient (``alpha`` in the papers). None is what
            ``method`` says, else 0.25.
        proj_type: Which side is projected. ``std``: the shorter dimension; ``reverse_std``: the longer one; ``left``:
            rows; ``right``: columns; ``full``: both (the low-rank gradient is ``r x r``).
        mode: When gradients are projected and weights move. ``step``: both in ``optimizer.step``. ``project``:
            gradients in backward, where each full one is freed at once. ``layerwise``: weights in backward too, and no
            gradient outlives it.
        target_modules: Which modules' weights are projected: ``"all-linear"`` (every ``nn.Linear`` but the output head
            and what is tied to an embedding), a regular expression that must match the whole module name, or a list of
            substrings, expressions and module classes (``torch.nn.Linear``, or ``"class:torch.nn.Linear"`` in YAML).
            An embedding is projected where one of them names nothing but embeddings.
        ignore_modules: Modules to leave out, written like a list for ``target_modules``.
        method: A preset by name: ``galore`` (exact SVD, as published), ``galore2`` (randomized), ``galore-track``
            (the basis follows the gradient at every step), ``galore-8bit`` (``galore`` over an optimizer with 8-bit
            moments), ``q-galore`` (int8 weights, int4 bases, 8-bit moments, adaptive gap), ``ldadam`` (a basis for each
            step, error feedback), ``frugal`` (signs of what the subspace leaves out), ``golore`` (random bases late in
            training), ``swan`` (whitened updates without moments), ``spam`` or ``stable-spam`` (gradient spikes are
            clipped, momentum is reset), ``natural-galore`` (natural gradient in the subspace), ``adarankgrad``
            (shrinking ranks), ``galore-plus`` (heads share a basis), ``apollo`` and ``apollo-mini`` (the full gradient,
            scaled by channel or as a whole), ``apollo-svd`` (along singular vectors), ``q-apollo`` (with int8 weights),
            ``fira`` (``galore`` and the scaled residual) or ``tensor-galore`` (convolutions along each mode). Settings
            you name win.
        subspace: How a basis is found: ``randomized`` (range finder, the default), ``svd`` (exact), ``gram``
            (eigenvectors of the Gram matrix), ``power`` (power iteration from the last basis), ``track`` (follows
            gradient and first moment), ``blend`` (LDAdam's form of it), ``columns`` (the largest columns),
            ``random_orthonormal``, ``gaussian`` (not orthonormal), ``coordinates`` (rows or columns drawn at random) or
            ``block`` (a run of them), ``cross_head`` (queries, keys and values: from a head's rows; others:
            ``randomized``), ``tucker`` (weights of order > 2 along each mode; exact for matrices) or ``tucker_warm``
            (the same from the last bases). ``auto`` is what ``method`` says, else ``randomized``. With all the others a
            weight of order > 2 is folded into the matrix of its first dimension and the rest.
        random_after: From this many steps of a weight on its bases are random orthonormal ones, whatever ``subspace``
            says. None is what ``method`` says, else never.
        schedule: When a basis is refreshed. ``fixed``: every gap; ``adaptive``: the gap follows the overlap of old and
            new bases; ``cos``: Q-GaLore's rule; ``energy``: when the basis no longer holds enough of the gradient.
        stagger: Spread the refreshes of the weights over the gap, so that no step refreshes all of them. None is what
            ``method`` says, else True.
        refresh_share: With ``stagger``, most time that first refreshes may add to a step, as a share of an ordinary
            optimizer step; until its first one a weight trains in the span of unit vectors.
        refresh_warmup: Optimizer steps at the start during which the gap grows linearly from ``min_gap`` to
            ``update_proj_gap``: gradients turn fastest early.
        min_gap: Lower bound of a gap that changes; None is a quarter of ``update_proj_gap``.
        max_gap: Upper bound of a gap that changes; None is eight times ``update_proj_gap``.
        grow_above: ``adaptive`` doubles the gap when the overlap across it is at least this share of the overlap of
            two bases found one step apart.
        shrink_below: ``adaptive`` halves the gap when it is less than this share.
        refresh_below: ``energy`` refreshes when the basis holds less than this share of the energy that it held one
            step after it was found.
        moments: What happens to the wrapped optimizer's moments at a refresh. ``keep``: nothing, as published;
            ``rotate``: first and second moments are carried into the new coordinates; ``rotate_first``: first ones
            only; ``reset``: begin anew. ``auto`` is what ``method`` says, else ``rotate_first``.
        rank_rule: ``fixed``: every weight has ``rank``. ``energy``: the smallest rank that holds ``rank_energy`` of
            the gradient's energy, ``energy_shrink``: the same, but never more than before, ``noise_edge``: as many
            directions as stand out of noise (Marchenko-Pastur); chosen anew at each refresh, between ``min_rank`` and
            ``rank``. ``auto`` is what ``method`` says, else ``fixed``.
        rank_energy: Share of the gradient's energy that ``rank_rule="energy"`` or ``"energy_shrink"`` holds.
        head_size: Rows of one attention head, for ``subspace="cross_head"``.
        min_rank: Lower bound of an adaptive rank.
        rank_pattern: Ranks of some modules by name, a mapping from substring or regular expression to a rank; the
            first that matches counts. It wins over ``rank``, and a param group's ``rank`` wins over it.
        state_budget: Most bytes that bases and moments of all projected weights may take together under an adaptive
            rank; ranks are capped so that it holds at every step. None is no cap.
        tracking_rho: Weight of the first moment in what ``subspace="track"`` or ``"blend"`` follows; the gradient has
            the rest. None is what ``method`` says, else 0.7.
        lift: How the low-rank update becomes a weight update. ``project_back``: basis times update times ``scale``;
            ``error_feedback``: the same, and what the projection leaves out is added to the next gradient;
            ``sign_residual``: and a step of signSGD along what it leaves out; ``whiten``: the update is whitened first;
            ``channel_scale`` and ``tensor_scale``: the full gradient, scaled as the low-rank step scales the low-rank
            gradient; ``scaled_residual``: ``project_back``, and what the basis leaves out of the gradient scaled so.
            ``auto`` is what ``method`` says, else ``project_back``.
        residual_scale: Factor on the learning rate of signSGD in ``lift="sign_residual"``: 1.0 for pre-training, 0.1
            for fine-tuning.
        transform: What is done to each gradient (of projected weights the low-rank one) before the wrapped optimizer
            sees it. ``spam``: entries far above the root of the optimizer's second moment are clipped to it;
            ``stable-spam``: the largest entries and the norm are held at what was usual. Both come with a reset.
            ``natural``: low-rank gradients are scaled by an inverse Fisher matrix of the last ones.
            ``auto`` is what ``method`` says, else ``none``.
        spam_theta: ``transform="spam"`` clips where the square of an entry is more than this times its second moment.
        natural_history: Low-rank gradients that ``transform="natural"`` remembers of each weight.
        natural_damping: Weight of the identity in its Fisher matrix, as a multiple of their mean squared norm.
        reset_gap: Optimizer steps after which the wrapped optimizer begins anew, for all parameters at once; 0 is
            never. None is what ``transform`` comes with: 500 for ``spam``, 1000 for ``stable-spam``, else 0.
        reset_warmup: Optimizer steps at the start and after each reset over which the learning rate rises along a
            cosine. None is what ``transform`` comes with: 150 for ``spam``, else 0.
        basis_storage: How a basis is kept: in the data type of the weight (``param``), in one of its own, as ``int8``
            or ``int4`` codes, read back orthonormal, or, of random ones, as the ``seed`` from which it is drawn again
            whenever it is read. ``auto`` is what ``method`` says, else ``param``.
        basis_placement: With weights that are sharded over processes (FSDP2): ``replicate`` keeps a basis on each of
            them, ``shard`` a part of it, and gathers it at each step. (Of a basis that acts on the sharded dimension
            each keeps its own rows in either case.) Without effect where weights are whole.
        weight_storage: How the projected weights of ``nn.Linear`` modules are kept: as they are (``param``), or as
            ``int8`` codes which the forward pass decodes. ``auto`` is what ``method`` says, else ``param``.
        moment_storage: ``8bit`` asks that the wrapped optimizer keep its moments in 8 bits or less, and refuses one
            that does not; ``base`` takes what it does. ``auto`` is what ``method`` says, else ``base``.
        accumulator_storage: How the low-rank gradients of ``mode="project"`` or ``"layerwise"`` wait from one
            micro-batch to the next: ``param``, a data type of their own, or ``int8`` codes, rounded stochastically.
        stochastic_round: Round weights that are kept in int8 or bf16 up or down at random, so that they are right in
            the mean and an update smaller than a rounding error is not lost. None is what ``method`` says, else True
            for int8 weights and False for others.
        fused_backward: Let ``nn.Linear`` modules and convolutions compute low-rank gradients directly between
            refreshes, in modes ``project`` and ``layerwise``: the full gradient is never formed, and on the right only
            ``X Q`` is kept of the input. Same gradients up to the order of sums; their full norm is not known then.
        compress_activations: With ``fused_backward``, project every weight of an ``nn.Linear`` so that only ``X Q`` is
            kept of its input: with ``proj_type="std"`` wide weights too are projected on the right then, which is
            another subspace, and the table of targets says so.
        clip_weight_norm: Clip the gradient of each parameter by itself to this norm, in every mode. Clipping by the
            global norm is the Trainer's ``gradient_clip_val``, which ``mode="layerwise"`` cannot honour.
        fix_signs: Fix the arbitrary signs of singular vectors, so that runs repeat across machines. ``False`` keeps
            LAPACK's signs, for parity with galore-torch.
        dense_lr_factor: Factor on the learning rate of the weights that are *not* projected. They get no ``scale``, so
            at GaLore's usual learning rates they move ``1 / scale`` times as fast as the projected ones.
        seed: Seed of the random subspaces. Each weight and refresh draws its own numbers from it.

    Raises:
        ValueError: If a value is out of range; the message names the argument, the value and the remedy.
        TypeError: If a value has the wrong type.

    Example:
        >>> GaLoreConfig(rank=8, scale=2.0).subspace
        'randomized'
        >>> GaLoreConfig(rank=8, method="galore").subspace
        'svd'
    """

    rank: Rank | Literal["auto"] = "auto"
    update_proj_gap: int | None = None
    scale: float | None = None
    proj_type: ProjType = "std"
    mode: Mode = "step"
    target_modules: str | type | Sequence[str | type] = "all-linear"
    ignore_modules: str | type | Sequence[str | type] = ()
    method: Method | None = None
    subspace: SubspaceName = "auto"
    random_after: int | None = None
    schedule: ScheduleName = "auto"
    stagger: bool | None = None
    refresh_share: float = 0.5
    refresh_warmup: int = 0
    min_gap: int | None = None
    max_gap: int | None = None
    grow_above: float = 0.7
    shrink_below: float = 0.4
    refresh_below: float = 0.7
    moments: MomentsName = "auto"
    rank_rule: RankRuleName = "auto"
    rank_energy: float = 0.9
    head_size: int = 64
    min_rank: int = 1
    rank_pattern: Mapping[str, Rank] | Sequence[tuple[str, Rank]] | None = None
    state_budget: int | None = None
    tracking_rho: float | None = None
    lift: LiftName = "auto"
    residual_scale: float = 1.0
    transform: TransformName = "auto"
    spam_theta: float = 5000.0
    natural_history: int = 4
    natural_damping: float = 1.0
    reset_gap: int | None = None
    reset_warmup: int | None = None
    basis_storage: BasisStorage = "auto"
    basis_placement: BasisPlacement = "replicate"
    weight_storage: WeightStorage = "auto"
    moment_storage: MomentStorage = "auto"
    accumulator_storage: AccumulatorStorage = "param"
    stochastic_round: bool | None = None
    fused_backward: bool = False
    compress_activations: bool = False
    clip_weight_norm: float | None = None
    fix_signs: bool = True
    dense_lr_factor: float = 1.0
    seed: int = 0

    # The axes that the user left open. Not a field: equal settings are equal, whoever named them.
    _opened: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_choice("method", self.method, (None, *METHODS))
        opened = opened_axes(self)
        for axis, choice in opened.items():
            object.__setattr__(self, axis, choice)
        object.__setattr__(self, "_opened", frozenset(opened))
        object.__setattr__(self, "rank", as_rank("rank", self.rank))
        object.__setattr__(self, "rank_pattern", as_rank_pattern("rank_pattern", self.rank_pattern))
        check_numbers(self)
        check_fused(self)
        check_schedule(self)
        check_subspace(self)
        check_resets(self)
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), get_args(choices))
        for name in ("compress_activations", "fix_signs", "fused_backward", "stagger", "stochastic_round"):
            check_bool(name, getattr(self, name))
        target = self.target_modules
        if not isinstance(target, str):
            object.__setattr__(self, "target_modules", as_patterns("target_modules", target))
        if not self.target_modules:
            raise ValueError(
                f'target_modules={target!r} selects nothing; use "all-linear", a regular expression or a list.'
            )
        object.__setattr__(self, "ignore_modules", as_patterns("ignore_modules", self.ignore_modules))

    def names_setting(self, name: str) -> bool:
        """Whether a setting was given, and not left open to ``method`` and the defaults."""
        return name not in self._opened

    @property
    def width(self) -> Rank:
        """``rank``, which is no word once the configuration is made."""
        assert not isinstance(self.rank, str)
        return self.rank

    @property
    def gap(self) -> int:
        """``update_proj_gap``, which is a number once the configuration is made."""
        assert self.update_proj_gap is not None
        return self.update_proj_gap

    @property
    def factor(self) -> float:
        """``scale``, which is a number once the configuration is made."""
        assert self.scale is not None
        return self.scale

    @property
    def by_modes(self) -> bool:
        """Whether weights of order > 2 are projected along each mode, instead of folded into a matrix."""
        return self.subspace in BY_MODES

    @property
    def adaptive_rank(self) -> bool:
        """Whether ``rank`` is only the upper bound of each weight's rank."""
        return self.rank_rule != "fixed"

    def gap_bounds(self, gap: int) -> tuple[int, int]:
        """Least and largest gap of a weight whose ``update_proj_gap`` is ``gap``."""
        low = max(1, gap // 4) if self.min_gap is None else self.min_gap
        return low, 8 * gap if self.max_gap is None else self.max_gap

    def rank_named(self, module: str, *, named: Rank | None = None) -> Rank:
        """The rank of a weight as it was set.

        Args:
            module: Name of the weight's module.
            named: The ``rank`` of its param group, which wins.
        """
        if named is not None:
            return as_rank("rank", named)
        return next((rank for pattern, rank in self.rank_patterns if names(pattern, module)), self.width)

    def rank_of(self, module: str, shape: tuple[int, int], *, named: Rank | None = None) -> int:
        """Width of the basis of a matrix; under an adaptive rank its upper bound.

        Args:
            module: Name of the weight's module.
            shape: ``(m, n)`` of the weight.
            named: The ``rank`` of its param group, which wins.

        Raises:
            ValueError: If the rank has an entry for each mode of a tensor.
        """
        rank = self.rank_named(module, named=named)
        if isinstance(rank, tuple):
            raise ValueError(
                f"rank={rank} for {module} of shape {shape}: a matrix has one rank. Give it one by rank_pattern or in "
                "its param group, or leave it out by ignore_modules."
            )
        return max(1, round(rank * min(shape))) if isinstance(rank, float) else rank

    def has_heads(self, module: str) -> bool:
        """Whether a weight's basis may come from some of its heads.

        Args:
            module: Name of the weight's module.
        """
        return self.subspace == "cross_head" and re.fullmatch(HEADED, module) is not None

    @property
    def rank_patterns(self) -> tuple[tuple[str, Rank], ...]:
        """``rank_pattern`` as pairs, as which it is kept."""
        return self.rank_pattern  # type: ignore[return-value]

    @classmethod
    def from_galore_torch(cls, group: Mapping[str, Any], **overrides: Any) -> GaLoreConfig:
        """Map a param group of ``galore_torch`` (keys ``rank``, ``update_proj_gap``, ``scale``, ``proj_type``).

        Missing keys get galore-torch's own defaults (gap 200, scale 1.0, ``std``), and the subspace is its exact SVD
        with unfixed signs. Other keys of the group (``params``, ``lr``, ...) are the optimizer's and are left alone.

        Args:
            group: The param group as it was given to ``galore_torch.GaLoreAdamW``.
            **overrides: Any argument of this class; wins over the group.

        Raises:
            ValueError: If the group has no ``rank`` (galore-torch would not project it), or asks for ``dim > 2``.

        Example:
            >>> GaLoreConfig.from_galore_torch({"params": [], "rank": 4, "scale": 4.0}).update_proj_gap
            200
        """
        if group.get("rank") is None and "rank" not in overrides:
            raise ValueError(f"group={sorted(group)} has no 'rank', so galore-torch trains it full-rank; add rank=...")
        if group.get("dim", 2) != 2:
            raise ValueError(
                f"group['dim']={group['dim']!r}: only matrices (dim=2) can be mapped; leave this group full-rank."
            )
        legacy = {"method": "galore", "update_proj_gap": 200, "scale": 1.0, "proj_type": "std", "fix_signs": False}
        named = {key: group[key] for key in GROUP_KEYS if group.get(key) is not None}
        return cls(**{**legacy, **named, **overrides})

    def for_group(self, group: Mapping[str, Any]) -> GaLoreConfig:
        """This configuration with the keys of one param group applied (those in ``GROUP_KEYS``).

        Args:
            group: A param group of the wrapped optimizer.

        Raises:
            ValueError: If a key's value is out of range.
        """
        named = {key: group[key] for key in GROUP_KEYS if group.get(key) is not None}
        return dataclasses.replace(self, **named) if named else self

    def with_settings(self, **settings: Any) -> GaLoreConfig:
        """This configuration with some arguments changed; a ``method`` among them fills the axes that were left open.

        Args:
            **settings: Any argument of this class.

        Example:
            >>> GaLoreConfig(rank=8).with_settings(method="galore").subspace
            'svd'
        """
        opened = {axis: None if axis in NONE_IS_OPEN else "auto" for axis in self._opened}
        return dataclasses.replace(self, **{**opened, **settings})
