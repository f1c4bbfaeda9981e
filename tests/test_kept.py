"""What a run prepares is kept for the next one: the same to the last bit as if it were made anew, never that of another
solver, SDE, grid or denoiser, bounded, and out of every caller's reach."""

import copy
import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import ClassVar

import numpy as np
import pytest
import torch
from common import EVERY_SDE, FINITE, Nonlinear, network_for, normal

from scoresde import EDMSDE, VPSDE, DDPMChain, EDMDenoiser, EpsDenoiser, Grid, VDenoiser, X0Denoiser, sample
from scoresde.run import choose
from scoresde.solvers import DDIM, ERSDE, DPMSolverPP, Heun, Restart, SASolver, UniPC, kept
from scoresde.solvers.catalogue import available
from scoresde.solvers.kept import KEPT, Kept
from scoresde.tableau import Tableau
from scoresde.tensors import frozen
from scoresde.wrappers import Clip

TABLES = {entry.name: entry.solver for entry in available() if entry.solver.has_table and not entry.adaptive}


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    KEPT.clear()
    yield
    KEPT.clear()


@pytest.fixture
def made(monkeypatch):
    """Counts tables as they are made."""
    count = [0]
    whole = Tableau.__init__

    def counted(self, *args, **options):
        count[0] += 1
        whole(self, *args, **options)

    monkeypatch.setattr(Tableau, "__init__", counted)
    return count


def network(sde):
    return EpsDenoiser(network_for(Nonlinear(sde), "eps"), sde)


# --- what is kept is what would be made ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_a_kept_table_is_the_table(name):
    sde, solver = VPSDE(), TABLES[name]
    denoiser, grid = network(sde), Grid.log_snr(sde, 7, start=0.99, last=1e-3)
    for _ in range(2):
        found = kept.ready(solver, solver.tableau, grid, denoiser, torch.float64)
        anew = solver.tableau(grid).ready(denoiser, torch.float64)
        assert repr(found.rows) == repr(anew.rows)
        assert (found.steps, found.t.tolist()) == (anew.steps, anew.t.tolist())
    assert found is kept.ready(solver, solver.tableau, grid, denoiser, torch.float64)


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("solver", [DDIM(), Heun(), UniPC(3), DPMSolverPP(stochastic=True)], ids=repr)
@pytest.mark.parametrize("budget", ["steps", "nfe"])
def test_a_second_call_is_the_first_and_makes_nothing(name, solver, budget, made):
    denoiser = network(FINITE[name])
    one = sample(denoiser, (2, 3), solver, **{budget: 6}, seed=0)
    before = made[0]
    assert before
    other = sample(denoiser, (2, 3), solver, **{budget: 6}, seed=0)
    assert made[0] == before
    assert torch.equal(one.x, other.x)
    assert one.grid == other.grid
    assert one.nfe == other.nfe
    KEPT.clear()
    assert torch.equal(one.x, sample(denoiser, (2, 3), solver, **{budget: 6}, seed=0).x)


def test_what_was_kept_in_inference_mode_takes_gradients():
    class Learned(X0Denoiser):
        """A view whose coefficients are learned."""

        def affine(self, t):
            r, s = super().affine(t)
            return r, s * self.scale

    denoiser = Learned(lambda x, t: x, VPSDE())
    denoiser.scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    x = normal(2, 3)
    with torch.inference_mode():
        sample(network(VPSDE()), x, UniPC(), steps=5)
    assert sample(denoiser, x.requires_grad_(), UniPC(), steps=5, differentiable=True).x.requires_grad


def test_threads_share_what_is_kept():
    denoiser = network(VPSDE())
    cases = [(solver, steps) for solver in (DDIM(), UniPC(), Heun()) for steps in (3, 4, 5)] * 8

    def run(case):
        return sample(denoiser, (2, 3), case[0], steps=case[1], seed=1).x

    alone = [run(case) for case in cases]
    KEPT.clear()
    with ThreadPoolExecutor(8) as pool:
        assert all(map(torch.equal, pool.map(run, cases), alone))


# --- and never another's ---------------------------------------------------------------------------------------------


def test_every_table_has_a_key_of_its_own():
    values = [*(entry.solver for entry in available()), *EVERY_SDE.values()]
    values += [VPSDE(0.2), VPSDE().for_data(0.5), VPSDE().for_data(0.25), DDIM(0.25), DDIM(0), DDIM(-0.0)]
    values += [0, 0.0, -0.0, False, "0", None, (), (0,), [0], (0.0,), {}, {0: 1}, torch.zeros(2), torch.zeros(2, 1)]
    values += [torch.zeros(2).double(), -torch.zeros(2), np.float64(0), np.float32(0), float("nan")]
    values += [Clip(network(VPSDE())), EDMDenoiser(torch.nn.Linear(1, 1), EDMSDE()), X0Denoiser(len, VPSDE())]
    values += [VDenoiser(len, VPSDE()), VDenoiser(torch.nn.Linear(1, 1).double(), VPSDE())]
    values += [EDMDenoiser(torch.nn.Linear(1, 1), EDMSDE(), sigma_data=1.0), Clip(network(VPSDE()), -2.0)]
    chain = DDPMChain()
    values += [EpsDenoiser(len, chain), EpsDenoiser(len, chain, time=chain.label)]
    keys = [(value, key) for value in values if (key := frozen(value)) is not None]
    assert len(keys) > 100
    for (a, one), (b, other) in combinations(keys, 2):
        assert one != other, (a, b)
    assert all(frozen(copy.deepcopy(value)) == key for value, key in keys)  # and it is that of an equal


@dataclass(frozen=True)
class Tunable(VPSDE):
    """A user's SDE whose rate is somebody else's variable."""

    rate: ClassVar = [1.0]

    def integrated_beta(self, t):
        return super().integrated_beta(t) * self.rate[0]


class Stretched(VPSDE):
    """One that holds what cannot be hashed, and may change."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "stretch", {"by": [1.0]})

    def integrated_beta(self, t):
        return super().integrated_beta(t) * self.stretch["by"][0]


@pytest.mark.parametrize("kind", ["class", "instance", "betas", "field", "function", "closure", "denoiser"])
def test_a_change_is_never_served_what_was_kept(kind):
    x, solver = normal(2, 3), UniPC()
    sde, noise = VPSDE(), lambda row, x: torch.ones_like(x)
    if kind == "class":
        sde = Tunable()
        change = partial(Tunable.rate.__setitem__, 0, 0.8)
    elif kind == "instance":
        sde = Stretched()
        change = partial(sde.stretch["by"].__setitem__, 0, 0.8)
    elif kind == "betas":
        sde = DDPMChain.linear(50, 0.002, 0.2)

        def change():
            sde.betas.mul_(0.9)
            sde._tables.clear()
    elif kind == "field":
        change = partial(object.__setattr__, sde, "beta_max", 15.0)
    elif kind == "function":
        level = [1.0]
        solver, change = SASolver(tau=lambda t: level[0] * torch.ones_like(t)), partial(level.__setitem__, 0, 0.3)
    elif kind == "closure":
        power = [2.0]
        solver, change = ERSDE(noise_scale=lambda u: u ** power[0]), partial(power.__setitem__, 0, 1.5)
    denoiser = network(sde)
    if kind == "denoiser":
        net = denoiser.net
        denoiser = EDMDenoiser(net, sde, time=lambda t: t)
        change = partial(setattr, denoiser, "sigma_data", 0.7)
    for _ in range(2):
        before = sample(denoiser, x, solver, steps=6, noise=noise).x
    change()
    after = sample(denoiser, x, solver, steps=6, noise=noise).x
    assert not torch.equal(before, after)
    KEPT.clear()
    assert torch.equal(after, sample(denoiser, x, solver, steps=6, noise=noise).x)
    Tunable.rate[0] = 1.0


def test_of_a_users_own_classes_nothing_is_kept(made):
    class Mine(DDIM):
        pass

    x = normal(2, 3)
    for solver, sde in (
        (Mine(), VPSDE()),
        (DDIM(), Tunable()),
        (DDIM(), Stretched()),
        (Restart(solver=Mine()), VPSDE()),
    ):
        assert frozen(solver) is None or frozen(sde) is None
        sample(network(sde), x, solver, steps=6, seed=0)
        before = made[0]
        sample(network(sde), x, solver, steps=6, seed=0)
        assert made[0] > before
    assert len(KEPT) == 0


def test_a_function_for_the_label_is_asked_and_checked_each_time(made):
    factor = [1.0]
    denoiser = EpsDenoiser(lambda x, t: torch.tanh(x + t[:, None]), VPSDE(), time=lambda t: factor[0] * t)
    x = normal(2, 3)
    one = sample(denoiser, x, DDIM(), steps=4).x
    before = made[0]
    factor[0] = 2.0
    assert not torch.equal(one, sample(denoiser, x, DDIM(), steps=4).x)
    assert made[0] == before  # the table is the solver's
    factor[0] = float("nan")
    with pytest.raises(ValueError, match="label is not finite"):
        sample(denoiser, x, DDIM(), steps=4)


def test_a_network_of_another_dtype_is_checked_again():
    sde = VPSDE(beta_max=120.0)  # alpha is 1e-13 at t = 1
    net = torch.nn.Linear(3, 3).double()
    denoiser = EpsDenoiser(lambda x, t: x, sde)
    x = normal(2, 3)
    denoiser.net = Called(net)
    sample(denoiser, x, DDIM(), steps=4)
    net.float()
    with pytest.raises(ValueError, match="none in torch"):
        sample(denoiser, x, DDIM(), steps=4)


class Called(torch.nn.Module):
    """A network with parameters of some dtype, which tells nothing."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, t):
        return x


def test_an_error_is_raised_each_time():
    for _ in range(2):
        with pytest.raises(ValueError, match="take eta <= 1"):
            sample(network(VPSDE()), (2, 3), DDIM(eta=5.0), steps=5, seed=0)
        with pytest.raises(ValueError, match="alpha"):
            sample(network(EVERY_SDE["flow"]), (2, 3), DDIM(), steps=5, seed=0)
        with pytest.raises(ValueError, match="draws noise"):
            DDIM(eta=1.0).iterate(network(VPSDE()), normal(2, 3), Grid.uniform(VPSDE(), 3))


# --- out of reach ----------------------------------------------------------------------------------------------------


def test_what_a_caller_writes_to_is_his_own():
    sde, x = DDPMChain.linear(50, 0.002, 0.2), normal(2, 3)
    denoiser = EpsDenoiser(network_for(Nonlinear(sde), "eps"), sde, time=lambda t: t.mul_(1.0))
    one = sample(denoiser, x, UniPC(), steps=6)
    one.grid.times.zero_()
    grid = choose(sde, UniPC(), 6)[1]
    own = sample(denoiser, x, UniPC(), grid=grid)
    own.grid.times.div_(2)
    assert own.grid is grid  # the caller's, as he has it
    again = sample(denoiser, x, UniPC(), steps=6)
    assert torch.equal(again.x, one.x)
    assert float(again.grid.times[0]) == 50
    assert not torch.equal(sample(denoiser, x, UniPC(), grid=grid).x, one.x)


def test_a_grid_belongs_to_the_denoisers_own_sde():
    one, other = VPSDE(), VPSDE()
    for sde in (one, other):
        assert sample(network(sde), (2, 3), DDIM(), steps=3, seed=0).grid.sde is sde


def test_a_network_is_let_go():
    net = torch.nn.Linear(3, 3)
    denoiser = EpsDenoiser(Called(net), VPSDE())
    sample(denoiser, (2, 3), UniPC(), steps=4, seed=0)
    there, held = weakref.ref(net), weakref.ref(denoiser)
    del net, denoiser
    gc.collect()
    assert there() is None
    assert held() is None
    assert len(KEPT) == 2


def test_what_is_kept_is_small_and_on_the_host():
    for name in ("vp", "edm"):
        sample(network(EVERY_SDE[name]), (2, 3), UniPC(), steps=30, seed=0)
    seen, tensors, todo = set(), [], [KEPT._things]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        tensors += [thing] if isinstance(thing, torch.Tensor) else []
        if isinstance(thing, (dict, list, tuple)) or type(thing).__module__.startswith("scoresde"):
            todo += gc.get_referents(thing)
    assert tensors
    assert all(t.device.type == "cpu" and t.nbytes < 2**16 for t in tensors)


# --- bounded ---------------------------------------------------------------------------------------------------------


def test_the_store_is_bounded_by_size_and_number():
    store = Kept(most=100, least=10)
    for i in range(50):
        assert store.get(i, lambda: "x" * 3, len) == "xxx"
        assert len(store) <= 10
        assert store.size <= 100
    store.get(40, lambda: pytest.fail("it was kept"), len)
    store.get("large", lambda: "x" * 85, len)
    assert len(store) == 2
    assert store.get(40, str, len) == "xxx"
    store.get("too large", lambda: "x" * 101, len)
    assert len(store) == 2
    assert store.size == 95
    store.clear()
    assert len(store) == store.size == 0


def test_runs_do_not_pile_up():
    denoiser, x = network(VPSDE()), normal(1, 1)
    for steps in range(1, 400):
        next(iter(DDIM().iterate(denoiser, x, Grid.uniform(VPSDE(), steps))))  # the table is made before the first row
    assert 0 < len(KEPT) <= 256
    assert KEPT.size <= KEPT.most == 2**14


def test_a_table_too_long_is_not_kept():
    next(iter(DDIM().iterate(network(VPSDE()), normal(1, 1), Grid.uniform(VPSDE(), 2**14 + 1))))
    assert len(KEPT) == 0
