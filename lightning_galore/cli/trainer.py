# SPDX-License-Identifier: Apache-2.0
"""LightningCLI with our defaults: ``fit``, ``validate``, ``test`` and ``predict``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from jsonargparse import Namespace
from lightning import Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from typing_extensions import override

# The tasks are imported for their effect: their classes become known by their short names.
import lightning_galore.tasks  # noqa: F401
from lightning_galore import RandomStates, __version__
from lightning_galore.cli import endings, exits
from lightning_galore.cli.exits import PROG
from lightning_galore.cli.mistakes import check_checkpoint, close_to, subclasses
from lightning_galore.cli.parsers import Parser

TRAINER_COMMANDS = {
    "fit": "train a model (-c recipe.yaml, or class paths and options)",
    "validate": "score a model on the validation data",
    "test": "score a model on the test data",
    "predict": "run a model over the prediction data",
}
# Headings of the help, where the parent takes the first line of a base class's docstring.
_GROUPS = {
    "trainer": "The Trainer (--trainer.strategy.help GaLoreStrategy lists the settings of GaLore)",
    "model": "The model: a LightningModule (--model.help CLASS lists its settings)",
    "data": "The data: a LightningDataModule (--data.help CLASS lists its settings)",
    "optimizer": "An optimizer in place of the model's own, over all of its parameters",
    "lr_scheduler": "A learning rate scheduler, with --optimizer",
}


class _Progress(Callback):
    """Knows whether a batch has been begun: from then on an error is one of the run, not of the command line."""

    def __init__(self) -> None:
        self.begun = False

    def _begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = True

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _begin


class GaLoreCLI(LightningCLI):
    """LightningCLI whose data follow the model's task and tokenizer, so that a recipe states each of them once.

    Args:
        args: The arguments; ``sys.argv`` by default.
        run: Whether the first argument is a Trainer command to run. Without, the objects are only made.
        trainer_defaults: Other defaults of the Trainer.
        prog: The command's name in its help.
    """

    def __init__(
        self,
        *,
        args: ArgsType = None,
        run: bool = True,
        trainer_defaults: dict[str, Any] | None = None,
        prog: str = PROG,
    ) -> None:
        self._progress = _Progress()
        defaults = trainer_defaults or {}
        super().__init__(
            # A run that is stopped goes on as if it had not been, dropout included.
            trainer_defaults={**defaults, "callbacks": [RandomStates(), *defaults.get("callbacks", [])]},
            save_config_kwargs={"overwrite": True},  # a second run without a logger writes into the same folder
            parser_class=Parser,
            parser_kwargs={
                "prog": prog,
                "description": "Train with low-rank gradients under PyTorch Lightning.",
                "dump_header": [f"lightning-galore=={__version__}"],
            },
            args=args,
            run=run,
        )

    @override
    def _add_arguments(self, parser: LightningArgumentParser) -> None:
        super()._add_arguments(parser)
        groups = parser.groups or {}
        for name in _GROUPS.keys() & groups.keys():
            groups[name].title = _GROUPS[name]
        command = parser.prog if not hasattr(self, "_subcommand_parsers") else f"{PROG} COMMAND"
        parser.usage = f"{command} -c RECIPE.yaml [--KEY VALUE ...]"
        parser.epilog = (
            "Every key of a recipe is an option, and options win over the recipe: --trainer.max_epochs 3, "
            "--trainer.strategy.rank 64. --print_config prints the whole configuration, which runs as it is (-c)."
        )

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.usage = (parser.usage or "").replace("COMMAND", subcommand)
        parser.description = f"{TRAINER_COMMANDS[subcommand].capitalize()}."
        for group in parser._action_groups:
            if group.title and any(action.dest == "ckpt_path" for action in group._group_actions):
                group.title = "The checkpoint"
        return parser

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the arguments that model and data share; classes that lack them are left alone."""
        if not hasattr(self, "_subcommand_parsers"):
            # The configuration that a run has saved says these too.
            for name in ("ckpt_path", "weights_only", "verbose", "return_predictions"):
                parser.add_argument(f"--{name}", default=None, help=argparse.SUPPRESS)
        parser.link_arguments("model.init_args.task", "data.init_args.task")
        parser.link_arguments("model.init_args.model", "data.init_args.tokenizer")
        parser.link_arguments("model.init_args.model", "data.init_args.model")
        parser.link_arguments("data.init_args.vocab_size", "model.init_args.vocab_size")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse ``args``, without the parent's warning when the program has a command line of its own."""
        self.config = parser.parse_args(args) if args is None or isinstance(args, list) else parser.parse_object(args)
        command = self.config.get("subcommand")
        if command:  # before data and weights are loaded, which takes a while
            check_checkpoint(self.config[command].get("ckpt_path"))

    @override
    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        # The parent hands model.parameters() to `--optimizer` at once; a lazily made network has none before this.
        if self._get(self.config_init, "optimizer"):
            self.model.configure_model()
        super()._add_configure_optimizers_method_to_model(subcommand)

    @override
    def before_instantiate_classes(self) -> None:
        """Take a strategy by the bare name of its class, as other classes are taken."""
        trainer = self._get(self.config, "trainer")
        name, known = trainer.strategy, {cls.__name__: cls for cls in subclasses(Strategy)}
        if not isinstance(name, str):
            return
        if name in known:
            trainer.strategy = Namespace(class_path=f"{known[name].__module__}.{name}", init_args=Namespace())
        elif name.lower() not in StrategyRegistry:
            near = close_to(name, [*known, *StrategyRegistry])
            if near:
                raise ValueError(f"trainer.strategy={name!r} is not known.{near}")

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        self.trainer.callbacks.append(self._progress)  # type: ignore[attr-defined]
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as end:  # what Lightning makes of Ctrl-C
            if isinstance(end.__context__, KeyboardInterrupt):
                raise exits.Interrupted(self._how_to_go_on(subcommand)) from None
            raise
        except Exception as error:
            if self._progress.begun:
                raise exits.RunError from error
            raise
        said = endings.after(subcommand, self.trainer)
        if said and self.trainer.is_global_zero:
            sys.stderr.write(f"{PROG}: {said}\n")

    def _how_to_go_on(self, subcommand: str) -> str:
        if subcommand != "fit":
            return ""
        saved = getattr(self.trainer.checkpoint_callback, "last_model_path", "") or getattr(
            self.trainer.checkpoint_callback, "best_model_path", ""
        )
        if not saved:
            return "no checkpoint has been written yet."
        return f"the same command with --ckpt_path {saved} goes on from the last checkpoint."


class ParsedOnly(GaLoreCLI):
    """Checks a recipe and makes nothing of it: neither data nor weights need to be there."""

    @override
    def instantiate_classes(self) -> None:
        """Leave it at the settings."""
