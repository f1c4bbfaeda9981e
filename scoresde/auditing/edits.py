"""Which one edit of a known solver's source makes it the sampler that is audited.

A mistyped formula differs from the right one by a sign, a factor, a letter, a power or an exchange, and may change
every number of its table. So the mistake is made again, in a copy of the solver, or of its transcription from the paper
(`scoresde.textbook`): each expression that ran is changed in every such way, one at a time, and the table that comes
out is laid beside the sampler's. What matches to rounding is named by the edit.
"""

from __future__ import annotations

import ast
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.auditing.copies import Source, copied, sources_of
from scoresde.auditing.rates import Signature
from scoresde.auditing.table import Responses, responses_of, responses_of_textbook
from scoresde.grid import Grid
from scoresde.solvers.base import Solver
from scoresde.textbook import textbook_of

__all__ = ["edits_to"]

_SIGN, _FACTOR, _INDEX, _SQUARE, _SWAPPED = "a sign", "a factor", "an index", "a missing square", "swapped letters"


class _Edit(NamedTuple):
    """A change of one place of a tree: node.field, or its entry `at`, becomes `new`."""

    kind: str
    node: ast.AST
    field: str
    at: int | None
    new: Any

    @property
    def old(self) -> Any:
        value = getattr(self.node, self.field)
        return value if self.at is None else value[self.at]

    def put(self, value: Any) -> None:
        if self.at is None:
            setattr(self.node, self.field, value)
        else:
            getattr(self.node, self.field)[self.at] = value


_TWINS = ({"t", "s"}, {"alpha", "sigma"}, {"drift", "diffusion"}, {"exp", "expm1"}, {"sin", "cos"})
_POWERS = {"sqrt", "square", "exp", "log", "abs"}
_OTHER: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult
}  # fmt: skip


def _edits(source: Source) -> Iterator[_Edit]:
    """All edits of the expressions that ran."""
    names = _letters(source)

    def walk(node: ast.AST) -> Iterator[_Edit]:
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "ctx") or (field == "args" and not isinstance(node, ast.Call)):
                continue
            for at, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(child, ast.AST) or isinstance(child, (ast.Raise, ast.Assert)):
                    continue
                if isinstance(child, (ast.stmt, ast.expr)):
                    ran = source.lines & set(range(child.lineno, (child.end_lineno or 0) + 1))
                    if not ran and not isinstance(source.node, ast.Lambda):
                        continue
                if isinstance(child, ast.expr) and not isinstance(getattr(child, "ctx", None), ast.Store):
                    yield from _of(child, node, field, at, names)
                yield from walk(child)

    yield from walk(source.node)


def _letters(source: Source) -> list[str]:
    """Its names of numbers: those that stand in sums and products, and are neither called nor have parts."""
    used: set[str] = set()
    other: set[str] = set()
    for node in ast.walk(source.node):
        if isinstance(node, ast.BinOp):
            used.update(x.id for x in (node.left, node.right) if isinstance(x, ast.Name))
        elif isinstance(node, ast.Call):
            used.update(x.id for x in node.args if isinstance(x, ast.Name))
            other.update({node.func.id} if isinstance(node.func, ast.Name) else ())
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr not in _POWERS:
            other.add(node.value.id)
        elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Name):
            other.update({node.left.id} if _is_word(node.comparators[0]) else ())
    return sorted((used - other) & set(source.names))


def _is_word(x: ast.expr) -> bool:
    return isinstance(x, ast.Constant) and isinstance(x.value, str)


def _of(x: ast.expr, node: ast.AST, field: str, at: int | None, names: list[str]) -> Iterator[_Edit]:
    """Edits of one expression."""

    def to(kind: str, new: ast.expr) -> _Edit:
        return _Edit(kind, node, field, at, new)

    if isinstance(node, (ast.Assign, ast.Return, ast.AugAssign)) and field == "value":
        yield from _whole(x, names, to)
    if isinstance(x, ast.BinOp):
        yield from _of_operation(x, to)
    elif isinstance(x, ast.UnaryOp) and isinstance(x.op, ast.USub):
        yield to(_SIGN, x.operand)
    elif isinstance(x, ast.Name) and x.id in names:
        for other in names:
            if other != x.id and (other[0] == x.id[0] or len(other) == len(x.id) == 1):
                yield to(_INDEX, ast.Name(other, ast.Load()))
    elif isinstance(x, ast.Attribute):
        for twins in _TWINS:
            if x.attr in twins:
                (other,) = twins - {x.attr}
                yield to(_SWAPPED, ast.Attribute(x.value, other, ast.Load()))
    elif isinstance(x, ast.Call):
        yield from _of_call(x, to)
    elif isinstance(x, (ast.Tuple, ast.List)):
        for elements in _exchanged(x.elts):
            yield _Edit(_SWAPPED, x, "elts", None, elements)
    elif isinstance(x, ast.Constant) and type(x.value) is int:
        for by in (1, -1):
            exponent = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)
            yield to(_SQUARE if exponent else _INDEX, ast.Constant(x.value + by))
    callee = isinstance(node, ast.Call) and field == "func"
    if _is_value(x, names, isinstance(node, (ast.BinOp, ast.UnaryOp))) and not callee:
        yield to(_SIGN, ast.UnaryOp(ast.USub(), x))
        for times in (2.0, 0.5):
            yield to(_FACTOR, ast.BinOp(x, ast.Mult(), ast.Constant(times)))
        for power in (2.0, 0.5):
            yield to(_SQUARE, ast.BinOp(x, ast.Pow(), ast.Constant(power)))


def _is_value(x: ast.expr, names: list[str], in_sum: bool) -> bool:
    """Whether an expression is a number, or one for each step."""
    if isinstance(x, ast.Name):
        return x.id in names
    if isinstance(x, ast.Constant):
        return in_sum and type(x.value) in (int, float)
    return isinstance(x, (ast.BinOp, ast.UnaryOp, ast.Call)) or (
        in_sum and isinstance(x, (ast.Subscript, ast.Attribute))
    )


def _whole(x: ast.expr, names: list[str], to: Callable[[str, ast.expr], _Edit]) -> Iterator[_Edit]:
    """Edits of what a statement reckons: two letters in each other's place everywhere, a letter of it once too much."""
    inside = {node.id for node in ast.walk(x) if isinstance(node, ast.Name)}
    used = sorted(inside & set(names))
    attributes = {node.attr for node in ast.walk(x) if isinstance(node, ast.Attribute)}
    called = {node.func.id for node in ast.walk(x) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    pairs = [*itertools.combinations(used, 2), *(tuple(sorted(twins)) for twins in _TWINS)]
    for one, two in pairs:
        if {one, two} & (inside | attributes | called):
            new = _Exchange(one, two).visit(copy.deepcopy(x))
            yield to(_SWAPPED, new)
    for letter in used:
        yield to(_SQUARE, ast.BinOp(x, ast.Mult(), ast.Name(letter, ast.Load())))
        yield to(_SQUARE, ast.BinOp(x, ast.Div(), ast.Name(letter, ast.Load())))


class _Exchange(ast.NodeTransformer):
    """Two names in each other's place."""

    def __init__(self, one: str, two: str) -> None:
        self.other = {one: two, two: one}

    def visit_Name(self, node: ast.Name) -> ast.Name:
        node.id = self.other.get(node.id, node.id)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.Attribute:
        node.attr = self.other.get(node.attr, node.attr)
        self.generic_visit(node)
        return node


def _of_operation(x: ast.BinOp, to: Callable[[str, ast.expr], _Edit]) -> Iterator[_Edit]:
    if isinstance(x.op, ast.Pow):
        yield to(_SQUARE, x.left)
    elif type(x.op) in _OTHER:
        sum_ = isinstance(x.op, (ast.Add, ast.Sub))
        yield to(_SIGN if sum_ else _FACTOR, ast.BinOp(x.left, _OTHER[type(x.op)](), x.right))
        yield to(_FACTOR, x.left)
        yield to(_FACTOR, x.right)
    if isinstance(x.op, ast.Div):
        yield to(_SWAPPED, ast.BinOp(x.right, x.op, x.left))


def _of_call(x: ast.Call, to: Callable[[str, ast.expr], _Edit]) -> Iterator[_Edit]:
    if isinstance(x.func, ast.Attribute) and not x.args and not x.keywords and x.func.attr in _POWERS:
        yield to(_SQUARE, x.func.value)
    for args in _exchanged(x.args):
        yield _Edit(_SWAPPED, x, "args", None, args)
    for values in _exchanged([word.value for word in x.keywords]):
        words = [ast.keyword(word.arg, value) for word, value in zip(x.keywords, values, strict=True)]
        yield _Edit(_SWAPPED, x, "keywords", None, words)


def _exchanged(values: list[ast.expr]) -> Iterator[list[ast.expr]]:
    """With two of them in each other's place."""
    for i, j in itertools.combinations(range(len(values)), 2):
        new = list(values)
        new[i], new[j] = new[j], new[i]
        yield new


def _same(found: Responses, other: Responses, tol: float) -> bool:
    """Whether two samplers answer alike; their noise by its covariance."""
    if len(found.t) != len(other.t) or not torch.allclose(found.t, other.t, rtol=1e-5, atol=0):
        return False

    def near(x: Tensor, y: Tensor) -> bool:
        return bool(((x - y).abs() <= tol * torch.maximum(x.abs().max(), y.abs().max())).all())

    return near(found.A, other.A) and near(found.B, other.B) and near(found.C @ found.C.mT, other.C @ other.C.mT)


def edits_to(
    found: Responses, solver: Solver, name: str, grid: Grid, late: Callable[[], bool] = lambda: False
) -> list[Signature]:
    """The edits that make a known solver the sampler, those of fewer letters first and one of a kind.

    Args:
        found: the sampler's answers, on the grid.
        late: whether no time is left for more.
    """
    for make, where, of_paper in _programs(found, solver, name, grid):
        out: list[tuple[int, Signature]] = []
        for source in sources_of(make):
            if not (of_paper or _reckons(source)):
                continue
            for edit in _edits(source):
                if late():
                    break
                old, before = edit.old, _text(edit)
                edit.put(edit.new)
                try:
                    with source.as_its_tree_is():
                        made = make()
                    if _same(found, made, found.tol):
                        after = _text(edit)
                        text = f"it is {where} with `{after}` for `{before}`"
                        out.append((abs(len(after) - len(before)), Signature(edit.kind, text, 1.0)))
                except Exception:  # whatever a wrong formula raises
                    pass
                finally:
                    edit.put(old)
        if out:
            nearest: dict[str, Signature] = {}
            for _, signature in sorted(out, key=lambda pair: pair[0]):
                nearest.setdefault(signature.name, signature)
            return list(nearest.values())
    return []


_RECKON = {"alpha", "sigma", "drift", "diffusion", "half_log_snr", "exp", "expm1", "sqrt", "psi"}


def _reckons(source: Source) -> bool:
    """Whether it makes numbers of levels, and not just a table of numbers."""
    return any(isinstance(x, ast.Attribute) and x.attr in _RECKON for x in ast.walk(source.node))


def _text(edit: _Edit) -> str:
    """The expression about the place."""
    return ast.unparse(edit.node if isinstance(edit.node, ast.expr) else edit.old)


def _programs(
    found: Responses, solver: Solver, name: str, grid: Grid
) -> Iterator[tuple[Callable[[], Responses], str, bool]]:
    """The ways in which a solver is written: as its paper has it, and here."""
    if (book := textbook_of(solver)) is not None:
        theirs = book._replace(function=copied(book.function))
        yield lambda: responses_of_textbook(theirs, grid, len(found.t)), f"{name} (as its paper has it)", True
    own = copied(solver)
    yield lambda: responses_of(own.tableau(grid)), name, False
