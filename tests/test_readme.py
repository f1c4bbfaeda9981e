"""The README's programs run as they stand, and print what it says."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

from scoresde.solvers import available
from scoresde.solvers.catalogue import markdown

TEXT = (Path(__file__).parents[1] / "README.md").read_text()


def test_programs_print_what_the_readme_says():
    programs = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", TEXT, re.DOTALL)
    assert len(programs) == TEXT.count("```python") >= 2
    namespace: dict = {"__name__": "readme"}
    for program, expected in programs:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(program, "README.md", "exec"), namespace)
        assert out.getvalue() == expected


def test_the_first_program_is_twenty_lines():
    program = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL).group(1)
    assert len([line for line in program.splitlines() if line.strip()]) <= 20


def test_what_it_links_to_exists():
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (root / target).exists(), target


def test_the_table_is_that_of_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    from digits import table

    results = json.loads((Path(__file__).parents[1] / "benchmarks/results/digits/results.json").read_text())
    assert table(results) in TEXT
    assert results["environment"]["commit"] in TEXT
    assert "uncommitted" not in results["environment"]["commit"]


def test_the_list_of_solvers_is_the_catalogue():
    assert f"<!-- solvers -->\n{markdown(available())}\n<!-- /solvers -->" in TEXT
    assert f"<!-- count -->{len(available())}<!-- /count -->" in TEXT
