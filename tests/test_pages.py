"""The README and the pages: their programs print what they say, and what they show and link to is there."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from scoresde.cli import parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]}
PROGRAM = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)


def rooms() -> list[str]:
    """The files and folders of the package, but for what starts it."""
    found = [
        path.stem for path in (ROOT / "scoresde").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    return sorted(room for room in found if not room.startswith("__"))


def test_there_are_programs():
    assert sum("```python" in text for text in PAGES.values()) >= 5


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_programs_print_what_the_page_says(page):
    programs = PROGRAM.findall(PAGES[page])
    assert len(programs) == PAGES[page].count("```python")
    namespace: dict = {"__name__": "page"}
    for program, expected in programs:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(program, page, "exec"), namespace)
        assert out.getvalue() == expected


def test_the_readme_is_short():
    assert len(README.encode()) <= 12_000
    program = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in program.splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("page", PAGES)
def test_what_it_links_to_exists(page):
    for target, anchor in re.findall(r"\]\((?!https:)([^)#]*)(?:#([^)]*))?\)", PAGES[page]):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\s-]", "", heading).lower().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES)
def test_its_commands_are_understood(page):
    """Commands of a block, and those in a sentence that are given in full; files and names in them are examples."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", PAGES[page], re.DOTALL) for line in block.splitlines()]
    lines += [" ".join(line.split()) for line in re.findall(r"(?<!`)`([^`]+)`(?!`)", PAGES[page])]
    for command, *rest in [words for line in lines if (words := split(line))]:
        if command == "scoresde" and rest and not {"--help", "COMMAND"} & set(rest):
            parser().parse_args(rest)  # SystemExit where it is not
        if command == "make":
            assert f"\n{rest[0]}: " in (ROOT / "Makefile").read_text(), rest
        if command == "python":
            assert rest[0] == "-m" or (ROOT / rest[0]).exists(), rest


def split(line: str) -> list[str]:
    """The words of a command, without its comment; none where the line is no command."""
    with contextlib.suppress(ValueError):
        return shlex.split(line, comments=True)
    return []


def test_the_table_is_that_of_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from digits import table

    results = json.loads((ROOT / "benchmarks/results/digits/results.json").read_text())
    assert table(results) in README
    assert results["environment"]["commit"] in README
    assert "uncommitted" not in results["environment"]["commit"]


def test_what_the_package_knows_of_the_pages_is_as_it_says(monkeypatch):
    """The tables of solvers and SDEs and the names: `make tables` writes them."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import tables

    everything = "".join(PAGES.values())
    assert all(f"<!-- {name} -->" in everything for name in tables.BLOCKS)
    for page, text in PAGES.items():
        assert tables.filled(text) == text, page


def test_every_public_module_is_in_the_reference():
    text = "\n".join(text for page, text in PAGES.items() if page.startswith("docs/reference/"))
    # A name that its module has too is shown by the module's own entry.
    shown = re.findall(r"^::: scoresde\.?(\S*)$", text, re.MULTILINE)
    wanted = set(rooms())
    for path in (ROOT / "scoresde").glob("**/__init__.py"):
        folder = ".".join(path.relative_to(ROOT).parts[:-1])
        names = [name for name in import_module(folder).__all__ if path.with_name(f"{name}.py").exists()]
        wanted |= {name.partition(".")[2] for name in [folder, *(f"{folder}.{name}" for name in names)]}
    assert sorted(shown) == sorted(wanted)


def test_pages_are_in_the_navigation():
    listed = re.findall(r'= "([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text())
    results = [
        f"results/{path.relative_to(ROOT / 'benchmarks/results')}" for path in ROOT.glob("benchmarks/**/README.md")
    ]
    assert sorted(listed) == sorted([page.removeprefix("docs/") for page in PAGES if page != "README.md"] + results)


def test_the_picture_of_the_rooms_is_drawn_of_those_that_exist(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import architecture

    assert (ROOT / "docs/architecture.svg").read_text() == architecture.draw()
    drawn = [room for _, names in architecture.FLOORS for room in names.split()]
    assert set(rooms()) <= set(drawn)
    assert all(re.search(f"`{room}/?`", PAGES["docs/architecture.md"]) for room in drawn)
