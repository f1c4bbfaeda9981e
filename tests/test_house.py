"""The law of the house, over the syntax trees: rooms have an order, and each imports only what stands below it."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "scoresde").rglob("*.py")
}
TOP = {"scoresde", "scoresde.__main__"}  # what opens the house, and sees all of it


def room(module: str) -> str:
    """The file or folder of the package that a module is, or is in."""
    return module.split(".")[1]


def imports(module: str) -> list[tuple[str, str]]:
    """(module, name) of all that it imports from the package, wherever in the file; the name is empty for a module."""
    found = []
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "scoresde"]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import: write it out"
            if (node.module or "").split(".")[0] == "scoresde":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found.append((inner, "") if inner in FILES else (str(node.module), alias.name))
    return found


@pytest.fixture(scope="module")
def order() -> list[str]:
    """The rooms from the ground up, as the picture of the architecture has them."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from architecture import FLOORS
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return [name for _, names in FLOORS for name in names.split()]


def test_every_room_has_its_place(order):
    assert sorted({room(module) for module in FILES if module not in TOP}) == sorted(order)
    assert len(set(order)) == len(order)


def test_rooms_only_look_down(order):
    """Imports inside functions and for types included."""
    up = [
        f"{module} imports {wanted} {name}"
        for module in FILES
        if module not in TOP
        for wanted, name in imports(module)
        if wanted in TOP or order.index(room(wanted)) > order.index(room(module))
    ]
    assert not up


def test_no_module_imports_in_a_circle():
    """Nor inside a folder; a folder's own list of names is above its files."""
    graph = {module: {wanted for wanted, _ in imports(module)} for module in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_private_name_leaves_its_file():
    private = [
        f"{module} imports {wanted}.{name}"
        for module in FILES
        for wanted, name in imports(module)
        if name.startswith("_") and not name.startswith("__")
    ]
    assert not private


def test_files_are_short():
    """A file over 420 lines is asking to be two."""
    assert not {name: n for name, path in FILES.items() if (n := len(path.read_text().splitlines())) > 420}


def test_importing_the_package_loads_no_library_that_it_may_not_need():
    heavy = ["scipy", "torchsde", "torchdiffeq", "matplotlib", "sklearn", "PIL", "safetensors", "msgspec"]
    code = f"import sys, scoresde; print(*(name for name in {heavy} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
