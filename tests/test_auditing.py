"""The auditor: tables from the outside are the tables, laws from them the laws, and each fault has its figure."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from common import every_pair

from scoresde import EDMSDE, VPSDE, Grid
from scoresde.analysis import flow_error, gaussian_law
from scoresde.auditing import conduct, convergence, edges, laws
from scoresde.auditing.audit import _named
from scoresde.auditing.bench import Bench, spectrum
from scoresde.auditing.convergence import curve_of
from scoresde.auditing.copies import copied
from scoresde.auditing.edits import edits_to
from scoresde.auditing.figure import NOT_DECIDED, RIGHT, WRONG, Audit, Figure
from scoresde.auditing.forms import form_of
from scoresde.auditing.labels import quantised
from scoresde.auditing.model import Draws, Given, Model, generators, run_form
from scoresde.auditing.nearest import in_view, rows_of
from scoresde.auditing.rates import Rates, rates
from scoresde.auditing.slips import named
from scoresde.auditing.table import law_of, own_error, probe, responses_of, responses_of_textbook
from scoresde.cli import main
from scoresde.solvers import DDIM, DPMSolver, available
from scoresde.textbook import textbook_of

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from audits import is_named
from mutants import MUTANTS
from mutants_fourth import FOURTH
from mutants_second import SECOND
from mutants_third import THIRD

TABLES = {entry.name: entry for entry in available() if entry.solver.has_table}
SDES = {"vp": VPSDE(), "edm": EDMSDE()}


def short(sde, to_zero=False, steps=7):
    """A short, uneven grid."""
    end = {"last": float(sde.time_at(3.0))} if to_zero else {"end": float(sde.time_at(1.5))}
    return Grid.karras(sde, steps, rho=5.0, start=float(sde.time_at(-4.0)), **end)


# --- the table from the outside --------------------------------------------------------------------------------------


@every_pair(name=TABLES, sde=SDES, to_zero=(False, True))
def test_the_table_found_from_the_outside_is_the_table(name, sde, to_zero):
    """Coefficients to rounding, for every solver that has any, run as a black box."""
    solver, grid = name.solver, short(sde, to_zero)
    found, known = probe(form_of(solver, "times"), sde, grid.times), responses_of(solver.tableau(grid))
    assert not isinstance(found, str), found
    torch.testing.assert_close(found.t, known.t, rtol=1e-12, atol=1e-15)
    size = known.B.abs().max()
    torch.testing.assert_close(found.A, known.A, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.B, known.B, rtol=1e-9, atol=1e-11 * float(size))
    # Draws that no row has are left out of a known table; their order is that of the run.
    torch.testing.assert_close(found.C.square().sum(1), known.C.square().sum(1), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["ddpm", "heun", "unipc3", "dpm++2m-sde", "edm-stochastic"])
def test_the_law_from_it_is_the_law(name):
    """Two derivations of the same law: of the table's rows, and of its answers."""
    sde, solver, data = SDES["vp"], TABLES[name].solver, spectrum()
    table = solver.tableau(short(sde))
    of_x_T, of_m, noise = law_of(responses_of(table), data)
    law = gaussian_law(table, (data.mean, data.variances), x_T="exact")
    start = sde.alpha(table.grid.times[0]), sde.sigma(table.grid.times[0])
    variances = of_x_T**2 * (start[0] ** 2 * data.variances + start[1] ** 2) + noise
    torch.testing.assert_close(variances, law.variances, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(of_x_T * start[0] * data.mean + of_m * data.mean, law.mean, rtol=1e-10, atol=1e-12)
    if not bool((table.c > 0).any()):
        ends = map(float, table.grid.times[[0, -1]])
        error = flow_error(table, (data.mean, data.variances), x_T="exact")
        assert own_error(responses_of(table), data, *ends) == pytest.approx(error, rel=1e-8)


@pytest.mark.parametrize("name", ["heun", "dpm++3m", "ddpm"])
def test_rows_from_it_are_rows_of_the_table(name):
    table = TABLES[name].solver.tableau(short(SDES["vp"]))
    on = table.evaluates
    found = rows_of(in_view(responses_of(table), table.p[on], table.q[on]), torch.arange(int(on.sum())))
    torch.testing.assert_close(found.a, table.a[on], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.b[:, : table.b.shape[1]], table.b[on], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.c, table.c[on], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", TABLES)
def test_a_known_solver_is_recognised(name):
    """Each is itself, or one that is equal to it: no slip is seen where there is none."""
    if name.endswith("-published"):
        pytest.skip("it is known to be wrong, and so no solver that others are compared with")
    grid = short(SDES["vp"], steps=16)
    near, slips = named(responses_of(TABLES[name].solver.tableau(grid)), grid)
    assert near is not None
    assert near.equal
    assert slips == []


@pytest.mark.parametrize(
    ("sampler", "why"),
    [
        (lambda model, x, t, n: x * model(x, t[0]).square().mean().sqrt(), "not linear"),
        (lambda model, x, t, n: x, "never asks"),
        (lambda model, x, t, n: [model(x, t[0]) for _ in range(5000)][-1], "more than"),
        (lambda model, x, t, n: model(x, t[:1] * (1 + x.mean() ** 2)), "depend"),
        (lambda model, x, t, n: model(x, t[0]) + torch.randn(1), "noise of the shape"),
    ],
)
def test_what_has_no_table_says_why(sampler, why):
    found = probe(form_of(sampler, "sigmas"), SDES["edm"], short(SDES["edm"]).times)
    assert isinstance(found, str)
    assert why in found


# --- what a model is asked, and what is drawn ------------------------------------------------------------------------


def test_draws_are_replaced_whatever_draws_them():
    seen = []

    def replace_by_zero(k, z):
        seen.append(k)
        return torch.zeros_like(z)

    x = torch.empty(2, 3, dtype=torch.float64)
    with Draws(replace_by_zero) as draws:
        own = torch.Generator().manual_seed(1)
        for z in (
            torch.randn(2, 3), torch.randn_like(x), torch.randn(2, 3, generator=own), x.normal_(),
            torch.normal(2.0, 3.0, (2, 3)) - 2.0,
        ):  # fmt: skip
            assert z.abs().max() == 0
        again = torch.randn(2, 3, generator=own.manual_seed(1))  # the same numbers are the same draw
        torch.rand(2)
    assert again.abs().max() == 0
    assert seen == [0, 1, 2, 3, 4, 2]
    assert draws.other == {"rand"}


def test_a_model_writes_down_what_it_is_asked():
    model = Model(Given(SDES["edm"], lambda j, x: j + 0 * x), keep=True)
    x = torch.ones(2, 3)
    assert float(model(x, 2.0).max()) == 0
    assert float(model(2 * x, torch.tensor([4.0, 4.0])).max()) == 1
    model(x, 1e9)
    assert model.asked == [2.0, 4.0, 1e9]
    assert [float(state.max()) for state in model.states] == [1.0, 2.0, 1.0]


def test_global_generators_are_seen_and_set_back():
    before = torch.get_rng_state()
    with generators() as changed:
        assert changed() == []
        torch.randn(2)
        np.random.rand()  # noqa: NPY002
        assert changed() == ["torch's", "numpy's"]
    assert torch.equal(before, torch.get_rng_state())


# --- names -----------------------------------------------------------------------------------------------------------

UNNAMED = {
    "edm: step from t",
    "restart: alpha_t / alpha_s",
    "restart: u_max z",
    "reverse diffusion's ODE: A for A^2",
    "time travel: no alpha_s",
    "unipc: goes on from the prediction",
}
"""Found, as the page of benchmarks/results/audits says, and not named."""


def names_of(mutant) -> set[str]:
    """The names that its tables lead to, without the figures and without edits of source."""
    tested = Bench(form_of(mutant.solver, "times", order=mutant.order, name=mutant.name), quick=True)
    wrong = Figure("limit", "limit on the Gaussian", WRONG, "")
    with patch("scoresde.auditing.audit.edits_to", lambda *_: []):
        return {figure.signature for figure in _named(tested, [wrong])} - {""}


@pytest.mark.parametrize("mutant", [*MUTANTS, *SECOND][::4], ids=lambda mutant: mutant.name)
def test_mutants_are_named(mutant):
    """A wrong version of a solver is known by its kind, from its tables alone: every fourth, as benchmarks/audits.py
    audits them all.
    """
    named_so = is_named(mutant.kind, names_of(mutant))
    assert named_so is (mutant.name not in UNNAMED)


MISTYPED = {
    "ddim: sigma_s^2 + c^2": "a sign",
    "euler-maruyama: h for sqrt(h)": "a missing square",
    "dpm-solver-2: sigma of the midpoint": "an index",
    "ddpm: weights of x_t and D": "swapped letters",
    "sa-solver: no e^{-tau^2 h}": "a factor",
}


@pytest.mark.parametrize("name", MISTYPED)
def test_an_edit_of_the_source_names_what_no_column_does(name):
    """And the solvers that everybody uses stay as they are, and so does the copy."""
    (mutant,) = (m for m in [*THIRD, *FOURTH] if m.name == name)
    sde = VPSDE()
    grid = Grid.karras(sde, 5, rho=5.0, end=float(sde.time_at(1.5)))
    found, right = responses_of(mutant.solver.tableau(grid)), responses_of(mutant.original.tableau(grid))
    signatures = edits_to(found, mutant.original, "it", grid)
    assert MISTYPED[name] in [signature.name for signature in signatures]
    copy = copied(mutant.original)
    assert type(copy) is not type(mutant.original)
    for solver in (mutant.original, copy):
        again = responses_of(solver.tableau(grid))
        assert torch.equal(again.A, right.A)
        assert torch.equal(again.B, right.B)
    book = textbook_of(mutant.original)
    theirs = book._replace(function=copied(book.function))
    for one in (book, theirs):
        torch.testing.assert_close(responses_of_textbook(one, grid, len(right.t)).B, right.B, rtol=0, atol=1e-9)


def test_no_edit_is_found_where_nothing_is_mistyped():
    grid = Grid.karras(VPSDE(), 4, end=0.1)
    assert edits_to(responses_of(DPMSolver(2).tableau(grid)), DDIM(), "ddim", grid) == []


@pytest.mark.parametrize(
    ("state", "answers", "nu", "growth", "name"),
    [
        (1.0, 1.0, 0.0, 0.5, None),
        (2.0, 2.0, 2.0, 0.5, None),
        (1.5, 1.5, 1.0, 0.5, None),
        (2.0, 2.0, 0.0, 0.5, "double drift"),
        (0.5, 0.5, 0.0, 0.5, "half drift"),
        (1.0, 1.0, 2.0, 0.5, "half drift"),
        (2.0, 2.0, 1.0, 0.5, "a factor 0.707 in the noise"),
        (2.0, 2.0, 4.0, 0.5, "noise once too much"),
        (3.0, 2.0, 2.0, 0.5, "a sign in the drift"),
        (2.0, -2.0, 2.0, 0.5, "a sign in the drift"),
        (1.25, 1.5, 0.5, 0.5, "a missing square"),
    ],
)
def test_limits_have_names(state, answers, nu, growth, name):
    signature = Rates(state, answers, nu, growth).signature()
    assert (None if signature is None else signature.name) == name


@every_pair(name=["ddpm", "ddim", "heun", "unipc3", "dpm++2m-sde", "euler-maruyama", "edm-stochastic"], sde=SDES)
def test_right_solvers_have_the_right_limit(name, sde):
    grid = Grid.log_snr(sde, 320, start=float(sde.time_at(-4.0)), end=float(sde.time_at(1.5)))
    assert rates(responses_of(TABLES[name].solver.tableau(grid))).signature() is None


def test_quantised_times_are_told():
    t = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert quantised(t, 1.0) == ""
    assert quantised((1000 * t).round() / 1000, 1.0) == "0.001"
    assert quantised(t.bfloat16().double(), 1.0) == "bfloat16"
    assert quantised((80 * t * 4).round() / 4, 80.0) in ("0.1", "0.01")


# --- the figures, one fault at a time --------------------------------------------------------------------------------


def euler(model, x, sigmas, nfe):
    for sigma, following in pairwise(sigmas):
        x = x + (x - model(x, sigma)) / sigma * (following - sigma)
    return x


def bench(sampler: Callable, order: int | None = None) -> Bench:
    return Bench(form_of(sampler, "sigmas", order=order), quick=True)


def by_name(figures) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures}


def coupled(model, x, sigmas, nfe):
    return euler(model, x, sigmas, nfe) + 1e-3 * (x.mean(0) - x)


def by_size(model, x, sigmas, nfe):
    return euler(model, x, sigmas, nfe) * (1 + 1e-3 * len(x))


def secretly_noisy(model, x, sigmas, nfe):
    return euler(model, x, sigmas, nfe) * (1 + 1e-4 * float(np.random.rand()))  # noqa: NPY002


def in_place(model, x, sigmas, nfe):
    return x.copy_(euler(model, x, sigmas, nfe))


def of_default_dtype(model, x, sigmas, nfe):
    steps = torch.tensor(sigmas.tolist())
    return euler(model, x, steps, nfe).to(x)


def rounded(model, x, sigmas, nfe):
    return euler(lambda x, sigma: model(x, (1000 * sigma).round() / 1000), x, sigmas, nfe)


def late(model, x, sigmas, nfe):
    following = {float(a): b for a, b in pairwise(sigmas)}
    return euler(lambda x, sigma: model(x, following[float(sigma)]), x, sigmas, nfe)


def overclaiming(model, x, sigmas, nfe):
    return euler(model, x, sigmas, nfe), nfe - 1


class Leaking:
    """It remembers the call before."""

    def __init__(self):
        self.before = 0.0

    def __call__(self, model, x, sigmas, nfe):
        out = euler(model, x, sigmas, nfe) * (1 + self.before)
        self.before = 1e-6 * float(out.std())
        return out


class Changed:
    """Its first call changes it for good."""

    calls = 0

    def __call__(self, model, x, sigmas, nfe):
        self.calls += 1
        return euler(model, x, sigmas, nfe) * (1 + 1e-3 * (self.calls > 1))


def test_what_the_first_call_changes_is_seen():
    tested = bench(Changed())
    tested.first = conduct.first_sample(tested)
    assert by_name(conduct.figures(tested))["the call before"].verdict == WRONG


def test_euler_has_no_fault_of_conduct():
    found = by_name(conduct.figures(bench(euler)))
    assert {figure.verdict for figure in found.values()} <= {RIGHT, NOT_DECIDED}
    assert [name for name, figure in found.items() if figure.verdict == NOT_DECIDED] == ["evaluations"]  # no claim


@pytest.mark.parametrize(
    ("sampler", "wrong"),
    [
        (coupled, "neighbours"),
        (by_size, "batch size"),
        (Leaking(), "the call before"),
        (secretly_noisy, "global generators"),
        (in_place, "inputs in place"),
        (of_default_dtype, "default dtype"),
        (rounded, "times"),
        (late, "times"),
        (overclaiming, "evaluations"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_fault_of_conduct_has_its_figure(sampler, wrong):
    tested = bench(sampler)
    if sampler is secretly_noisy:
        tested.noisy = False
    assert by_name(conduct.figures(tested))[wrong].verdict == (NOT_DECIDED if sampler is of_default_dtype else WRONG)


def no_last(model, x, sigmas, nfe):
    return euler(model, x, sigmas[:-1] if len(sigmas) > 2 else sigmas, nfe)


def dividing(model, x, sigmas, nfe):
    for sigma, following in pairwise(sigmas):
        x = x + (x - model(x, sigma)) / sigma * (following / sigma).log() * following  # 0 log 0
    return x


def breaking(model, x, sigmas, nfe):
    return euler(model, x, sigmas, nfe) if nfe > 1 else sigmas[nfe + 1]


def test_edges():
    found = by_name(edges.figures(bench(euler)))
    assert {figure.verdict for figure in found.values()} <= {RIGHT, NOT_DECIDED}
    assert found["sigma = 0"].verdict == RIGHT
    assert by_name(edges.figures(bench(dividing)))["sigma = 0"].verdict == WRONG
    assert by_name(edges.figures(bench(breaking)))["one step"].verdict == WRONG


@pytest.mark.parametrize("to_zero", [False, True])
def test_a_last_step_that_is_not_taken_is_told(to_zero):
    sde, sampler = SDES["edm"], form_of(no_last, "sigmas")
    grid = short(sde, to_zero, 16)
    near, (slip,) = named(probe(sampler, sde, grid.times), grid)
    assert near is None
    assert slip.name == "the last step skipped"


@pytest.mark.parametrize(("claimed", "verdict"), [(1, RIGHT), (2, WRONG), (None, NOT_DECIDED)])
def test_orders_are_judged_by_what_is_claimed(claimed, verdict):
    tested = bench(euler, order=claimed)
    curve = curve_of(*tested.errors([20, 40, 80, 160]), 0.0)
    figure = convergence._order(tested, curve, "Gaussian")
    assert figure.verdict == verdict
    assert figure.value == pytest.approx(1.0, abs=0.1)
    low, high = figure.interval
    assert low < 1.0 < high


@pytest.mark.parametrize(("by_ratio", "verdict"), [(True, RIGHT), (False, WRONG)])
def test_weights_that_take_even_steps_for_granted_are_found(by_ratio, verdict):
    """Adams-Bashforth of two steps in sigma: of second order where log sigma is even if its weights are those of that
    one ratio; on steps of any ratio only with its own.
    """

    def two_steps(model, x, sigmas, nfe):
        even, before = float(sigmas[0] / sigmas[1]), None  # the ratio of one step to the next, where they are even
        for i, (s, t) in enumerate(pairwise(sigmas)):
            slope = (x - model(x, s)) / s
            r = float((t - s) / (s - sigmas[i - 1])) if by_ratio and i else 1 / even
            x = x + (t - s) * (slope if before is None else slope + r / 2 * (slope - before))
            before = slope
        return x

    tested = bench(two_steps, order=2)
    curve = curve_of(*tested.errors([20, 40, 80, 160]), 0.0)
    assert curve.order == pytest.approx(2.0, abs=0.2)
    (figure,) = convergence._uneven(tested, curve)
    assert figure.verdict == verdict
    assert figure.value == pytest.approx(2.0 if by_ratio else 1.0, abs=0.25)


def test_the_limit_on_a_mixture_is_that_of_the_flow():
    """A method of fourth order is near the reference, and one of first order goes there as 1 / N."""
    fine = Bench(form_of("rk4-lambda", "sigmas"), quick=True)
    assert fine.mixed(2, 160, 16) < 1e-6
    errors = [bench(euler).mixed(2, n, 16) for n in (40, 80)]
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.2)


def half(model, x, sigmas, nfe):
    return euler(lambda x, sigma: (x + model(x, sigma)) / 2, x, sigmas, nfe)


def test_a_wrong_limit_is_told():
    tested = bench(half, order=1)
    curve = curve_of(*tested.errors([20, 40, 80, 160]), 0.0)
    assert convergence._limit(tested, curve, "Gaussian").verdict == WRONG


def noisy(model, x, sigmas, nfe, much=1.0):
    """Ancestral sampling."""
    for sigma, following in pairwise(sigmas):
        c = following * (1 - (following / sigma) ** 2).sqrt()
        down = (following**2 - c**2).sqrt()
        x = x + (x - model(x, sigma)) / sigma * (down - sigma) + much * c * torch.randn_like(x)
    return x


def test_the_law_of_noise():
    found = by_name(laws.figures(bench(noisy)))
    assert {figure.verdict for figure in found.values()} == {RIGHT}

    def loud(model, x, sigmas, nfe):
        return noisy(model, x, sigmas, nfe, 2**0.5)

    found = by_name(laws.figures(bench(loud)))
    assert found["bias and covariance, exact"].verdict == WRONG
    assert found["mixture in 3072 dimensions"].verdict == WRONG


def shared(model, x, sigmas, nfe):
    """The same noise for all samples."""
    state = torch.get_rng_state()
    for sigma, following in pairwise(sigmas):
        c = following * (1 - (following / sigma) ** 2).sqrt()
        z = torch.randn_like(x)
        x = x + (x - model(x, sigma)) / sigma * ((following**2 - c**2).sqrt() - sigma) + c * z[:1]
    del state
    return x


def test_noise_that_samples_share_is_told():
    found = by_name(laws.figures(bench(shared)))
    assert found["bias and covariance of samples"].verdict == WRONG
    assert by_name(conduct.figures(bench(shared)))["neighbours"].verdict == RIGHT  # by name it is the first one's


# --- what comes out --------------------------------------------------------------------------------------------------


def test_a_page_has_every_figure():
    figures = (
        Figure("limit", "limit on the Gaussian", RIGHT, "rms error: 1 | 2", 0.1, data={"steps": [1], "errors": [0.1]}),
        Figure("order of convergence", "order on the Gaussian", WRONG, "first", 1.0, (0.9, 1.1), "a sign"),
        Figure("edges", "bfloat16", NOT_DECIDED, "no"),
    )
    found = Audit("mine", "about", figures, 1.0)
    assert found.verdict == WRONG
    assert found.signatures == ("a sign",)
    assert found["order"] is figures[1]
    page = found.page("mine.png")
    assert page.startswith("# mine: wrong\n")
    assert "| order on the Gaussian | **wrong** | 1 [0.9, 1.1] | first |" in page
    assert "rms error: 1 \\| 2" in page
    assert "](mine.png)" in page
    assert json.loads(json.dumps(found.json()))["figures"][1]["signature"] == "a sign"
    assert replace(found, figures=figures[:1]).verdict == RIGHT
    assert replace(found, figures=figures[2:]).verdict == NOT_DECIDED
    with pytest.raises(KeyError, match="no figure 'x'"):
        found["x"]


def test_what_a_sampler_raises_is_a_figure(monkeypatch):
    from scoresde.auditing.audit import _guarded

    def figures():
        yield Figure("limit", "one", RIGHT, "")
        form = form_of(lambda model, x, sigmas, nfe: 1 / 0, "sigmas")
        run_form(form, Model(Given(SDES["edm"], lambda j, x: x)), torch.zeros(1, 2), torch.tensor([2.0, 1.0]))

    assert [figure.verdict for figure in _guarded(figures())] == [RIGHT, WRONG]

    def ours():
        yield Figure("limit", "one", RIGHT, "")
        raise RuntimeError("of the auditor")

    with pytest.raises(RuntimeError, match="of the auditor"):
        list(_guarded(ours()))


def test_the_command(tmp_path, capsys, monkeypatch):
    """A page, its numbers and its picture; arguments that are wrong are told before anything is run."""
    from scoresde.cli import audit as command

    made = Audit("ddim", "about", (Figure("limit", "limit on the Gaussian", RIGHT, "rms error", 0.1,
                                          data={"steps": [1, 10], "errors": [0.1, 0.01]}),), 1.0)  # fmt: skip
    given = {}

    def instead(sampler, takes, **options):
        given.update(options, sampler=sampler, takes=takes)
        return made

    monkeypatch.setattr(command, "audit", instead)
    page = tmp_path / "page.md"
    words = ["audit", "ddim", "--set", "eta=0.5", "name=late", "--order", "1", "--out", str(page), "--quiet"]
    assert main(words) == 0
    assert (given["sampler"], given["options"], given["order"]) == ("ddim", {"eta": 0.5, "name": "late"}, 1)
    assert page.read_text().startswith("# ddim: right")
    assert json.loads(page.with_suffix(".json").read_text())["verdict"] == "right"
    assert page.with_suffix(".png").exists()
    assert capsys.readouterr().out == "ddim: right\n"
    for wrong, message in (
        (["audit", "ddim", "--set", "eta"], "--set eta: expected NAME=VALUE"),
        (["audit", "ddim", "--order", "0"], "--order 0"),
        (["audit", "ddim", "--out", str(tmp_path / "page.txt")], ".md"),
        (["audit", "ddim", "--sde", "vq"], "vq"),
        (["audit", "nowhere:sampler"], "nowhere"),
    ):
        assert main(wrong) == 2, wrong
        assert message in capsys.readouterr().err
