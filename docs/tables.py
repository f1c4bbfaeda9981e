"""Writes the parts of the pages that the package itself knows, between <!-- name --> and <!-- /name -->.

python docs/tables.py
"""

import re
from pathlib import Path

import scoresde
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


BLOCKS = {
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
