"""What results look like: a line each when printed, and pictures in a notebook."""

from __future__ import annotations

import base64
import importlib
import inspect
import io
import math
import pkgutil
import re
from dataclasses import is_dataclass

import numpy as np
import pytest
import torch

import scoresde
from scoresde import VPSDE, Grid, Posterior, State, pictures, sample
from scoresde.exact import Gaussian
from scoresde.levels import to_levels
from scoresde.solvers import DDIM, Heun
from scoresde.tensors import brief


def results():
    """Every public dataclass and named tuple of the package that has tensors among its fields."""
    found = {}
    for info in pkgutil.walk_packages(scoresde.__path__, "scoresde."):
        if info.name.endswith("__main__") or ".cli" in info.name:
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            kind = getattr(module, name)
            if not isinstance(kind, type) or not (is_dataclass(kind) or hasattr(kind, "_fields")):
                continue
            held = {field: str(kind) for field, kind in inspect.get_annotations(kind).items()}
            tensors = [field for field, text in held.items() if re.match(r"(dict\[str, )?Tensor\b", text)]
            if tensors:
                found[kind] = held, tensors
    return found


RESULTS = results()
OWN = {
    "BitsPerDim",
    "Diagnosis",
    "Given",
    "GivenContext",
    "Raw",
    "Replacement",
    "VarianceTable",
}  # which say it in words of their own


@pytest.mark.parametrize("kind", RESULTS, ids=lambda kind: kind.__name__)
def test_no_result_prints_its_tensors(kind):
    """Whatever their size."""
    if kind.__name__ in OWN:
        assert "__repr__" in inspect.getsource(kind) or "repr=False" in inspect.getsource(kind)
        return
    held, tensors = RESULTS[kind]
    values = {field: torch.zeros(50, 60) if field in tensors else 3 for field in held}
    made = object.__new__(kind) if is_dataclass(kind) else kind._make(values.values())
    for field, value in values.items() if is_dataclass(kind) else ():
        object.__setattr__(made, field, value)
    given = ", ".join(f"{k}=float32 (50, 60) from 0 to 0" if k in tensors else f"{k}=3" for k in held)
    assert repr(made) == f"{kind.__name__}({given})"


def test_a_result_is_a_line():
    x = torch.tensor([math.nan, -1, 0, 0, 0, 0, 2, math.inf])
    text = "State(row=1, nfe=2, step=3, done=True, t=0.5, x=float32 (8,) from -1 to 2, 2 not finite)"
    assert repr(State(1, 2, 3, True, 0.5, x)) == text
    assert repr(Posterior(x)) == "Posterior(mean=float32 (8,) from -1 to 2, 2 not finite)"
    assert brief([torch.tensor(2), (torch.ones(2),)]) == "[2, ([1, 1])]"


def test_the_results_of_sampling_are_a_line():
    solution = sample(
        Gaussian(mean=torch.zeros(3, 8, 8), std=0.5).denoiser(VPSDE()), (5, 3, 8, 8), DDIM(), steps=2, seed=0
    )
    text = repr(solution)
    low, high = float(solution.x.min()), float(solution.x.max())
    assert text.startswith(f"Solution(x=float32 (5, 3, 8, 8) from {low:.4g} to {high:.4g}, nfe=2, grid=Grid(VPSDE(")
    assert "trajectory" not in text
    assert "\n" not in text


def decoded(text):
    Image = pytest.importorskip("PIL.Image")
    (content,) = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        return np.array(picture)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_notebook_shows_the_images(channels):
    denoiser = Gaussian(mean=torch.zeros(channels, 8, 9), std=0.5).denoiser(VPSDE())
    solution = sample(denoiser, (5, channels, 8, 9), DDIM(), steps=2, seed=0)
    page = decoded(solution._repr_html_())
    levels = to_levels(solution.x).movedim(1, -1).numpy()
    for i in range(5):
        top, left = 2 + (i // 3) * 34, 2 + (i % 3) * 38
        found = page[top : top + 32 : 4, left : left + 36 : 4]
        assert np.array_equal(found if channels == 3 else found[..., None], levels[i])


def test_a_png_is_what_was_written():
    Image = pytest.importorskip("PIL.Image")
    for C in (1, 3):
        image = torch.randint(0, 256, (C, 5, 7), generator=torch.Generator().manual_seed(C), dtype=torch.uint8)
        with Image.open(io.BytesIO(pictures.png(image))) as opened:
            opened.load()
            assert opened.mode == ("L" if C == 1 else "RGB")
            assert np.array_equal(np.array(opened).reshape(5, 7, C), image.movedim(0, -1).numpy())


def test_a_notebook_shows_points_and_says_the_rest():
    plane = sample(Gaussian(mean=torch.zeros(2), std=1.0).denoiser(VPSDE()), (50, 2), DDIM(), steps=2, seed=0)
    assert plane._repr_html_().count("<circle ") == 50
    line = sample(Gaussian(mean=torch.zeros(7), std=1.0).denoiser(VPSDE()), (50, 7), DDIM(), steps=2, seed=0)
    assert line._repr_html_() == f"<code>{repr(line).replace(chr(39), '&#x27;')}</code>"


def test_grids_and_tables_are_tables_in_a_notebook():
    grid = Grid.uniform(VPSDE(), 3)
    assert grid._repr_html_().count("<tr>") == 1 + 4
    table = Heun().tableau(grid)
    text = table._repr_html_()
    assert text.count("<tr>") == 1 + len(table)
    assert all(f"<td>{float(a):.6g}</td>" in text for a in table.a)


def test_images_are_enlarged_to_squares():
    x = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4)
    large = pictures.enlarged(x, 3)
    assert large.shape == (1, 9, 12)
    assert all(torch.equal(large[:, i::3, j::3], x) for i in range(3) for j in range(3))
