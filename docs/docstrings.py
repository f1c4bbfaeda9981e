"""How the builder of the pages reads a docstring: as plain text, which it takes for Markdown."""

import re

import griffe

_TOGETHER = re.compile(r"^    (\w+(?:, \w+)+):(.*)", re.MULTILINE)
_HEADER = re.compile(r"[A-Z][a-z]+( [a-z]+)?:")  # Args:, Returns:, Raises:


class Plain(griffe.Extension):
    """Gives each argument an entry, and sets equations, lists in columns and doctests as they are typed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            text = _TOGETHER.sub(_apart, obj.docstring.value)
            obj.docstring.value = "\n\n".join(map(_set, text.split("\n\n")))


def _apart(entry: re.Match[str]) -> str:
    """`rtol, atol: tolerances.` as an entry for each, the last with the text, which may go on in the next line."""
    *others, last = entry[1].split(", ")
    return "\n".join([*(f"    {name}: see `{last}`." for name in others), f"    {last}:{entry[2]}"])


def _set(paragraph: str) -> str:
    lines = paragraph.split("\n")
    if lines[0].lstrip().startswith(">>>"):
        indent = lines[0][: -len(lines[0].lstrip())]
        return "\n".join([indent + "```pycon", *lines, indent + "```"])
    if lines[0].startswith(" "):
        return paragraph
    header = _HEADER.fullmatch(lines[0])
    if not header and any("   " in line.strip() for line in lines):
        return "\n".join("    " + line for line in lines)
    prose = (" " if all(line[:1] not in "- " for line in lines) else "\n").join(lines)  # its first line is a summary
    parts = prose.split("`")  # every other one is code
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))  # <x, y> is no tag
