# SPDX-License-Identifier: Apache-2.0
"""What a wrong option is called: jsonargparse's account of union types as one sentence, and names that are near."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name

from jsonargparse import ArgumentParser
from lightning import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

#: Of what a configuration names classes.
BASES: tuple[type, ...] = (
    LightningModule,
    LightningDataModule,
    Callback,
    Logger,
    Strategy,
    Optimizer,
    LRScheduler,
)
_KEY = re.compile(r'Parser key "(?P<key>[^"]+)":')
_CLASS = re.compile(r"Problem with given class_path '(?P<path>[^']+)':")
_EXPECTED = re.compile(r"Expected an? (?P<type><class '[^']+'>|typing\.Literal\[.*?\]|list\[.*\]|dict\[.*\])\.?")
_GIVEN = re.compile(r"Given value: (?P<value>.*)")
_GOT = re.compile(r"\. Got value: (?P<value>.*)")
_NO_CLASS = re.compile(r"Expected a dot import path string: (?P<name>\S+)")
_NO_OPTION = re.compile(r"(?:does not accept option|Option) '(?P<name>[^']+)'")
_UNKNOWN = re.compile(r"unrecognized arguments: (?P<name>--[^\s=]+)")
_NO_FILE = re.compile(r"File does not exist: '(?P<path>[^']+)'")
_MISSING = re.compile(r"the following arguments are required: (?:\w+\.)?model$")
_NOISE = ("Does not validate against", "Subtypes:", "Errors:", "Given value", "Expected a path but")


def close_to(name: str, known: Iterable[str]) -> str:
    """A question that names what is near, or nothing.

    Args:
        name: What was written.
        known: What there is.

    Example:
        >>> close_to("rnak", ["rank", "scale"])
        " Did you mean 'rank'?"
    """
    near = difflib.get_close_matches(name, sorted(set(known)), n=3)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def near_files(path: Path) -> str:
    """What may have been meant by a file that is not there: names that are near, else others of its kind."""
    folder = path.parent
    if not folder.is_dir():
        return f" Nor is there a folder {str(folder)!r}."
    names = sorted(one.name for one in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, n=2)
    alike = [name for name in names if path.suffix and name.endswith(path.suffix)][:3]
    found = " or ".join(repr(str(folder / name)) for name in near or alike)
    return (f" Did you mean {found}?" if near else f" There is {found}.") if found else ""


def check_checkpoint(ckpt_path: object) -> None:
    """Refuse a checkpoint that is not there.

    Args:
        ckpt_path: As Lightning takes it: a file, a folder (of a run in parts), an address, or one of its words.

    Raises:
        FileNotFoundError: If there is no such file or folder.
    """
    given = str(ckpt_path or "")
    # Lightning looks for these itself: its words, a model registry, and file systems of other machines.
    if given in ("", "last", "best", "hpc") or given.startswith("registry") or "://" in given:
        return
    path = Path(given)
    if not path.exists():
        raise FileNotFoundError(
            f"ckpt_path={given!r}: there is no such file or folder.{near_files(path)} Give a checkpoint of a run, or "
            "one of the words last, best and hpc."
        )


def explain(message: str, parser: ArgumentParser) -> str:
    """A parser's error in one or two sentences, with what may have been meant.

    Args:
        message: What jsonargparse says. A form that is not known is handed back as it is.
        parser: Knows the options.
    """
    if _MISSING.search(message):
        return "a model is needed: give a recipe (-c RECIPE.yaml) or a class (--model CLASS)."
    if message.startswith("Unexpected config:"):
        found = message.removeprefix("Unexpected config:").strip().partition("\n")[0]
        return f"the configuration file must hold settings (`key: value`), not {found[:60]!r}."
    missing = _NO_FILE.search(message)
    if missing:
        return f"there is no file {missing['path']!r}.{near_files(Path(missing['path']))}"
    unknown = _UNKNOWN.search(message)
    if unknown:
        return message + "." + close_to(unknown["name"], parser._option_string_actions)
    account = _Account.of(message)
    if account is None:
        option = _NO_OPTION.search(message)
        return message + ("." + close_to(option["name"], _keys(parser)) if option else "")
    return account.sentence()


def _keys(parser: ArgumentParser) -> Iterator[str]:
    """Every key that a configuration file may have."""
    yield from (action.dest for action in parser._actions)
    commands = getattr(parser, "_subcommands_action", None)
    for one in commands.choices.values() if commands else ():
        yield from _keys(one)


@dataclass
class _Account:
    """What an error of nested union types comes to.

    Args:
        key: Where in the configuration.
        path: The class whose options are wrong, if it is those.
        said: What is wrong, apart from types.
        types: What would be right instead.
        value: What was given.
    """

    key: str
    path: str | None = None
    said: list[str] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    value: str | None = None

    @classmethod
    def of(cls, message: str) -> _Account | None:
        """Read an error; None if it is no such account."""
        start = _KEY.match(message)
        if start is None:
            return None
        found = cls(key=start["key"])
        found._read(message[start.end() :].splitlines())
        return found if found.said or found.types else None

    def _read(self, lines: list[str]) -> None:
        # The last class is the one that was meant: before it stand the other types of the union, which it is not.
        for number in reversed(range(len(lines))):
            class_path, key = _CLASS.search(lines[number]), _KEY.search(lines[number])
            if class_path or key:
                if class_path:
                    self.path = self.path or class_path["path"]
                elif key:
                    self.key = f"{self.key}.{key['key']}"
                    self.path = self.path or next((m["path"] for line in lines if (m := _CLASS.search(line))), None)
                self._read_block(_deeper(lines, number))
                return
        self._read_block(lines)

    def _read_block(self, lines: list[str]) -> None:
        for line in lines:
            text = line.strip().removeprefix("- ")
            expected, given, got = _EXPECTED.match(text), _GIVEN.match(text), _GOT.search(text)
            if given or got:
                self.value = (given or got)["value"].strip("'")  # type: ignore[index]
            if expected:
                self.types.append(expected["type"])
            elif text and not text.startswith(_NOISE):
                self.said.append(text)

    def sentence(self) -> str:
        """The account in a sentence, with a question where something is near."""
        where = f"{self.key} ({self.path.rpartition('.')[2]})" if self.path else self.key
        for text in self.said:
            missing, option = _NO_CLASS.match(text), _NO_OPTION.search(text)
            if missing:
                return f"{where}: there is no class {missing['name']!r}." + close_to(missing["name"], class_names())
            if option:
                near = close_to(option["name"], options_of(self.path)) if self.path else ""
                return f"{where}: there is no option {option['name']!r}.{near}"
        if self.said:
            return f"{where}: {' '.join(self.said)}"
        choices = [choice for one in self.types for choice in _words(one)]
        near = close_to(self.value, [choice.strip("'") for choice in choices]) if self.value else ""
        return f"{where}={self.value!r}: expected {', '.join(dict.fromkeys(choices))}.{near}"


def _deeper(lines: list[str], number: int) -> list[str]:
    """The lines after ``lines[number]`` that are indented further."""
    own = _indent(lines[number])
    block = []
    for line in lines[number + 1 :]:
        if line.strip() and _indent(line) <= own:
            break
        block.append(line)
    return block


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" -"))


def _words(kind: str) -> list[str]:
    """The name of a type, or the choices of a literal."""
    if kind.startswith("typing.Literal"):
        return [choice.strip() for choice in kind[len("typing.Literal[") : -1].split(",")]
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kind)
    return ["null" if name == "NoneType" else name]


def class_names() -> set[str]:
    """Short names of the classes that a configuration may name so."""
    return {cls.__name__ for base in BASES for cls in subclasses(base) if not cls.__name__.startswith("_")}


def subclasses(base: type) -> Iterator[type]:
    """Every class that derives from ``base`` and has been imported."""
    derived: list[type] = base.__subclasses__()
    for cls in derived:
        yield cls
        yield from subclasses(cls)


def options_of(path: str) -> list[str]:
    """The options of a class, by its dotted path; none if they cannot be told."""
    try:
        parser = ArgumentParser(exit_on_error=False)
        added: list[str] = parser.add_class_arguments(resolve_name(path), fail_untyped=False)
        return added
    except Exception:  # only a suggestion hangs on it
        return []
