# SPDX-License-Identifier: Apache-2.0
"""Scripts with which a shell completes commands, options, choices, classes and files.

Made by shtab from plain parsers that mirror ours. jsonargparse can make such scripts of its own, but follows the
settings of every class of every option to any depth, which for a Trainer takes minutes and gigabytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser
from lightning import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.strategies import StrategyRegistry
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_galore import GaLoreStrategy
from lightning_galore.cli.commands import COMMANDS, function_parsers
from lightning_galore.cli.exits import PROG
from lightning_galore.cli.mistakes import subclasses
from lightning_galore.cli.parsers import Parser
from lightning_galore.cli.trainer import TRAINER_COMMANDS, GaLoreCLI

_SHELLS = ("bash", "zsh", "tcsh")
_FILES = ("config", "ckpt_path", "source", "target", "picture")
_FOLDERS = ("run_dir", "out", "trainer.default_root_dir")
_CLASSES: dict[str, type] = {
    "model": LightningModule,
    "data": LightningDataModule,
    "trainer.callbacks": Callback,
    "optimizer": Optimizer,
    "lr_scheduler": LRScheduler,
}


class _Made(Exception):  # noqa: N818  # no error: how the parser leaves a constructor that would go on to run
    def __init__(self, parser: LightningArgumentParser) -> None:
        self.parser = parser


class _ParserOnly(GaLoreCLI):
    """Makes the parser and parses nothing."""

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Hand out the parser."""
        raise _Made(parser)


def _recipe_parser() -> LightningArgumentParser:
    try:
        _ParserOnly(args=[], run=False)
    except _Made as made:
        return made.parser
    raise AssertionError("the parser was not made")


def _own() -> Parser:
    parser = Parser(prog=f"{PROG} completion", description="Print a script with which a shell completes the command.")
    parser.add_argument("shell", choices=_SHELLS, help="Which shell.")
    return parser


def _mirror(source: ArgumentParser, target: argparse.ArgumentParser, shtab: Any) -> None:
    """Give ``target`` the options of ``source``, with what each may be."""
    for action in source._actions:
        name, given = action.dest, [*action.option_strings]
        if action.help == argparse.SUPPRESS or "-h" in given or set(given) & set(target._option_string_actions):
            continue
        flag = action.nargs == 0
        choices = None if flag else list(action.choices or ()) or _choices(name, getattr(action, "_typehint", None))
        settings: dict[str, Any] = {"action": "store_true"} if flag else {"choices": choices}
        if given:
            settings["dest"] = name
        else:
            given = [name]
        added = target.add_argument(*given, **settings)
        if not flag and choices is None and name in (*_FILES, *_FOLDERS):
            added.complete = shtab.FILE if name in _FILES else shtab.DIRECTORY  # type: ignore[attr-defined]


def _choices(name: str, hint: Any) -> list[str] | None:
    """What an option may be: classes by their names, the words of a literal, true and false."""
    if name in _CLASSES:
        return sorted({cls.__name__ for cls in subclasses(_CLASSES[name]) if not cls.__name__.startswith("_")})
    if name == "trainer.strategy":
        return sorted([*StrategyRegistry, GaLoreStrategy.__name__])
    words = [*_words(hint)]
    return words or None


def _words(hint: Any) -> Iterator[str]:
    if hint is bool:
        yield from ("true", "false")
    elif get_origin(hint) is Literal:
        yield from (str(word) for word in get_args(hint))
    else:
        for part in get_args(hint):
            if part is bool or get_origin(part) is Literal:
                yield from _words(part)


def _strategy_parser() -> ArgumentParser:
    """The settings of GaLore as options, which a parser knows only once the class is named."""
    parser = ArgumentParser()
    parser.add_class_arguments(GaLoreStrategy, "trainer.strategy", fail_untyped=False)
    return parser


def script(shell: str) -> str:
    """The completion script.

    Args:
        shell: ``bash``, ``zsh`` or ``tcsh``.

    Raises:
        ModuleNotFoundError: If shtab is not installed.
    """
    if find_spec("shtab") is None:
        raise ModuleNotFoundError(
            "Completion scripts are made with shtab, which is not installed. "
            'Install it with: pip install "lightning-galore[recipes]"',
            name="shtab",
        )
    shtab = import_module("shtab")
    recipe, strategy = _recipe_parser(), _strategy_parser()
    top = argparse.ArgumentParser(prog=PROG)
    commands = top.add_subparsers()
    rows = {**TRAINER_COMMANDS, **{name: text for name, (_, text) in COMMANDS.items()}}
    for name in (*TRAINER_COMMANDS, "targets"):
        one = commands.add_parser(name, help=rows[name])
        _mirror(recipe, one, shtab)
        _mirror(strategy, one, shtab)
        if name != "targets":
            one.add_argument("--ckpt_path").complete = shtab.FILE  # type: ignore[attr-defined]
    for name, source in {**function_parsers(), "completion": _own()}.items():
        _mirror(source, commands.add_parser(name, help=rows.get(name, "")), shtab)
    made: str = shtab.complete(top, shell)
    return made


def print_script(args: list[str]) -> None:
    """Print a script with which a shell completes commands, options and class names."""
    sys.stdout.write(script(_own().parse_args(args).shell))
