"""A command's options: its arguments, declared as the fields of a frozen dataclass, which they are parsed into."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import field, fields
from types import NoneType, UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

__all__ = ["Options", "option", "part"]


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
            how = dict(own.metadata)
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
        """From what was parsed."""
        found: dict[str, Any] = {}
        for own, kind, optional in _arguments(cls):
            if issubclass(kind, Options):
                group = kind.of(args)
                found[own.name] = group if group.given() or not optional else None
            else:
                found[own.name] = getattr(args, _dest(own))
        return cls(**found)

    @classmethod
    def flags(cls, **changes: Any) -> dict[str, str]:
        """The flag of each argument by what Python calls it: its field's name, or its entry's in a configuration.

        An `ArgumentError` of anything that a command calls is told with them (`command_parser`).
        """
        found: dict[str, str] = {}
        for own, kind, _ in _arguments(cls):
            how = {name: value for name, value in own.metadata.items() if name != "group"}
            if issubclass(kind, Options):
                found |= kind.flags(**how)
            elif changes.get(own.name) is not False and (flag := _flags(own.name, how)[0]).startswith("-"):
                found |= {own.name: flag, _dest(own).rpartition(".")[2]: flag}
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
    """
    return field(metadata={"help": help, "default": default, "metavar": metavar, **how})


def part(group: str | None = None, **changes: Any) -> Any:
    """A field that is `Options`, under a title in the help, with changes of its options."""
    return field(metadata=changes if group is None else {"group": group, **changes})


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


def _flags(name: str, how: dict[str, Any]) -> tuple[str, ...]:
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
