# SPDX-License-Identifier: Apache-2.0
"""How a command ends: its exit status, and what is printed of an error."""

from __future__ import annotations

import os
import pickle
import re
import sys
import traceback
from collections.abc import Callable
from contextvars import ContextVar

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

#: Exit statuses.
DONE, FAILED, MISTAKE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

PROG = "lightning-galore"
TRACEBACK_FLAG = "--traceback"
TRACEBACK_VARIABLE = "LIGHTNING_GALORE_TRACEBACK"
_asked: ContextVar[bool] = ContextVar("_asked", default=False)

#: What a mistake of the user raises, before a run has begun.
_MISTAKES = (ValueError, OSError, ModuleNotFoundError, MisconfigurationException)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run, with the advice how to go on."""


class RunError(Exception):
    """An error after the first batch: of the code that runs, not of what the user has written on the line."""


def with_traceback() -> bool:
    """Whether the user wants to see where an error was raised."""
    return _asked.get() or os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0")


def exit_status(run: Callable[[], int], *, prog: str, with_traceback: bool = False) -> int:
    """Call ``run`` and turn what a user can mend into one line, and every end into an exit status.

    Args:
        run: What to do; returns the exit status.
        prog: The program's name, which starts the line.
        with_traceback: Show the whole traceback instead of one line.

    Returns:
        0, or what ``run`` returned; 1 if it failed; 2 after a mistake of the user; 130 after Ctrl-C; 143 after SIGTERM.
    """
    token = _asked.set(with_traceback)
    try:
        return _run(run, prog)
    finally:
        _asked.reset(token)


def _run(run: Callable[[], int], prog: str) -> int:
    try:
        return run()
    except KeyboardInterrupt as error:
        advice = f": {error}" if str(error) else ""
        sys.stderr.write(f"\n{prog}: interrupted{advice}\n")
        return INTERRUPTED
    except SIGTERMException:  # a SystemExit without a status: whoever sent it would read a success
        sys.stderr.write(f"{prog}: terminated\n")
        return TERMINATED
    except RunError as error:
        traceback.print_exception(error.__cause__)
        sys.stderr.write(f"{prog}: the run failed{_remedy(error.__cause__)}\n")
        return FAILED
    except Exception as error:
        if not _is_mistake(error):
            traceback.print_exc()
            sys.stderr.write(f"{prog}: failed{_remedy(error)}\n")
            return FAILED
        if with_traceback():
            traceback.print_exc()
        else:
            shows = TRACEBACK_FLAG if prog == PROG else f"{TRACEBACK_VARIABLE}=1"
            sys.stderr.write(f"{prog}: error: {own_message(error)}\n({shows} shows where it was raised)\n")
        return MISTAKE


def _is_mistake(error: BaseException) -> bool:
    if isinstance(error, RuntimeError):  # torch's, of a checkpoint of another model
        return str(error).startswith("Error(s) in loading state_dict")
    return isinstance(error, (*_MISTAKES, pickle.UnpicklingError))


def _remedy(error: BaseException | None) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return ": out of memory. `lightning-galore plan -c RECIPE.yaml --budget 24GB` says what fits."
    return ""


def own_message(error: BaseException) -> str:
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
