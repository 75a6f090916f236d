# SPDX-License-Identifier: Apache-2.0
"""The command line: ``lightning-galore fit | validate | test | predict | targets | plan | convert | ...``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence

from lightning_galore import __version__
from lightning_galore.cli.commands import COMMANDS
from lightning_galore.cli.completion import print_script
from lightning_galore.cli.exits import MISTAKE, PROG, TRACEBACK_FLAG, TRACEBACK_VARIABLE, exit_status
from lightning_galore.cli.mistakes import close_to
from lightning_galore.cli.noise import without_notices
from lightning_galore.cli.trainer import TRAINER_COMMANDS, GaLoreCLI

__all__ = ["PROG", "GaLoreCLI", "exit_status", "main"]

_ALL: dict[str, tuple[Callable[[list[str]], None] | None, str]] = {
    **{name: (None, text) for name, text in TRAINER_COMMANDS.items()},
    **COMMANDS,
    "completion": (print_script, "print a script with which bash, zsh or tcsh completes all of these"),
}


class _TopParser(argparse.ArgumentParser):
    """Shows what there is to someone who names no command, and what is near to someone who names a wrong one."""

    def __init__(self) -> None:
        rows = "\n".join(f"  {name:<10} {text}" for name, (_, text) in _ALL.items())
        super().__init__(
            prog=PROG,
            usage=f"{PROG} COMMAND [OPTIONS]",
            description="Low-rank gradient training (GaLore) for PyTorch Lightning.",
            epilog=f"commands:\n{rows}\n\n`{PROG} COMMAND --help` shows the options of a command.\n"
            "Exit status: 0 done, 1 the run failed, 2 a mistake in options, recipe or files, 130 Ctrl-C, 143 SIGTERM.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=f"{PROG} {__version__}")
        self.add_argument(
            TRACEBACK_FLAG, action="store_true", help=f"show errors with their traceback (also {TRACEBACK_VARIABLE}=1)"
        )
        self.add_argument("command", nargs="?", metavar="COMMAND", help="what to do, see below")
        self.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="options of the command")

    def command_of(self, args: list[str]) -> tuple[str, list[str]]:
        """The command, and what stands after it."""
        self._ask_for_a_command(args)
        options = self.parse_args(args)
        if options.command is None:
            self.print_help(sys.stderr)
            sys.exit(MISTAKE)
        if options.command not in _ALL:
            near = close_to(options.command, _ALL)
            self.exit(
                MISTAKE,
                f"{PROG}: error: there is no command {options.command!r}.{near}\n(`{PROG} --help` lists them)\n",
            )
        return options.command, options.options

    def _ask_for_a_command(self, args: list[str]) -> None:
        """Say what to write where the line begins with options or with a recipe."""
        first = args[0] if args else ""
        is_recipe = first.endswith((".yaml", ".yml")) and first not in _ALL
        if not is_recipe and (not first.startswith("-") or first in self._option_string_actions):
            return
        near = "" if is_recipe else close_to(first, [name for name in self._option_string_actions if len(name) > 2])
        if near:
            said = f"there is no option {first!r}.{near}"
        else:
            named = next((arg for arg in args if arg in _ALL), "fit")
            rest = [arg for arg in args if arg != named]
            said = f"give a command first: {shlex.join([PROG, named, *(['-c'] if is_recipe else []), *rest])}"
        self.exit(MISTAKE, f"{PROG}: error: {said}\n(`{PROG} --help` lists the commands)\n")


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: The arguments, without the program's name; ``sys.argv`` by default.

    Returns:
        The exit status: 0; 1 if the run failed; 2 after a mistake in the options (by SystemExit), the recipe or the
        files; 130 after Ctrl-C; 143 after SIGTERM.
    """
    given = list(sys.argv[1:] if args is None else args)
    # Anywhere on the line: a user adds it at the end of a command that has just failed.
    with_traceback = TRACEBACK_FLAG in given
    command, options = _TopParser().command_of([arg for arg in given if arg != TRACEBACK_FLAG])

    def run() -> int:
        action = _ALL[command][0]
        if action is not None:
            action(options)
        else:
            GaLoreCLI(args=[command, *options])
        return 0

    with without_notices():
        return exit_status(run, prog=PROG, with_traceback=with_traceback)
