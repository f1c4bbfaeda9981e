"""A command's options: its arguments, declared as the fields of a frozen dataclass, which they are parsed into."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

from scoresde.checks import nearest, one_of

__all__ = ["Options", "Parser", "check_readable", "option", "part"]


class Parser(argparse.ArgumentParser):
    """It says which name is nearest to one that it does not know; a command's own parser says so with its own usage."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        for word in sys.argv[1:] if args is None else args:
            if word == "" or (word.startswith("--") and word.endswith("=")):
                self.error(f"an argument is empty{f', {word}' * bool(word)}: give it a value, or leave it out")
            if not word.isascii() and "\udc80" <= max(word) <= "\udcff":
                self.error(f"the argument {word!a} is no text in this system's encoding")
        found, rest = super().parse_known_args(args, namespace)
        for word in rest:
            near = nearest(word.partition("=")[0], self._option_string_actions) if word.startswith("-") else None
            self.error(f"unrecognized argument {word}" + (f": {near} is the nearest that there is" if near else ""))
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action.choices, Collection) and value not in action.choices:
            raise argparse.ArgumentError(action, f"{value!r}: {one_of(value, action.choices)}")


class Options:
    """What a command, or a group of its arguments, was given: base of frozen dataclasses, which declare the arguments.
    A field is an argument, an `option`; or, being `Options` itself, a group of them, which is None where it may be and
    nothing of it was given.
    """

    @classmethod
    def add_to(cls, groups: dict[str, Any], title: str = "", **changes: Any) -> None:
        """Add the arguments to a parser, in the order of the fields.

        Args:
            groups: of a parser by their titles; groups[""] is the parser.
            title: of the group of those that name none.
            changes: by the fields' names what differs from what they say; False leaves one out, with its default.
        """
        for own, kind, _ in _arguments(cls):
            how = {key: value for key, value in own.metadata.items() if key != "reads"}
            if (where := how.pop("group", title)) not in groups:
                groups[where] = groups[""].add_argument_group(where)
            if issubclass(kind, Options):
                kind.add_to(groups, where, **how)
            elif changes.get(own.name) is False:
                groups[""].set_defaults(**{_dest(own): False if kind is bool else how["default"]})
            else:
                _add(groups[where], own.name, kind, how | changes.get(own.name, {}))

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """From what was parsed.

        Raises:
            FileNotFoundError, IsADirectoryError: if a file that is to be read is not there, or is a folder.
        """
        found: dict[str, Any] = {}
        for own, kind, optional in _arguments(cls):
            if issubclass(kind, Options):
                group = kind.of(args)
                found[own.name] = group if group.given() or not optional else None
            else:
                found[own.name] = getattr(args, _dest(own))
                if (reads := own.metadata.get("reads")) and found[own.name] is not None:
                    check_readable(_flags(own.name, own.metadata)[0], found[own.name], reads == "folder")
        return cls(**found)

    @classmethod
    def flags(cls, **changes: Any) -> dict[str, str]:
        """The flag of each argument by what Python calls it: its field's name, its entry's in a configuration; of
        several, that of one. An argument without a flag has its own name.

        An `ArgumentError` of anything that a command calls is told with them (`command_parser`).
        """
        found: dict[str, str] = {}
        for own, kind, _ in _arguments(cls):
            how = {name: value for name, value in own.metadata.items() if name != "group"}
            if issubclass(kind, Options):
                found |= kind.flags(**how)
            elif changes.get(own.name) is not False:
                how |= changes.get(own.name, {})
                names = {own.name, _dest(own).rpartition(".")[2], own.name.removesuffix("s" * ("nargs" in how))}
                found |= dict.fromkeys(names, _flags(own.name, how)[0])
        return found

    def flat(self) -> dict[str, Any]:
        """All values by their arguments' names, those of groups among them."""
        found: dict[str, Any] = {}
        for own in fields(self):  # type: ignore[arg-type]
            value = getattr(self, own.name)
            found |= value.flat() if isinstance(value, Options) else {_dest(own): value}
        return found

    def given(self, *names: str) -> dict[str, Any]:
        """Those that are not None or False; of these names alone, if there are some."""
        values = self.flat()
        chosen = {name: values[name] for name in names or values}
        return {name: value for name, value in chosen.items() if value is not None and value is not False}


def option(help: str, default: Any = None, metavar: Any = None, **how: Any) -> Any:
    """A field of `Options` that is an argument of its type: a number, a text, a path, a list of these, or a flag.

    Args:
        help, default, metavar, **how: as `add_argument` takes them, and
        flags: its names, if they are not that of the field.
        group: title of its group in the help; "" for none.
        dest: name of what is parsed, if it is not that of the field.
        reads: it is a file, which must be there; "folder": or a folder.
    """
    return field(metadata={"help": help, "default": default, "metavar": metavar, **how})


def part(group: str | None = None, **changes: Any) -> Any:
    """A field that is `Options`, under a title in the help, with changes of its options."""
    return field(metadata=changes if group is None else {"group": group, **changes})


def check_readable(flag: str, path: Path, folder: bool = False) -> None:
    """Raises FileNotFoundError, IsADirectoryError or PermissionError unless a file, or a folder, can be read."""
    if path.is_dir() and not folder:
        raise IsADirectoryError(f"{flag} {path} is a folder: give a file")
    if not path.exists():
        raise FileNotFoundError(f"{flag} {path}: there is no such file")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{flag} {path}: it may not be read")


def _dest(own: Any) -> str:
    """The name of what is parsed for a field."""
    return str(own.metadata.get("dest", own.name))


def _arguments(options: Any) -> Iterator[tuple[Any, Any, bool]]:
    """The fields with the type of one value, int of list[int] | None, and whether they may be None."""
    hints = get_type_hints(options)
    for own in fields(options):
        kind, optional = hints[own.name], NoneType in get_args(hints[own.name])
        while get_origin(kind) in (UnionType, Union, list):
            kind = get_args(kind)[0]
        yield own, kind if isinstance(kind, type) else str, optional


def _flags(name: str, how: Mapping[str, Any]) -> tuple[str, ...]:
    """What an argument is called on the command line."""
    flags: tuple[str, ...] = how.get("flags", ("--" + name.replace("_", "-"),))
    return flags


def _add(place: Any, name: str, kind: Any, how: dict[str, Any]) -> None:
    flags = _flags(name, how)
    how.pop("flags", None)
    if kind is bool:
        how["action"] = "store_true"
    elif kind is not str:
        how["type"] = kind
    if flags[0].startswith("-"):
        how.setdefault("dest", name)
        if kind is not bool and "choices" not in how:
            how["metavar"] = how["metavar"] or name.upper()
    place.add_argument(*flags, **{key: value for key, value in how.items() if value is not None})
