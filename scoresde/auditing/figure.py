"""What an audit finds: figures, each with a verdict, and the page that tells them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from scoresde.checks import check_option
from scoresde.report import table, without_nan

__all__ = ["NOT_DECIDED", "RIGHT", "WRONG", "Audit", "Figure", "line", "number"]

RIGHT, WRONG, NOT_DECIDED = "right", "wrong", "not decided"


@dataclass(frozen=True)
class Figure:
    """One thing that was measured.

    Attributes:
        group: the question that it belongs to, "order of convergence" say.
        name: what was measured, of which problem.
        verdict: "right", "wrong" or "not decided".
        text: what was found, in a sentence.
        value: the number itself, or None.
        interval: the least and the most that it may be, or None.
        signature: the name of the known defect that it fits, or "".
        data: further numbers, by name.
    """

    group: str
    name: str
    verdict: str
    text: str
    value: float | None = None
    interval: tuple[float, float] | None = None
    signature: str = ""
    data: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_option((RIGHT, WRONG, NOT_DECIDED), verdict=self.verdict)


def number(value: float | None) -> str:
    """A number as the page has it.

    >>> number(2.0), number(3.14159e-7), number(None)
    ('2', '3.1e-07', '')
    """
    return "" if value is None else f"{value:.3g}" if value == 0 or 1e-2 <= abs(value) < 1e4 else f"{value:.1e}"


def line(error: BaseException) -> str:
    """An error in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@dataclass(frozen=True)
class Audit:
    """What `audit` found; print it, or write its `page`.

    Attributes:
        name: of the sampler.
        about: how it was run: package, version, what it takes and claims.
        figures: all of them, in the order of the page.
        seconds: that it took.
    """

    name: str
    about: str
    figures: tuple[Figure, ...]
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """Is any figure wrong? Else right, if the sampler was seen to tend to the truth, and not decided if not."""
        if self.wrong:
            return WRONG
        limits = [figure.verdict for figure in self.figures if figure.name == "limit on the Gaussian"]
        return RIGHT if limits == [RIGHT] else NOT_DECIDED

    @property
    def wrong(self) -> tuple[Figure, ...]:
        """The figures that are wrong."""
        return tuple(figure for figure in self.figures if figure.verdict == WRONG)

    @property
    def signatures(self) -> tuple[str, ...]:
        """Names of the defects that were recognised, each once."""
        return tuple(dict.fromkeys(figure.signature for figure in self.figures if figure.signature))

    def __getitem__(self, name: str) -> Figure:
        """The figure of that name, or of the one that begins so.

        Raises:
            KeyError: if there is none.
        """
        for figure in self.figures:
            if figure.name == name:
                return figure
        for figure in self.figures:
            if figure.name.startswith(name):
                return figure
        raise KeyError(f"no figure {name!r}: {', '.join(figure.name for figure in self.figures)}")

    def groups(self) -> Iterator[tuple[str, list[Figure]]]:
        """The figures by their group."""
        for group in dict.fromkeys(figure.group for figure in self.figures):
            yield group, [figure for figure in self.figures if figure.group == group]

    def json(self) -> dict[str, Any]:
        """All numbers, for a file."""
        figures = [
            {
                "group": f.group,
                "name": f.name,
                "verdict": f.verdict,
                "value": f.value,
                "interval": f.interval,
                "signature": f.signature,
                "text": f.text,
                **({"data": f.data} if f.data else {}),
            }
            for f in self.figures
        ]
        content = {"sampler": self.name, "about": self.about, "verdict": self.verdict, "figures": figures}
        found: dict[str, Any] = without_nan(content)
        return found

    def summary(self) -> str:
        """The verdict in a line or a few: what is wrong, and its names."""
        lines = [f"{self.name}: {self.verdict}"]
        lines += [f"  wrong: {figure.name}: {figure.text}" for figure in self.wrong]
        if named := [figure for figure in self.figures if figure.signature]:
            lines += [f"  known as: {figure.signature}: {figure.text}" for figure in named if figure not in self.wrong]
        return "\n".join(lines)

    def page(self, picture: str | None = None) -> str:
        """The page, in Markdown: the verdict, then a table for each group.

        Args:
            picture: name of a file beside it.
        """
        count = {verdict: sum(f.verdict == verdict for f in self.figures) for verdict in (RIGHT, WRONG, NOT_DECIDED)}
        told = ", ".join(f"{n} {verdict}" for verdict, n in count.items() if n)
        lines = [f"# {self.name}: {self.verdict}", "", self.about, "", f"{len(self.figures)} figures: {told}."]
        if self.wrong:
            lines += ["", "What is wrong:", ""]
            lines += [f"- **{f.name}**: {f.text}{f' ({f.signature})' if f.signature else ''}" for f in self.wrong]
        if others := [f for f in self.figures if f.signature and f.verdict != WRONG]:
            lines += ["", "What it is known by:", ""]
            lines += [f"- {f.signature}: {f.text}" for f in others]
        if picture:
            lines += ["", f"![error against steps, and where it stops]({picture})"]
        for group, figures in self.groups():
            lines += ["", f"## {group[0].upper()}{group[1:]}", ""]
            rows = [
                [f.name, f"**{f.verdict}**" if f.verdict == WRONG else f.verdict, _with_interval(f),
                 f.text.replace("|", "\\|")]
                for f in figures
            ]  # fmt: skip
            lines += table(["figure", "verdict", "value", "what was found"], rows)
        return "\n".join([*lines, ""])

    def __repr__(self) -> str:
        lines = [self.summary()]
        for group, figures in self.groups():
            lines.append(f"{group}:")
            lines += [f"  {f.verdict:12}{f.name}: {f.text}" for f in figures]
        return "\n".join(lines)


def _with_interval(figure: Figure) -> str:
    if figure.value is None or not math.isfinite(figure.value):
        return "" if figure.value is None else str(figure.value)
    if figure.interval is None:
        return number(figure.value)
    return f"{number(figure.value)} [{number(figure.interval[0])}, {number(figure.interval[1])}]"
