# SPDX-License-Identifier: Apache-2.0
"""Wiring of low-rank training into the Trainer: wrap what ``configure_optimizers`` returned."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch.core.optimizer import LightningOptimizer, _MockOptimizer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_galore.config import (
    AccumulatorStorage,
    BasisPlacement,
    BasisStorage,
    GaLoreConfig,
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
from lightning_galore.config.checks import check_int
from lightning_galore.optimizer import GaLoreOptimizer
from lightning_galore.strategies.backward_modes import BackwardModes
from lightning_galore.strategies.checks import check_backward_mode, warn_of_small_weights
from lightning_galore.strategies.int8_weights import check_optimizers, prepare_to_load, prepare_to_train
from lightning_galore.strategies.sharded_files import consolidated
from lightning_galore.target_table import TargetTable
from lightning_galore.targets import NoTargetsError

log = logging.getLogger(__name__)

BaseName = Literal["auto", "single_device", "ddp", "model_parallel"]
_SETTINGS = tuple(field.name for field in dataclasses.fields(GaLoreConfig))


class GaLoreStrategy(BackwardModes):
    """Low-rank gradient training in one line: ``Trainer(strategy=GaLoreStrategy(rank=256))``.

    Your LightningModule, its optimizer, schedulers and callbacks stay as they are: the strategy wraps every optimizer
    that ``configure_optimizers`` returns in a :class:`~lightning_galore.GaLoreOptimizer`. An instance becomes a
    real Lightning strategy (``GaLoreSingleDeviceStrategy``) once the Trainer knows its devices. It is also registered
    as ``strategy="galore"`` when ``lightning_galore`` is imported.

    Args:
        rank: Width of the gradient subspace, or as a fraction of a weight's short side; of a tensor also one for each
            mode; auto is the method's, else 128.
        update_proj_gap: Optimizer steps between two refreshes of a weight's subspace; None is the method's, else 200.
        scale: Factor on the projected-back update, or on the scaled gradient; None is the method's, else 0.25.
        proj_type: Which side is projected: std, reverse_std, left, right or full.
        mode: When gradients are projected and weights move: step, project (frees full gradients in backward) or
            layerwise (moves the weights in backward too).
        target_modules: "all-linear", a regular expression on module names, or a list of substrings and classes.
        ignore_modules: Modules to leave out.
        method: A preset by name: galore, galore2, galore-track, galore-8bit, q-galore, ldadam, frugal, golore, swan,
            spam, stable-spam, natural-galore, adarankgrad, galore-plus, apollo, apollo-mini, apollo-svd,
            q-apollo, fira or tensor-galore; settings you name win over it.
        subspace: How a basis is found: randomized, svd, gram, power, track, blend, columns, random_orthonormal,
            gaussian, coordinates, block, cross_head, tucker (weights of order > 2 along each mode) or tucker_warm (the
            same from the last bases).
        random_after: From this many steps of a weight on its bases are random orthonormal ones.
        schedule: When a basis is refreshed: fixed, adaptive (by overlap), cos (Q-GaLore's rule) or energy.
        stagger: Spread the refreshes of the weights over the gap; None is the method's, else True.
        refresh_share: Most time that first refreshes may add to a step, as a share of an ordinary optimizer step.
        refresh_warmup: Steps at the start during which the gap grows to update_proj_gap.
        min_gap: Lower bound of a gap that changes.
        max_gap: Upper bound of a gap that changes.
        grow_above: Share of a fresh basis's worth above which "adaptive" doubles the gap.
        shrink_below: Share below which it halves it.
        refresh_below: Share of a fresh basis's energy below which "energy" refreshes.
        moments: What happens to the moments at a refresh: keep, rotate, rotate_first or reset.
        rank_rule: fixed, or a rank that follows the gradient: energy, energy_shrink (never more than before) or
            noise_edge.
        rank_energy: Share of the gradient's energy that the rank holds.
        head_size: Rows of one attention head, for subspace="cross_head".
        min_rank: Lower bound of an adaptive rank.
        rank_pattern: Ranks of some modules, a mapping from substring or regular expression to rank.
        state_budget: Most bytes of bases and moments together under an adaptive rank.
        tracking_rho: Weight of the first moment in what subspace="track" or "blend" follows.
        lift: How the low-rank update becomes a weight update: project_back, error_feedback, sign_residual, whiten,
            channel_scale, tensor_scale or scaled_residual.
        residual_scale: Factor on the learning rate of signSGD in lift="sign_residual".
        transform: What is done to each gradient before the optimizer sees it: none, spam, stable-spam or natural.
        spam_theta: Threshold of transform="spam", as a multiple of the second moment.
        natural_history: Low-rank gradients that transform="natural" remembers of each weight.
        natural_damping: Weight of the identity in its Fisher matrix, in their mean squared norm.
        reset_gap: Steps after which the wrapped optimizer begins anew; 0 is never, None is the transform's.
        reset_warmup: Steps over which the learning rate rises after a reset; None is the transform's.
        basis_storage: How a basis is kept: param, fp32, bf16, fp16, int8, int4, or as the seed of a random one.
        basis_placement: Under FSDP2, whether each device keeps a basis whole (replicate) or a part of it (shard).
        weight_storage: How projected weights are kept: param or int8.
        moment_storage: "8bit" refuses an optimizer that keeps its moments in more bits; "base" takes what it does.
        accumulator_storage: How low-rank gradients wait for the next micro-batch: param, fp32, bf16 or int8.
        stochastic_round: Round int8 and bf16 weights up or down at random, right in the mean.
        fused_backward: Compute low-rank gradients in the backward of nn.Linear, never full ones (project, layerwise).
        compress_activations: With it, keep only low-rank inputs for backward, all projected on the right.
        clip_weight_norm: Clip the gradient of each parameter by itself to this norm.
        fix_signs: Fix the arbitrary signs of singular vectors.
        dense_lr_factor: Factor on the learning rate of the weights that are not projected.
        seed: Seed of the random subspaces.
        check_replicas_every: On several devices, every so many optimizer steps compare weights and bases bit by bit,
            and raise an error that names those which differ; 0 is never.
        base: The Lightning strategy to run on: "single_device", "ddp", "model_parallel" (FSDP2); "auto" picks one of
            the first two by the Trainer's devices.
        **kwargs: Arguments of that Lightning strategy.

    Raises:
        ValueError: If a setting is out of range; the message names it, its value and the remedy.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy=GaLoreStrategy(rank=8), accelerator="cpu", logger=False)
        >>> type(trainer.strategy).__name__
        'GaLoreSingleDeviceStrategy'
    """

    #: Keywords that the Lightning strategy hands on to what it makes.
    handed_on: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        rank: Rank | Literal["auto"] = "auto",
        update_proj_gap: int | None = None,
        scale: float | None = None,
        proj_type: ProjType = "std",
        mode: Mode = "step",
        target_modules: str | type | Sequence[str | type] = "all-linear",
        ignore_modules: str | type | Sequence[str | type] = (),
        method: Method | None = None,
        subspace: SubspaceName = "auto",
        random_after: int | None = None,
        schedule: ScheduleName = "auto",
        stagger: bool | None = None,
        refresh_share: float = 0.5,
        refresh_warmup: int = 0,
        min_gap: int | None = None,
        max_gap: int | None = None,
        grow_above: float = 0.7,
        shrink_below: float = 0.4,
        refresh_below: float = 0.7,
        moments: MomentsName = "auto",
        rank_rule: RankRuleName = "auto",
        rank_energy: float = 0.9,
        head_size: int = 64,
        min_rank: int = 1,
        rank_pattern: dict[str, Rank] | None = None,
        state_budget: int | None = None,
        tracking_rho: float | None = None,
        lift: LiftName = "auto",
        residual_scale: float = 1.0,
        transform: TransformName = "auto",
        spam_theta: float = 5000.0,
        natural_history: int = 4,
        natural_damping: float = 1.0,
        reset_gap: int | None = None,
        reset_warmup: int | None = None,
        basis_storage: BasisStorage = "auto",
        basis_placement: BasisPlacement = "replicate",
        weight_storage: WeightStorage = "auto",
        moment_storage: MomentStorage = "auto",
        accumulator_storage: AccumulatorStorage = "param",
        stochastic_round: bool | None = None,
        fused_backward: bool = False,
        compress_activations: bool = False,
        clip_weight_norm: float | None = None,
        fix_signs: bool = True,
        dense_lr_factor: float = 1.0,
        seed: int = 0,
        check_replicas_every: int = 0,
        base: BaseName = "auto",
        **kwargs: Any,
    ) -> None:
        given = dict(locals())  # a test holds that each argument arrives in the configuration
        # Here and not in __new__: jsonargparse would read the signature of that one.
        concrete = _concrete_class(base)
        if type(self) is GaLoreStrategy:
            self.__class__ = concrete
        self._only_one = base == "single_device"
        _check_names(type(self), kwargs)
        check_int("check_replicas_every", check_replicas_every, minimum=0, remedy="0 never compares")
        self.check_replicas_every = check_replicas_every
        self.device_named = "device" in kwargs
        super().__init__(**kwargs)
        self.config = GaLoreConfig(**{name: given[name] for name in _SETTINGS})

    @override
    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file, or the folder of a sharded run, which is put together first."""
        path = Path(checkpoint_path)
        if (path / _METADATA_FILENAME).is_file():
            return consolidated(path)
        return super().load_checkpoint(checkpoint_path, *args, **kwargs)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the model's weights, whether they are int8 in the checkpoint, in this run, or in both."""
        if self.lightning_module is not None:
            checkpoint = prepare_to_load(checkpoint, self.lightning_module, self.config)
        super().load_model_state_dict(checkpoint, strict)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        """Let Lightning run ``configure_optimizers`` and normalise what it returned, then wrap each optimizer.

        Only here, and not around ``configure_optimizers``: Lightning checks that every scheduler holds an optimizer
        that was returned. The schedulers keep the user's object, whose param groups are those of the wrapper.
        """
        self._remove_hooks()
        assert self.lightning_module is not None
        prepare_to_train(trainer, self.lightning_module, self.config)
        super().setup_optimizers(trainer)
        unwrapped: list[NoTargetsError] = []
        wrapped = list(self.optimizers)
        for i, optimizer in enumerate(self.optimizers):
            wrapped[i] = self._wrap(optimizer, unwrapped)
            # At once, so that teardown takes the hooks of this one off the parameters if what follows is refused.
            self.optimizers = wrapped
        galore = [optimizer for optimizer in wrapped if isinstance(optimizer, GaLoreOptimizer)]
        if unwrapped and not galore:
            raise unwrapped[0]
        for error in unwrapped:
            rank_zero_warn(f"One of the optimizers has no weight to project and stays as it is. {error}")
        check_backward_mode(self.config, trainer, self.lightning_module, wrapped)
        check_optimizers(self.lightning_module, wrapped, self.config)
        for optimizer in galore:
            optimizer.hooks.armed = False
            if self.config.mode != "step":
                optimizer.attach()
            if self.config.mode == "layerwise" and trainer.gradient_clip_val:
                optimizer.hooks.clip_value = float(trainer.gradient_clip_val)
            table = optimizer.targets_table()
            rank_zero_info(f"GaLore: {table.summary()}")
            log.debug("%s", table)
            if not optimizer.targets:
                rank_zero_warn("No weight is projected until frozen ones are unfrozen and added to the optimizer.")
            warn_of_small_weights(table, self.config.width)

    def targets_tables(self) -> list[TargetTable]:
        """The table of every parameter, one for each wrapped optimizer; empty before ``fit``."""
        return [optimizer.targets_table() for optimizer in self._galore_optimizers()]

    def _wrap(self, optimizer: Optimizer, unwrapped: list[NoTargetsError]) -> Optimizer:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        if isinstance(optimizer, (GaLoreOptimizer, _MockOptimizer)):
            return optimizer
        try:
            return GaLoreOptimizer(optimizer, self.lightning_module, self.config)
        except NoTargetsError as error:
            unwrapped.append(error)
            return optimizer

    # What Strategy leaves abstract comes from the Lightning strategy that follows in the MRO of every instance's class.
    # Spelled out so that this class counts as concrete: for type checkers, and for LightningCLI as a class_path.

    @property
    @override
    def root_device(self) -> torch.device:
        return super().root_device  # type: ignore[safe-super]

    @property
    @override
    def is_global_zero(self) -> bool:
        return super().is_global_zero  # type: ignore[safe-super]

    @override
    def model_to_device(self) -> None:
        super().model_to_device()  # type: ignore[safe-super]

    @override
    def reduce(self, tensor: Tensor | Any, *args: Any, **kwargs: Any) -> Tensor | Any:
        return super().reduce(tensor, *args, **kwargs)  # type: ignore[safe-super]

    @override
    def barrier(self, name: str | None = None) -> None:
        super().barrier(name)  # type: ignore[safe-super]

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return super().broadcast(obj, src)  # type: ignore[safe-super]

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        return super().all_gather(tensor, group, sync_grads)  # type: ignore[safe-super]


def _concrete_class(base: str) -> type[GaLoreStrategy]:
    from lightning_galore.strategies.ddp import GaLoreDDPStrategy
    from lightning_galore.strategies.model_parallel import GaLoreModelParallelStrategy
    from lightning_galore.strategies.single_device import GaLoreAutoStrategy

    # Which device, and how many there are, is known once the Trainer has said so.
    classes: dict[str, type[GaLoreStrategy]] = {
        "auto": GaLoreAutoStrategy,
        "single_device": GaLoreAutoStrategy,
        "ddp": GaLoreDDPStrategy,
        "model_parallel": GaLoreModelParallelStrategy,
    }
    if base not in classes:
        raise ValueError(f"base={base!r} is not known; choose one of {', '.join(map(repr, classes))}.")
    return classes[base]


def _check_names(cls: type[GaLoreStrategy], kwargs: Mapping[str, Any]) -> None:
    """Refuse a misspelt keyword in our words: it would reach a Lightning class that the user has not named."""
    known = set(cls.handed_on) | {
        name
        for parent in cls.__mro__
        if issubclass(parent, Strategy) and "__init__" in vars(parent)
        for name in inspect.signature(parent.__init__).parameters
    }
    for name in sorted(set(kwargs) - known):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "GaLoreConfig describes every setting."
        raise TypeError(f"GaLoreStrategy got an unknown argument {name}={kwargs[name]!r}; {hint}")
