# SPDX-License-Identifier: Apache-2.0
"""The commands that do not train: ``targets``, ``plan``, ``convert``, ``export``, ``report``, ``completion``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.optim import AdamW

from lightning_galore import GaLoreOptimizer, GaLoreStrategy
from lightning_galore.cli.exits import PROG
from lightning_galore.cli.noise import without_weights_bar
from lightning_galore.cli.parsers import Parser, first_line, without_marks
from lightning_galore.cli.trainer import GaLoreCLI, ParsedOnly

if TYPE_CHECKING:
    from lightning_galore.planner.command import PlanOptions, Read


@contextmanager
def _untold() -> Iterator[None]:
    """Without what Lightning logs of a seed and a Trainer that nothing will be trained with."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("fabric", "pytorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def targets(args: list[str]) -> None:
    """Print which weights a configuration would project, without training."""
    with _untold():
        cli = GaLoreCLI(args=args, run=False, prog=f"{PROG} targets")
    strategy = cli.trainer.strategy
    if not isinstance(strategy, GaLoreStrategy):
        raise ValueError(
            f"trainer.strategy is {type(strategy).__name__}, which projects nothing. Give a configuration with "
            "trainer.strategy=lightning_galore.GaLoreStrategy, or add --trainer.strategy=galore."
        )
    with without_weights_bar():
        cli.model.configure_model()
    # AdamW stands for the optimizer: which weights are taken depends on the model and the strategy's settings only.
    optimizer = GaLoreOptimizer(AdamW(cli.model.parameters()), cli.model, strategy.config)
    sys.stdout.write(f"{optimizer.targets_table()}\n")


def plan(args: list[str]) -> None:
    """Say how much memory a run would take, without running it."""
    from lightning_galore.planner import command

    # A recipe as the other commands take it, too.
    given = [arg.removeprefix("--config=") for arg in args if arg not in ("-c", "--config")]
    options = plan_parser().parse_args(_with_switches(given, "json", "download", "bases_sharded", "checkpointing"))
    command.run(command.PlanOptions(**options.as_dict()), _read_recipe)


def plan_parser() -> Parser:
    """The options of ``plan``."""
    from lightning_galore.planner.command import PlanOptions

    parser = Parser(prog=f"{PROG} plan", description=first_line(PlanOptions))
    parser.add_class_arguments(PlanOptions, as_positional=True)
    parser.usage = f"{PROG} plan -c RECIPE.yaml [--KEY VALUE ...]\n       {PROG} plan MODEL [--KEY VALUE ...]"
    return _titled(parser)


def _with_switches(args: list[str], *names: str) -> list[str]:
    """``--json`` alone means ``--json true``."""
    following = [*args[1:], "--"][: len(args)]
    bare = [
        arg in [f"--{name}" for name in names] and after.lower() not in ("true", "false")
        for arg, after in zip(args, following, strict=True)
    ]
    return [f"{arg}=true" if alone else arg for arg, alone in zip(args, bare, strict=True)]


def _read_recipe(path: str, options: PlanOptions) -> Read:
    from lightning_galore.planner.command import Read
    from lightning_galore.tasks.planned import module_job, precision_named, read_ours, strategy_settings

    args, prog = ["-c", path], f"{PROG} plan"
    with _untold():
        recipe = ParsedOnly(args=args, run=False, prog=prog).config
        read = read_ours(recipe, options)
        if read is not None:
            return read
        cli = GaLoreCLI(args=args, run=False, prog=prog)
    job = module_job(cli.model, options, precision=precision_named(cli.trainer.precision))
    return Read(job=job, config=strategy_settings(recipe.trainer.strategy))


def _convert() -> Callable[..., Any]:
    from lightning_galore.convert import convert_checkpoint

    return convert_checkpoint


def _export() -> Callable[..., Any]:
    from lightning_galore.export import export_weights

    return export_weights


def _report() -> Callable[..., Any]:
    from lightning_galore.report import write_report

    return write_report


def _function_parser(name: str, function: Callable[..., Any]) -> Parser:
    parser = Parser(prog=f"{PROG} {name}", description=first_line(function))
    parser.add_function_arguments(function, as_positional=True)
    return _titled(parser)


def _titled(parser: Parser) -> Parser:
    """Say once what the command does: the docstring's first line is the description, not a heading too."""
    for group in parser._action_groups:
        if group.title and without_marks(group.title).rstrip(".:") == (parser.description or "").rstrip(".:"):
            group.title = "what to read and write"
    return parser


def _of_function(name: str, function: Callable[[], Callable[..., Any]]) -> Callable[[list[str]], None]:
    def command(args: list[str]) -> None:
        parser = _function_parser(name, function())
        result = function()(**parser.parse_args(_with_switches(args, "overwrite")).as_dict())
        sys.stdout.write(f"{result}\n")

    return command


_FUNCTIONS = {"convert": _convert, "export": _export, "report": _report}

# Each command, and what it does in a line.
COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "targets": (targets, "list which weights a configuration would project, and why not the others"),
    "plan": (plan, "say how much memory training would take, for several ways to train, without running"),
    "convert": (_of_function("convert", _convert), "turn a checkpoint of galore-torch or Transformers into ours"),
    "export": (
        _of_function("export", _export),
        "write a checkpoint with int8 weights in floating point, for any program",
    ),
    "report": (
        _of_function("report", _report),
        "draw a run from its logs: loss, subspaces, refreshes, memory, as one HTML page",
    ),
}


def function_parsers() -> dict[str, Parser]:
    """The parser of each command that is neither the Trainer's nor takes a recipe."""
    return {
        "plan": plan_parser(),
        **{name: _function_parser(name, function()) for name, function in _FUNCTIONS.items()},
    }
