"""A copy of the modules in which solvers are written, whose functions may be changed and run, and put back.

The solvers that everybody uses stay as they are: the copies are modules of their own, which import each other.
"""

from __future__ import annotations
import __future__

import ast
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache, cached_property
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple

__all__ = ["Source", "copied", "sources_of"]

_ROOMS = ("scoresde.solvers.", "scoresde.textbook.")
_COPY = "copy of "


class Source(NamedTuple):
    """A function of a copy, the tree of its source, the class it stands in, and the lines of it that ran."""

    function: FunctionType
    node: ast.FunctionDef | ast.Lambda
    owner: str
    lines: set[int]

    @property
    def names(self) -> list[str]:
        """Its arguments and variables, and those of the functions in it."""
        found: set[str] = set()
        for code in _nested(self.function.__code__):
            found.update(code.co_varnames, code.co_cellvars)
        return sorted(found - {"self"})

    @contextmanager
    def as_its_tree_is(self) -> Iterator[None]:
        """With the code of its tree, which may have been changed.

        Raises:
            SyntaxError, ValueError: if the tree is no function, or one of other free variables.
        """
        body: ast.stmt = ast.Expr(self.node) if isinstance(self.node, ast.Lambda) else self.node
        if self.owner:  # for super()
            body = ast.ClassDef(self.owner, bases=[], keywords=[], body=[body], decorator_list=[])
        tree = ast.fix_missing_locations(ast.Module([ast.copy_location(body, self.node)], []))
        function: Any = self.function
        real, flags = function.__code__, __future__.annotations.compiler_flag
        whole = compile(tree, real.co_filename, "exec", flags=flags, dont_inherit=True)
        function.__code__ = next(code for code in _nested(whole) if code.co_name == real.co_name)
        try:
            yield
        finally:
            function.__code__ = real


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _nested(const)


@cache
def _module_copy(name: str) -> ModuleType:
    """The copy of a module of the solvers or of the textbook."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    module = ModuleType(_COPY + name)
    module.__file__ = spec.origin
    sys.modules[module.__name__] = module  # where dataclasses look for names
    for node in list(tree.body):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_ROOMS):
            tree.body.remove(node)
            theirs = _module_copy(str(node.module))
            for alias in node.names:
                setattr(module, alias.asname or alias.name, getattr(theirs, alias.name))
    exec(compile(tree, _COPY + spec.origin, "exec"), module.__dict__)
    return module


def copied(value: Any) -> Any:
    """A solver, or a function of the textbook, of the copy; anything else as it is."""
    if isinstance(value, FunctionType) and value.__module__.startswith(_ROOMS):
        return getattr(_module_copy(value.__module__), value.__name__)
    if type(value) is tuple:
        return tuple(map(copied, value))
    kind = type(value)
    if not (is_dataclass(value) and kind.__module__.startswith(_ROOMS)):
        return value
    own = getattr(_module_copy(kind.__module__), kind.__name__)
    return own(**{field.name: copied(getattr(value, field.name)) for field in fields(value) if field.init})


def sources_of(act: Callable[[], object]) -> list[Source]:
    """The functions of copies that an act runs, in the order in which it first meets them."""
    ran: dict[CodeType, set[int]] = {}

    def local(frame: FrameType, event: str, _: Any) -> Any:
        ran[frame.f_code].add(frame.f_lineno)
        return local

    def called(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_COPY):
            return None
        ran.setdefault(frame.f_code, set()).add(frame.f_lineno)
        return local

    before = sys.gettrace()
    sys.settrace(called)
    try:
        act()
    finally:
        sys.settrace(before)
    found: dict[int, Source] = {}
    for code, lines in ran.items():
        file = code.co_filename
        module = next(
            m for n, m in list(sys.modules.items()) if n.startswith(_COPY) and _COPY + str(m.__file__) == file
        )
        for source in _functions(module):
            first = source.function.__code__.co_firstlineno
            if first <= code.co_firstlineno <= (source.node.end_lineno or 0):
                found.setdefault(id(source.function), source).lines.update(lines)
    return list(found.values())


@cache
def _functions(module: ModuleType) -> tuple[Source, ...]:
    """A module's functions and methods, and the lambdas of its tables."""
    nodes: dict[tuple[int, str], tuple[ast.FunctionDef | ast.Lambda, str]] = {}

    def walk(node: ast.AST, owner: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                child.decorator_list = []
                nodes[first, child.name] = child, owner
            elif isinstance(child, ast.Lambda):
                nodes[child.lineno, "<lambda>"] = child, owner
            else:
                walk(child, child.name if isinstance(child, ast.ClassDef) else owner)

    walk(ast.parse(Path(str(module.__file__)).read_text()), "")
    found, seen, pending = [], set(), list(vars(module).values())
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, FunctionType) and value.__code__.co_filename == f"{_COPY}{module.__file__}":
            key = value.__code__.co_firstlineno, value.__code__.co_name
            if key in nodes:
                found.append(Source(value, *nodes[key], set()))
        elif isinstance(value, type) and value.__module__ == module.__name__:
            pending += vars(value).values()
        elif isinstance(value, property):
            pending.append(value.fget)
        elif isinstance(value, cached_property):
            pending.append(value.func)
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, (tuple, list)):
            pending += value
    return tuple(found)
