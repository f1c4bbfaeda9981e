"""Every table is the transcription of its paper's algorithm, number by number."""

from __future__ import annotations

import pytest
import torch
from common import EVERY_SDE, SDES, end_of, start_of
from test_multistep import CASES
from test_single_step import EVERY

from scoresde import DDPMChain, FlowSDE, Grid
from scoresde.auditing.table import responses_of, responses_of_textbook
from scoresde.solvers import DEIS, ExponentialAB
from scoresde.solvers.catalogue import SOLVERS
from scoresde.textbook import textbook_of

WRITTEN = {
    **{name: entry.solver for name, entry in SOLVERS.items() if entry.solver.has_table},
    **{f"{name} as in test_multistep": solver for name, solver in CASES.items()},
    **{f"{name} as in test_single_step": solver for name, solver in EVERY.items()},
}
# Each once, under the first of its names.
FIRST = {repr(solver): name for name, solver in reversed(WRITTEN.items())}
WRITTEN = {name: WRITTEN[name] for name in reversed(FIRST.values()) if textbook_of(WRITTEN[name]) is not None}


def in_t(solver):
    return getattr(solver, "variable", None) == "t"


def same_answers(solver, grid):
    """x_T, the model's answers and the noise enter every state and the output alike, to rounding."""
    found = responses_of(solver.tableau(grid))
    book = responses_of_textbook(textbook_of(solver), grid, len(found.t))
    torch.testing.assert_close(book.t, found.t, rtol=1e-9, atol=1e-12)
    for own, right in ((found.A, book.A), (found.B, book.B), (found.C @ found.C.mT, book.C @ book.C.mT)):
        torch.testing.assert_close(own, right, rtol=0, atol=1e-8 * max(1.0, float(right.abs().max())))


def test_most_of_the_catalogue_is_in_a_paper():
    assert len(WRITTEN) > 80


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("solver", WRITTEN)
def test_a_table_is_its_papers_algorithm(solver, sde):
    solver, sde = WRITTEN[solver], SDES[sde]
    if isinstance(solver, (DEIS, ExponentialAB)) and in_t(solver) and isinstance(sde, DDPMChain):
        pytest.skip("u(t) of a chain has a kink at every node: test_multistep has that case")
    start, end = start_of(sde), end_of(sde)
    for grid in (
        Grid.uniform(sde, 2, start=start),
        Grid.uniform(sde, 6, start=start, end=end),
        Grid.log_snr(sde, 6, start=start),
    ):
        same_answers(solver, grid)


@pytest.mark.parametrize("sde", [FlowSDE(), EVERY_SDE["cosine-1"]], ids=["flow", "cosine"])
@pytest.mark.parametrize("name", [name for name in CASES if "v lambda" not in name])
def test_a_start_at_alpha_zero(name, sde):
    """A first step from alpha = 0 is first order, and what follows starts at order 1. In v it is regular."""
    for steps, end in ((1, 0.2), (6, 0.02), (5, 0.0)):
        same_answers(CASES[name], Grid.uniform(sde, steps, end=end))
