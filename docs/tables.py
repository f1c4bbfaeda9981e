"""Writes the parts of the pages that the package itself knows, between <!-- name --> and <!-- /name -->.

python docs/tables.py
"""

import argparse
import html
import re
from pathlib import Path

import scoresde
from scoresde.cli import parser
from scoresde.guidance import RULES
from scoresde.processes import SDES
from scoresde.report import table
from scoresde.solvers import available
from scoresde.solvers.catalogue import markdown

ROOT = Path(__file__).parents[1]


def sdes() -> str:
    """The registry as a table: each SDE with its usual parameters."""
    rows = []
    for name, make in SDES.items():
        sde = make()
        summary = " ".join((make.__doc__ or "").split("\n\n")[0].split())
        about = re.split(r"(; |(?<!eq)\. )(?![^(]*\))", summary)[0].rstrip(".")
        without_data = "yes" if float(sde.alpha(sde.t_max)) == 0 else "no"
        rows.append([f'"{name}"', f"`{make.__qualname__}`", about, f"0..{sde.t_max:g}", without_data])
    return "\n".join(table(["name", "made by", "what it is", "t", "alpha = 0 at t_max"], rows))


def rules() -> str:
    """The guidance rules, each with the options of its paper."""
    rows = []
    for name, rule in RULES.items():
        options = ", ".join(f"{key}={value!r}" for key, value in rule.options.items())
        function = f"`{rule.function.__name__}`"
        rows.append([f'"{name}"', function, rule.view or "any", options])
    return "\n".join(table(["name", "function of F_1, F_0, w", "view", "options"], rows))


def names() -> str:
    """What `from scoresde import` has, each a link."""
    return "\n".join(f"- [`{name}`][scoresde.{name}]" for name in sorted(scoresde.__all__) if name != "__version__")


def commands() -> str:
    """Every command with its options and examples, as its parser has them."""
    (found,) = (action for action in parser()._actions if action.dest == "command")
    return "\n\n".join(part for name, one in found.choices.items() for part in command(name, one))


def command(name: str, one: argparse.ArgumentParser) -> list[str]:
    """The section of a command."""
    first, *rest = (one.description or "").split("\n\n")
    parts = [f"## scoresde {name}", inline(first[0].upper() + first[1:]) + ".", *map(prose, rest)]
    for group in one._action_groups:
        rows = [[option(action), inline(action.help or "")] for action in group._group_actions if action.dest != "help"]
        if rows:
            title = group.title if group.title not in ("positional arguments", "options") else "what"
            parts.append("\n".join(table([str(title), ""], rows)))
    examples, *more = (one.epilog or "").removeprefix("examples:").split("\n\n")
    lines = [re.sub(" {3,}", "  # ", line.strip(), count=1) for line in examples.strip().replace("`", "").splitlines()]
    return [*parts, "\n".join(["```bash", *lines, "```"]), *map(prose, more)]


def option(action: argparse.Action) -> str:
    """What is typed: the flags, and what follows them."""
    names = action.metavar if isinstance(action.metavar, tuple) else [action.metavar or action.dest]
    value = (
        "{" + ",".join(map(str, action.choices)) + "}"
        if action.choices and not action.metavar
        else " ".join(map(str, names))
    )
    value = "" if action.nargs == 0 else value
    text = ", ".join(action.option_strings) + f" {value}" * bool(value)
    return f"`{text.strip()}`" + " ..." * (action.nargs == "+")


def inline(text: str) -> str:
    """A sentence of a help as Markdown; code as HTML, for what is quoted there is often a part of a command."""
    parts = html.escape(text.replace("%%", "%"), quote=False).replace("|", "&#124;").replace("[", "&#91;").split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def prose(paragraph: str) -> str:
    """A paragraph of a help as Markdown, or as it is typed, where it is in columns."""
    if any(line.startswith(" ") or "   " in line for line in paragraph.splitlines()):
        return "\n".join(["```text", paragraph.replace("`", "'"), "```"])
    return inline(paragraph)


BLOCKS = {
    "commands": f"\n\n{commands()}\n\n",
    "solvers": f"\n{markdown(available())}\n",
    "count": str(len(available())),
    "sdes": f"\n{sdes()}\n",
    "rules": f"\n{rules()}\n",
    "names": f"\n{names()}\n",
}


def filled(text: str) -> str:
    """A page with its blocks as the package would have them."""
    for name, content in BLOCKS.items():
        text = re.sub(
            f"<!-- {name} -->.*?<!-- /{name} -->",
            lambda _, name=name, content=content: f"<!-- {name} -->{content}<!-- /{name} -->",
            text,
            flags=re.DOTALL,
        )
    return text


if __name__ == "__main__":
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        page.write_text(filled(page.read_text()))
