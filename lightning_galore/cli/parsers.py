# SPDX-License-Identifier: Apache-2.0
"""Parsers whose help can be read in a terminal and whose errors fit on a few lines."""

from __future__ import annotations

import re
import sys
import traceback
from argparse import Action
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from lightning_galore.cli import exits
from lightning_galore.cli.mistakes import explain

#: Wrap optimizers, and are none that a recipe can name.
_NOT_FOR_RECIPES = ("OptimizerWrapper", "GaLoreOptimizer", "AcceleratedOptimizer")


def without_marks(text: str) -> str:
    """A docstring's text without the marks of reStructuredText, and classes by their short names.

    Example:
        >>> without_marks("Give ``last``, or a :class:`~datetime.timedelta` (type: <class 'pathlib.Path'>)")
        'Give last, or a timedelta (type: Path)'
    """
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?([^`]+)`", r"\1", text)
    text = re.sub(r"`([^`<]+?) <([^>]+)>`_", r"\1 (\2)", text).replace("``", "")
    return re.sub(r"(?<=known subclasses: )[\w., ]+", lambda found: _short_names(found[0]), text)


def first_line(documented: object) -> str:
    """The first line of a docstring, for a terminal."""
    return without_marks((documented.__doc__ or "").partition("\n")[0])


def _short_names(paths: str) -> str:
    names = dict.fromkeys(path.strip().rpartition(".")[2] for path in paths.split(","))
    return ", ".join(name for name in names if not name.endswith(_NOT_FOR_RECIPES))


class PlainHelp(DefaultHelpFormatter):
    """Help without the marks of docstrings."""

    @override
    def _expand_help(self, action: Action) -> str:
        return without_marks(super()._expand_help(action))

    @override
    def start_section(self, heading: str | None) -> None:
        """Begin a group of options."""
        super().start_section(without_marks(heading) if heading else heading)


class Parser(LightningArgumentParser):
    """Says what is wrong in a sentence, not after sixty lines of usage, and exits with status 2.

    Args:
        *args: Of the parent.
        **kwargs: Of the parent.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", PlainHelp)
        kwargs.setdefault("prog", exits.PROG)  # of the help of a class, which else has the script's file name
        kwargs.setdefault("allow_abbrev", False)  # as in a recipe, where half a key is none
        super().__init__(*args, **kwargs)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        prog = parser.prog.replace(" [options]", "")
        if exits.with_traceback() and ex is not None:
            traceback.print_exception(ex)
        sys.stderr.write(f"{prog}: error: {explain(message, parser)}\n(`{prog} --help` lists the options)\n")
        sys.exit(exits.MISTAKE)
