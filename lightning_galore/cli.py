# SPDX-License-Identifier: Apache-2.0
"""The command line: ``lightning-galore fit | validate | test | predict | targets | plan | convert | ...``."""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import AdamW
from typing_extensions import override

# The tasks are imported for their effect: GlueModule and GlueDataModule become known by their short names.
import lightning_galore.tasks  # noqa: F401
from lightning_galore import GaLoreConfig, GaLoreOptimizer, GaLoreStrategy, __version__

if TYPE_CHECKING:
    from lightning_galore.planner import Job
    from lightning_galore.planner.command import PlanOptions

PROG = "lightning-galore"
_TRACEBACK_FLAG = "--traceback"
_TRACEBACK_VARIABLE = "LIGHTNING_GALORE_TRACEBACK"
_TRAINER_COMMANDS = {
    "fit": "train a model (-c recipe.yaml, or class paths and options)",
    "validate": "score a model on the validation data",
    "test": "score a model on the test data",
    "predict": "run a model over the prediction data",
}
#: What a mistake of the user raises; anything else is ours and is shown with its traceback.
_USER_ERRORS = (ValueError, OSError, ModuleNotFoundError, MisconfigurationException)


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
        super().__init__(
            trainer_defaults=trainer_defaults,
            save_config_kwargs={"overwrite": True},  # a second run without a logger writes into the same folder
            parser_kwargs={"prog": prog, "description": "Train with low-rank gradients under PyTorch Lightning."},
            args=args,
            run=run,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the arguments that model and data share; classes that lack them are left alone."""
        parser.link_arguments("model.init_args.task", "data.init_args.task")
        parser.link_arguments("model.init_args.model", "data.init_args.tokenizer")
        parser.link_arguments("model.init_args.model", "data.init_args.model")
        parser.link_arguments("data.init_args.vocab_size", "model.init_args.vocab_size")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse ``args``, without the parent's warning when the program has a command line of its own."""
        self.config = parser.parse_args(args) if args is None or isinstance(args, list) else parser.parse_object(args)

    @override
    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        # The parent hands model.parameters() to `--optimizer` at once; a lazily made network has none before this.
        if self._get(self.config_init, "optimizer"):
            self.model.configure_model()
        super()._add_configure_optimizers_method_to_model(subcommand)


def _targets(args: list[str]) -> None:
    """Print which weights a configuration would project, without training."""
    cli = GaLoreCLI(args=args, run=False, prog=f"{PROG} targets")
    strategy = cli.trainer.strategy
    if not isinstance(strategy, GaLoreStrategy):
        raise ValueError(
            f"trainer.strategy is {type(strategy).__name__}, which projects nothing. Give a configuration with "
            "trainer.strategy=lightning_galore.GaLoreStrategy, or add --trainer.strategy=galore."
        )
    cli.model.configure_model()
    # AdamW stands for the optimizer: which weights are taken depends on the model and the strategy's settings only.
    optimizer = GaLoreOptimizer(AdamW(cli.model.parameters()), cli.model, strategy.config)
    sys.stdout.write(f"{optimizer.targets_table()}\n")


def _plan(args: list[str]) -> None:
    """Say how much memory a run would take, without running it."""
    from lightning_galore.planner import command

    parser = ArgumentParser(prog=f"{PROG} plan", description=(command.PlanOptions.__doc__ or "").partition("\n")[0])
    parser.add_class_arguments(command.PlanOptions, as_positional=True)
    # A recipe as the other commands take it, too.
    given = [arg.removeprefix("--config=") for arg in args if arg not in ("-c", "--config")]
    command.run(command.PlanOptions(**parser.parse_args(_with_switches(given)).as_dict()), _read_recipe)


def _with_switches(args: list[str]) -> list[str]:
    """``--json`` alone means ``--json true``."""
    following = [*args[1:], "--"]
    switches = ("--json", "--download", "--bases_sharded", "--checkpointing")
    bare = [
        arg in switches and after.lower() not in ("true", "false") for arg, after in zip(args, following, strict=True)
    ]
    return [f"{arg}=true" if alone else arg for arg, alone in zip(args, bare, strict=True)]


def _read_recipe(path: str, options: PlanOptions) -> tuple[Job, GaLoreConfig]:
    from lightning_galore.tasks.planned import module_job, named_model_job, precision_named, strategy_settings

    args, prog = ["-c", path], f"{PROG} plan"
    recipe = _ParsedOnly(args=args, run=False, prog=prog).config
    config = strategy_settings(recipe.trainer.strategy)
    job = named_model_job(recipe, options)
    if job is not None:
        return job, config
    cli = GaLoreCLI(args=args, run=False, prog=prog)
    return module_job(cli.model, options, precision=precision_named(cli.trainer.precision)), config


class _ParsedOnly(GaLoreCLI):
    """Checks a recipe and makes nothing of it: neither data nor weights need to be there."""

    @override
    def instantiate_classes(self) -> None:
        pass


def _convert(args: list[str]) -> None:
    """Convert a checkpoint of galore-torch."""
    from lightning_galore.convert import convert_checkpoint

    parser = ArgumentParser(prog=f"{PROG} convert")
    parser.add_function_arguments(convert_checkpoint, as_positional=True)
    options = parser.parse_args(args)
    sys.stdout.write(f"{convert_checkpoint(**options.as_dict())}\n")


def _export(args: list[str]) -> None:
    """Write a checkpoint with int8 weights in floating point."""
    from lightning_galore.export import export_weights

    parser = ArgumentParser(prog=f"{PROG} export")
    parser.add_function_arguments(export_weights, as_positional=True)
    options = parser.parse_args(args)
    sys.stdout.write(f"{export_weights(**options.as_dict())}\n")


def _report(args: list[str]) -> None:
    """Draw a run from its logs."""
    from lightning_galore.report import write_report

    parser = ArgumentParser(prog=f"{PROG} report")
    parser.add_function_arguments(write_report, as_positional=True)
    options = parser.parse_args(args)
    sys.stdout.write(f"{write_report(**options.as_dict())}\n")


_COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "targets": (_targets, "list which weights a configuration would project, and why not the others"),
    "plan": (_plan, "say how much memory training would take, for several ways to train, without running"),
    "convert": (_convert, "turn a checkpoint of galore-torch into one for this package"),
    "export": (_export, "write a checkpoint with int8 weights in floating point, for any program"),
    "report": (_report, "draw a run from its logs: loss, subspaces, refreshes, memory, as one HTML page"),
}


def _top_parser() -> argparse.ArgumentParser:
    rows = {**_TRAINER_COMMANDS, **{name: text for name, (_, text) in _COMMANDS.items()}}
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Low-rank gradient training (GaLore) for PyTorch Lightning.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<10} {text}" for name, text in rows.items())
        + f"\n\n`{PROG} COMMAND --help` shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    parser.add_argument(
        _TRACEBACK_FLAG, action="store_true", help=f"show errors with their traceback (also {_TRACEBACK_VARIABLE}=1)"
    )
    parser.add_argument("command", choices=rows, metavar="COMMAND", help="what to do, see below")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="options of the command")
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: The arguments, without the program's name; ``sys.argv`` by default.

    Returns:
        The exit status: 0, 1 after an error in the configuration or the data, 130 after Ctrl-C. Wrong options exit
        with status 2.
    """
    given = list(sys.argv[1:] if args is None else args)
    # Anywhere on the line: a user adds it at the end of a command that has just failed.
    with_traceback = _TRACEBACK_FLAG in given
    options = _top_parser().parse_args([arg for arg in given if arg != _TRACEBACK_FLAG])

    def run() -> int:
        if options.command in _COMMANDS:
            _COMMANDS[options.command][0](options.options)
        else:
            GaLoreCLI(args=[options.command, *options.options])
        return 0

    return exit_status(run, prog=PROG, with_traceback=with_traceback)


def exit_status(run: Callable[[], int], *, prog: str, with_traceback: bool = False) -> int:
    """Call ``run`` and turn the errors that a user can mend into one line and an exit status.

    Args:
        run: What to do; returns the exit status.
        prog: The program's name, which starts the line.
        with_traceback: Show the whole traceback instead of one line.
    """
    try:
        return run()
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{prog}: interrupted\n")
        return 130
    except _USER_ERRORS as error:
        if with_traceback or os.environ.get(_TRACEBACK_VARIABLE, "0") not in ("", "0"):
            traceback.print_exc()
        else:
            message = _own_message(error)
            sys.stderr.write(f"{prog}: error: {message}\n({_TRACEBACK_VARIABLE}=1 shows where it was raised)\n")
        return 1


def _own_message(error: BaseException) -> str:
    """What a constructor said, without the account of union types that jsonargparse wraps around it."""
    union = "Does not validate against any of the Union"
    while union in str(error):
        # One line for each type of the union; what matters is not that a class is no string.
        said = [
            line for line in re.findall(r"^ *- (.*)$", str(error), re.MULTILINE) if not line.startswith("Expected a")
        ]
        if said:
            return str(said[-1])
        if error.__cause__ is None:
            break
        error = error.__cause__
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
