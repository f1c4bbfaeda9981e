"""The laws of time grids: what is uniform in them, that their ends are exact floats, and what is refused."""

import itertools
import math
import zlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from common import EVERY_SDE, every_pair
from torch import Tensor

from scoresde import EDMSDE, SDE, VESDE, VPSDE, CosineVPSDE, DDPMChain, FlowSDE, Grid
from scoresde.strides import BETWEEN, label_between, stride

SDES: dict[str, SDE] = EVERY_SDE
ALPHA_VANISHES = {name for name, sde in SDES.items() if float(sde.alpha(sde.t_max)) == 0}
LOGARITHMIC = ["log_snr", "karras"]
SPACINGS = ["uniform", "quadratic", *LOGARITHMIC]
STEPS = [1, 2, 3, 5, 7, 13, 20, 100, 1000]
STRIDES = ["leading", "trailing", "linspace", "quadratic"]

all_sdes = pytest.mark.parametrize("name", SDES)
all_spacings = pytest.mark.parametrize("spacing", SPACINGS)


def make(name: str, spacing: str, steps: int, **kwargs: Any) -> Grid:
    if name in ALPHA_VANISHES and spacing in LOGARITHMIC:
        kwargs.setdefault("start", 0.99 * SDES[name].t_max)
    return getattr(Grid, spacing)(SDES[name], steps, **kwargs)


def variable(sde: SDE, spacing: str, t: Tensor, rho: float = 7.0) -> Tensor:
    """What the spacing is uniform in."""
    match spacing:
        case "uniform":
            return t
        case "quadratic":
            return t.sqrt()
        case "log_snr":
            return (sde.alpha(t) / sde.sigma(t)).log()
        case _:
            return (sde.sigma(t) / sde.alpha(t)) ** (1 / rho)


def assert_uniform(u: Tensor) -> None:
    """Equal differences, to rounding in the variable's own range."""
    span = float((u[-1] - u[0]).abs())
    line = torch.linspace(float(u[0]), float(u[-1]), len(u), dtype=torch.float64)
    assert float((u - line).abs().max()) < 1e-12 * (span + float(u.abs().max()))


@every_pair(name=list(SDES), spacing=SPACINGS, steps=[2, 7, 50])
def test_spacing_is_uniform_in_its_variable(name: str, spacing: str, steps: int) -> None:
    grid = make(name, spacing, steps)
    t = grid.times[:-1] if spacing in LOGARITHMIC else grid.times  # the last step of the former is an extra one
    assert_uniform(variable(SDES[name], spacing, t))


@all_sdes
@pytest.mark.parametrize("rho", [1.0, 3.0, 7.5])
def test_karras_with_another_rho(name: str, rho: float) -> None:
    grid = make(name, "karras", 9, rho=rho)
    assert_uniform(variable(SDES[name], "karras", grid.times[:-1], rho))


def tau(sde: SDE, t: Tensor) -> Tensor:
    """The time of the standard VP SDE at the same noise level; 1 where there is more noise."""
    return VPSDE().time_at(sde.half_log_snr(t).clamp(min=float(VPSDE().half_log_snr(1.0))))


@pytest.mark.parametrize("name", [name for name, sde in SDES.items() if not isinstance(sde, DDPMChain)])
def test_sampling_is_quadratic_with_few_steps_and_power_with_many(name: str) -> None:
    sde = SDES[name]
    for N in (2, 5, 10):
        grid = Grid.sampling(sde, N)
        assert_uniform(tau(sde, grid.times[:-1]).sqrt())
        near = max(1 / N**2, float(tau(sde, torch.tensor(sde.t_min, dtype=torch.float64))))
        assert float(tau(sde, grid.times[-2])) == pytest.approx(near, rel=1e-6)
    torch.testing.assert_close(Grid.sampling(VPSDE(), 7).times, Grid.quadratic(VPSDE(), 7).times, rtol=1e-9, atol=0)
    for N, power in itertools.product((50, 51, 200), (3.0, 4.0)):
        many = Grid.sampling(sde, N, power=power)
        torch.testing.assert_close(many.times, Grid.power(sde, N, power=power).times, rtol=1e-9, atol=0)
    last = [float(tau(sde, Grid.sampling(sde, N).times[-2])) for N in range(2, 80)]
    assert all(b <= a for a, b in itertools.pairwise(last))  # nearer to the data with each step


def test_karras_on_edm_is_the_published_formula() -> None:
    """Karras et al. (2022), eq. 5, in numpy."""
    N, rho, low, high = 18, 7.0, 0.002, 80.0
    i = np.arange(N)
    t = (high ** (1 / rho) + i / (N - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    np.testing.assert_allclose(Grid.karras(EDMSDE(), N).times.numpy(), [*t, 0.0], rtol=1e-13)


@every_pair(name=list(SDES), spacing=SPACINGS, steps=STEPS)
def test_every_number_of_steps_strictly_decreases_from_start_to_zero(name: str, spacing: str, steps: int) -> None:
    grid = make(name, spacing, steps)
    assert grid.steps == steps == len(grid) - 1
    assert grid.times.dtype == torch.float64
    assert bool((grid.times.diff() < 0).all())
    assert float(grid.times[0]) == SDES[name].t_max * (0.99 if name in ALPHA_VANISHES and spacing in LOGARITHMIC else 1)
    assert float(grid.times[-1]) == 0
    if spacing in LOGARITHMIC and steps > 1:
        assert float(grid.times[-2]) == SDES[name].t_min


@every_pair(name=list(SDES), spacing=SPACINGS, steps=[1, 2, 7, 100])
def test_the_ends_asked_for_are_met_to_the_last_bit(name: str, spacing: str, steps: int) -> None:
    """Not through forward and inverse, whose rounding would leave [t_min, t_max]."""
    sde = SDES[name]
    start, end = 0.7 * sde.t_max, max(sde.t_min, 0.003 * sde.t_max) * 1.1
    grid = make(name, spacing, steps, start=start, end=end)
    assert (float(grid.times[0]), float(grid.times[-1])) == (start, end)
    assert grid.steps == steps
    assert_uniform(variable(sde, spacing, grid.times))


@pytest.mark.parametrize("spacing", LOGARITHMIC)
@all_sdes
def test_last_is_the_last_noisy_time(name: str, spacing: str) -> None:
    sde = SDES[name]
    last = 0.01 * sde.t_max
    grid = make(name, spacing, 6, last=last)
    assert grid.times[-2:].tolist() == [last, 0.0]
    assert_uniform(variable(sde, spacing, grid.times[:-1]))


@all_sdes
@all_spacings
def test_pairs_chain_and_end_on_the_data(name: str, spacing: str) -> None:
    """The scales at the end of a step are those at the start of the next, bit for bit, and (1, 0) at the end."""
    grid = make(name, spacing, 13)
    alpha_t, sigma_t, alpha_s, sigma_s = grid.pairs()
    assert torch.equal(alpha_s[:-1], alpha_t[1:])
    assert torch.equal(sigma_s[:-1], sigma_t[1:])
    assert (float(alpha_s[-1]), float(sigma_s[-1])) == (1.0, 0.0)
    torch.testing.assert_close(alpha_t, SDES[name].alpha(grid.times[:-1]), rtol=1e-14, atol=0)
    torch.testing.assert_close(sigma_t, SDES[name].sigma(grid.times[:-1]), rtol=1e-14, atol=0)


@all_sdes
@pytest.mark.parametrize("steps", [1, 4])
def test_customary_grid(name: str, steps: int) -> None:
    sde = SDES[name]
    grid = Grid.customary(sde, steps)
    if isinstance(sde, DDPMChain):
        assert grid == Grid.strided(sde, steps)
    elif isinstance(sde, EDMSDE):
        assert grid == Grid.karras(sde, steps)
    else:
        assert grid == Grid.uniform(sde, steps)


@pytest.mark.parametrize("steps", [1, 2, 7, 28])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, math.exp(1.15)])
def test_shifted_multiplies_each_level(shift: float, steps: int) -> None:
    """sigma / alpha is that of uniform times `shift` times over; mu, the other way of writing it, is its logarithm."""
    sde = FlowSDE()
    grid, uniform = Grid.shifted(sde, steps, shift=shift), Grid.uniform(sde, steps)
    t, u = grid.times[1:-1], uniform.times[1:-1]
    torch.testing.assert_close(t / (1 - t), shift * u / (1 - u), rtol=1e-13, atol=0)
    torch.testing.assert_close(t, math.exp(mu := math.log(shift)) / (math.exp(mu) + 1 / u - 1), rtol=1e-13, atol=0)
    assert grid.times[[0, -1]].tolist() == [1, 0]
    if shift == 1:
        torch.testing.assert_close(grid.times, uniform.times, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 28])
def test_shifted_is_that_of_the_published_scheduler(shift: float, steps: int) -> None:
    """diffusers' FlowMatchEuler: its smallest time, of 1000, is shifted when it is made and again when it is used."""

    def S(u: Any) -> Any:
        return shift * u / (1 + (shift - 1) * u)

    expected = [*S(np.linspace(1.0, S(1 / 1000), steps)), 0.0]
    grid = Grid.shifted(FlowSDE(), steps, shift=shift, last=S(S(1 / 1000)) if steps > 1 else 1.0)
    np.testing.assert_allclose(grid.times.numpy(), expected, rtol=1e-13)


# Sub-sequences of a chain


def nodes_of(N: int, steps: int, spacing: str) -> list[int]:
    """The integer times before the final zero."""
    times = Grid.strided(DDPMChain.linear(N), steps, spacing).times.tolist()  # type: ignore[arg-type]
    assert times[-1] == 0
    assert all(t.is_integer() for t in times)
    return [int(t) for t in times[:-1]]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("N", [1, 2, 10, 97, 1000])
def test_strided_at_every_step_count_is_a_sub_sequence(N: int, spacing: str) -> None:
    for K in sorted({k for k in (1, 2, 3, 5, 7, 13, 20, 50, 97, 99, 333, 500, 501, 999, N - 1, N) if 1 <= k <= N}):
        nodes = nodes_of(N, K, spacing)
        assert len(nodes) == K
        assert nodes[0] <= N
        assert nodes[-1] >= 1
        assert all(a > b for a, b in itertools.pairwise(nodes))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("N", [1, 4, 1000])
def test_as_many_steps_as_nodes_is_the_whole_chain(N: int, spacing: str) -> None:
    assert nodes_of(N, N, spacing) == list(range(N, 0, -1))


@pytest.mark.parametrize("K", [1, 3, 7, 10, 20, 97, 100, 250, 1000])
def test_leading_is_the_stride_of_ddim(K: int) -> None:
    """DDIM's code: range(0, N, N // K), on nodes counted from 0; of its K or more numbers the first K."""
    assert nodes_of(1000, K, "leading") == [i + 1 for i in range(0, 1000, 1000 // K)][:K][::-1]


@pytest.mark.parametrize("K", [2, 3, 5, 7, 10, 20, 28])
def test_quadratic_is_that_of_ddim(K: int) -> None:
    """DDIM's code: linspace(0, sqrt(0.8 N), K)^2, truncated, plus one."""
    expected = [int(s) + 1 for s in np.linspace(0, np.sqrt(1000 * 0.8), K) ** 2]
    assert nodes_of(1000, K, "quadratic") == expected[::-1]


@pytest.mark.parametrize("N", [10, 97, 1000])
def test_linspace_is_the_even_trajectory_in_exact_arithmetic(N: int) -> None:
    """tau_k = round(1 + (k - 1) (N - 1) / (K - 1)), ties to even (Nichol and Dhariwal, 2021), for every K."""
    for K in range(2, N + 1, 1 if N < 1000 else 37):
        expected = [round(1 + Fraction(k * (N - 1), K - 1)) for k in range(K)]
        assert nodes_of(N, K, "linspace") == expected[::-1]


@pytest.mark.parametrize("N", [10, 97, 1000])
def test_trailing_starts_at_the_prior_and_never_strays_from_even(N: int) -> None:
    """Node k is N - k N / K to within rounding to the next integer."""
    for K in range(1, N + 1, 1 if N < 1000 else 37):
        nodes = nodes_of(N, K, "trailing")
        assert nodes[0] == N
        assert all(abs(node - (N - Fraction(k * N, K))) <= Fraction(1, 2) for k, node in enumerate(nodes))


@pytest.mark.parametrize(("spacing", "node"), [("leading", 1), ("trailing", 10), ("linspace", 10), ("quadratic", 1)])
def test_strided_with_one_step(spacing: str, node: int) -> None:
    """One node of the formula: its start, which is 1 where the formula runs upward from 1."""
    assert nodes_of(10, 1, spacing) == [node]


# As other toolkits round them

THEIRS = {  # crc32 of the sorted numbers, int16, of all K = 1..1000 steps of 1000 nodes, by diffusers 0.42.1 itself
    ("diffusers", "leading"): 2921502615,
    ("diffusers", "trailing"): 3479454445,
    ("diffusers", "linspace"): 2170432359,
    ("diffusers-multistep", "leading"): 1917271494,
    ("diffusers-multistep", "trailing"): 3479454445,
    ("diffusers-multistep", "linspace"): 1855724235,
    ("diffusers-sigmas", "leading"): 2921502615,
    ("diffusers-sigmas", "trailing"): 3479454445,
    ("guided-diffusion", "linspace"): 3313071379,  # and by its space_timesteps
}


@pytest.mark.parametrize(("like", "spacing"), THEIRS)
def test_every_count_is_rounded_as_theirs(like: Any, spacing: Any) -> None:
    numbers = np.concatenate([stride(1000, K, spacing, like) for K in range(1, 1001)])
    assert zlib.crc32(numbers.astype(np.int16).tobytes()) == THEIRS[like, spacing]


def test_every_count_is_that_of_diffusers() -> None:
    """Where it is installed: its own numbers, counted from 0, are our nodes less one."""
    schedulers = pytest.importorskip("diffusers.schedulers", reason="its schedulers are compared with")
    for like, kind in (("diffusers", "DDIM"), ("diffusers-multistep", "UniPCMultistep")):
        for spacing, offset in itertools.product(["leading", "trailing", "linspace"], [0, 1]):
            theirs = getattr(schedulers, f"{kind}Scheduler")(timestep_spacing=spacing, steps_offset=offset)
            for K in (1, 2, 7, 15, 30, 50, 250, 999):
                theirs.set_timesteps(K)
                numbers = stride(1000, K, spacing, like) + offset * (spacing == "leading")
                assert theirs.timesteps.tolist() == numbers[::-1].tolist()


def test_how_much_the_names_hide() -> None:
    """The same spacing, steps and chain: other nodes."""
    other = {"trailing": 0, "linspace": 0}
    for spacing in other:
        for K in range(1, 1001):
            ours, theirs = stride(1000, K, spacing), stride(1000, K, spacing, "diffusers")  # type: ignore[arg-type]
            other[spacing] += not np.array_equal(ours, theirs)
    assert other == {"trailing": 111, "linspace": 450}


def test_integer_strides_of_guided_diffusion() -> None:
    """ "ddimK" is the smallest stride i with len(range(0, N, i)) == K, or an error."""
    for N, K in itertools.product((10, 97, 1000), range(2, 100)):
        found = [range(0, N, i) for i in range(1, N) if len(range(0, N, i)) == K]
        if found:
            assert stride(N, K, "leading", "guided-diffusion").tolist() == list(found[0])
        else:
            with pytest.raises(ValueError, match=f"steps={K}: no integer stride|only {N} nodes"):
                stride(N, K, "leading", "guided-diffusion")


def test_sections_of_guided_diffusion() -> None:
    """Its own example: of 300 nodes, 10 in the first hundred, 15 in the second, 20 in the third."""
    nodes = Grid.strided(DDPMChain.linear(300), [10, 15, 20], "linspace", like="guided-diffusion").times
    assert len(nodes) == 46
    for low, K in ((0, 10), (100, 15), (200, 20)):
        part = [n for n in nodes.tolist() if low < n <= low + 100]
        running = itertools.accumulate([0.0] + [99 / (K - 1)] * (K - 1))  # a sum, whose rounding breaks ties
        assert part[::-1] == [low + 1 + round(s) for s in running]
    assert stride(10, [2, 1, 3], "linspace", "guided-diffusion").tolist() == [0, 3, 4, 7, 8, 9]
    with pytest.raises(ValueError, match="section 1"):
        Grid.strided(DDPMChain.linear(10), [2, 6], "linspace", like="guided-diffusion")


@pytest.mark.parametrize("K", [1, 3, 10, 30, 97, 100, 1000])
def test_strides_of_ddim(K: int) -> None:
    """range(0, N, N // K), which is longer than K where K is no divisor, and linspace(0, sqrt(0.8 N), K)^2."""
    assert stride(1000, K, "leading", "ddim").tolist() == list(range(0, 1000, 1000 // K))
    assert stride(1000, K, "quadratic", "ddim").tolist() == [int(s) for s in np.linspace(0, np.sqrt(800), K) ** 2]


def test_an_offset_and_an_end_at_the_first_node() -> None:
    """Stable Diffusion's DDIM: steps_offset=1 and set_alpha_to_one=False. Their number k is our node k + 1."""
    grid = Grid.strided(DDPMChain(), 50, "leading", like="diffusers", offset=1, end=1)
    assert grid.times.tolist() == [*(k + 1 for k in range(981, 0, -20)), 1]
    assert Grid.strided(DDPMChain(), 50, "leading", offset=1, end=1) == grid
    assert Grid.strided(DDPMChain(), 4, end=1).times.tolist() == [1000, 750, 500, 250, 1]


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        # numpy.arange(1000, 0, -1000 / 61) has 62 numbers, and 0 - 1 is an index of the noisiest node
        ({"steps": 61, "spacing": "trailing", "like": "diffusers"}, 61, "label -1"),
        ({"steps": 30, "spacing": "leading", "like": "ddim"}, 31, "takes 31 steps"),
        ({"steps": 100, "spacing": "quadratic", "like": "ddim"}, 96, "from a node to itself.*takes 96 steps"),
        ({"steps": 1000, "spacing": "linspace", "like": "diffusers-multistep"}, 999, "from a node to itself"),
        # set_alpha_to_one=False without an offset: the last step is from the first node to itself
        ({"steps": 10, "spacing": "leading", "like": "diffusers", "end": 1}, 9, "from a node to itself"),
    ],
)
def test_where_theirs_cannot_be_a_grid_it_is_told(options: dict[str, Any], steps: int, message: str) -> None:
    with pytest.warns(UserWarning, match=message) as told:
        grid = Grid.strided(DDPMChain(), **options)
    assert len(told) == 1
    assert told[0].filename == __file__
    assert grid.steps == steps
    theirs = stride(1000, options["steps"], options["spacing"], options["like"]) + 1
    assert set(grid.times.tolist()) == {k for k in theirs if k > 0} | {options.get("end", 0)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("like", ["k-diffusion", "diffusers-sigmas"])
def test_between_nodes_the_levels_are_theirs(like: Any) -> None:
    """sigma / alpha at K numbers from N - 1 to 0: its logarithm is linear between nodes (k-diffusion), or it is."""
    chain = DDPMChain.linear(50)
    u = (chain.sigma(chain.nodes) / chain.alpha(chain.nodes)).numpy()
    for K in (1, 2, 4, 9, 20, 50):
        at = np.linspace(0, 49, K)[::-1]
        if like == "k-diffusion":
            expected = np.exp(np.interp(at, np.arange(50), np.log(u)))
        else:
            expected = np.interp(at, np.arange(50), u)
        grid = Grid.strided(chain, K, "linspace", like=like)
        np.testing.assert_allclose((chain.sigma(grid.times) / chain.alpha(grid.times))[:-1], expected, rtol=1e-12)
        label = label_between(chain, BETWEEN[like])(grid.times[:-1])
        np.testing.assert_allclose(label, at, rtol=1e-12, atol=1e-10)  # what their network is told


def test_a_label_between_nodes_is_the_chain_s_own_at_nodes_and_increases() -> None:
    for chain in (DDPMChain.linear(20), DDPMChain.cosine(20, max_beta=1.0), DDPMChain.linear(2), DDPMChain.linear(1)):
        t = torch.linspace(0, chain.steps, 40 * chain.steps + 1, dtype=torch.float64)
        for linear in ("sigma", "half_log_snr"):
            label = label_between(chain, linear)  # type: ignore[arg-type]
            assert torch.equal(label(chain.nodes), chain.label(chain.nodes))
            inside = t <= chain.steps - (float(chain.alpha(chain.t_max)) == 0)  # no line goes to infinite noise
            assert bool((label(t)[inside].diff() > 0).all())
            assert bool(label(t).isfinite().all())
    with pytest.raises(ValueError, match="linear='t'"):
        label_between(DDPMChain(), "t")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"like": "diffuser"}, "expected 'diffusers'"),
        ({"like": "ddim"}, "ddim has no spacing='trailing', but 'leading' and 'quadratic'"),
        ({"offset": 1}, "offset=1 is for spacing='leading'"),
        ({"offset": -1, "spacing": "leading"}, "whole number >= 0"),
        ({"offset": 991, "spacing": "leading"}, r"1892.* outside"),
        ({"end": 100}, "strictly decrease"),
        ({"end": 150, "like": "diffusers"}, "strictly decrease"),
        ({"end": -1}, "outside"),
        ({"steps": [4, 4]}, "steps="),
        ({"steps": [], "like": "guided-diffusion", "spacing": "linspace"}, "one section"),
        ({"steps": 2.5, "like": "guided-diffusion", "spacing": "linspace"}, "whole number"),
        ({"steps": "10", "like": "guided-diffusion", "spacing": "linspace"}, "whole number"),
        ({"steps": [4, 4], "like": "diffusers"}, "steps="),
        ({"steps": 1001, "like": "diffusers"}, "only 1000 nodes"),
    ],
)
def test_strides_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid.strided(DDPMChain(), **{"steps": 10, **options})


def test_where_ddim_of_diffusers_steps_elsewhere() -> None:
    """It goes to k - N // K, and evaluates at the next k: what `scoresde.strides` says of it, counted."""
    elsewhere, first_node = {}, {}
    for spacing in ("leading", "trailing", "linspace"):
        for K in range(1, 1001):
            k = stride(1000, K, spacing, "diffusers")[::-1]  # type: ignore[arg-type]
            elsewhere[spacing] = elsewhere.get(spacing, 0) + bool((k[:-1] - 1000 // K != k[1:]).any())
            first_node[spacing] = first_node.get(spacing, 0) + bool(k[-1] - 1000 // K == 0)
    assert elsewhere == {"leading": 0, "trailing": 984, "linspace": 998}
    assert first_node == {"leading": 0, "trailing": 372, "linspace": 0}


# A user's own times


@pytest.mark.parametrize(
    "own",
    [
        [1.0, 0.5, 0.25, 0.0],
        (1, 0.5, 0.25, 0),
        np.array([1.0, 0.5, 0.25, 0.0]),
        np.array([1.0, 0.5, 0.25, 0.0], dtype=np.float32),
        np.array([0.0, 0.25, 0.5, 1.0])[::-1],  # what np.linspace(0, 1, n)[::-1] is: a view with a negative stride
        torch.tensor([1.0, 0.5, 0.25, 0.0]),
        torch.tensor([1.0, 0.5, 0.25, 0.0], dtype=torch.float64, requires_grad=True),
        torch.tensor([0.0, 0.25, 0.5, 1.0]).flip(0),
    ],
    ids=["list", "tuple", "float64 array", "float32 array", "reversed array", "float32", "with gradient", "flipped"],
)
def test_own_times_are_kept_as_they_are(own: Any) -> None:
    grid = Grid(VPSDE(), own)
    assert grid.times.tolist() == [1.0, 0.5, 0.25, 0.0]
    assert grid.times.dtype == torch.float64
    assert not grid.times.requires_grad


def test_integer_times_of_a_chain() -> None:
    assert Grid(DDPMChain(), torch.tensor([1000, 500, 1, 0])) == Grid(DDPMChain(), [1000.0, 500.0, 1.0, 0.0])


def test_own_times_are_copied() -> None:
    for own in (torch.tensor([1.0, 0.5], dtype=torch.float64), np.array([1.0, 0.5])):
        grid = Grid(VPSDE(), own)
        own[0] = 0.7
        assert grid.times.tolist() == [1.0, 0.5]


def test_own_times_are_not_rounded_to_float32() -> None:
    """0.7 has no exact float32, so a list that passes through one moves its times, and t_max out of the SDE."""
    assert Grid(CosineVPSDE(), [0.9946, 0.7, 1e-5]).times.tolist() == [0.9946, 0.7, 1e-5]


def test_own_times_need_not_reach_either_end() -> None:
    assert Grid(VPSDE(), [0.5, 0.1]).steps == 1


def test_equality_is_that_of_the_sde_and_the_times() -> None:
    a, b = VPSDE(), VESDE()
    assert Grid.uniform(a, 4) == Grid(a, [1, 0.75, 0.5, 0.25, 0])
    assert Grid.uniform(a, 4) == Grid.uniform(VPSDE(), 4)
    assert Grid.uniform(a, 4) != Grid.uniform(b, 4)
    assert Grid.uniform(a, 4) != Grid.uniform(a, 5)
    assert Grid.uniform(a, 4) != Grid.uniform(a, 4, end=1e-3)
    assert Grid.uniform(a, 4) != [1, 0.75, 0.5, 0.25, 0]
    with pytest.raises(TypeError, match="unhashable"):
        hash(Grid.uniform(a, 4))


@all_sdes
@all_spacings
def test_repr_shows_the_times_that_are_stepped_on(name: str, spacing: str) -> None:
    grid = make(name, spacing, 8)
    shown = repr(grid).rpartition(": ")[2].rstrip(")").split(", ")
    assert [float(t) for t in shown] == pytest.approx(grid.times.tolist(), rel=1e-4)
    assert repr(SDES[name]) in repr(grid)


def test_repr_of_a_long_grid_shows_its_ends() -> None:
    shown = repr(Grid.uniform(VPSDE(), 1000))
    assert len(shown) < 250
    assert "1, 0.999, 0.998" in shown
    assert shown.endswith("0.001, 0)")


# What is refused


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.0, 0.5, 1.0], "strictly decrease"),
        ([1.0, 0.5, 0.7, 0.0], r"t_1 = 0.5 is followed by t_2 = 0.7"),
        ([1.0, 0.5, 0.5, 0.0], r"t_1 = 0.5 is followed by t_2 = 0.5"),
        ([1.0, 0.0, 0.0], "strictly decrease"),
        ([1.1, 0.5], "outside"),
        ([1.0 + 1e-9, 0.5], "outside"),
        ([1.0, -1e-9], "outside"),
        ([1.0, math.nan, 0.0], "finite"),
        ([math.inf, 0.5], "finite"),
        ([1.0], "at least two"),
        ([], "at least two"),
        (1.0, "at least two"),
        ([[1.0, 0.5]], "at least two"),
    ],
)
def test_bad_times_are_refused(times: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(VPSDE(), times)


def test_times_before_the_sde_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="expected an SDE"):
        Grid([1.0, 0.0], VPSDE())  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [0, -1, 2.5, 3.0, True, "4", None])
@pytest.mark.parametrize("spacing", [*SPACINGS, "strided", "customary"])
def test_steps_must_be_a_whole_number(spacing: str, steps: Any) -> None:
    sde = DDPMChain() if spacing == "strided" else VPSDE()
    with pytest.raises(ValueError, match="whole number >= 1"):
        getattr(Grid, spacing)(sde, steps)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Grid.uniform(VPSDE(), 4, start=1.5), "0 <= end < start"),
        (lambda: Grid.uniform(VPSDE(), 4, start=0.2, end=0.2), "0 <= end < start"),
        (lambda: Grid.uniform(VPSDE(), 4, start=0.2, end=0.3), "0 <= end < start"),
        (lambda: Grid.uniform(VPSDE(), 4, end=-0.1), "0 <= end < start"),
        (lambda: Grid.uniform(VPSDE(), 4, start=math.nan), "0 <= end < start"),
        (lambda: Grid.uniform(VPSDE(), 4, end=math.nan), "0 <= end < start"),
        (lambda: Grid.quadratic(VPSDE(), 4, end=-0.1), "0 <= end < start"),
        (lambda: Grid.log_snr(VPSDE(), 4, last=1.0), "< start"),
        (lambda: Grid.log_snr(VPSDE(), 4, last=-1.0), "< start"),
        (lambda: Grid.log_snr(VPSDE(), 4, last=0.0), "half_log_snr is infinite"),
        (lambda: Grid.karras(VPSDE(), 4, last=0.0), "half_log_snr is infinite"),
        (lambda: Grid.log_snr(FlowSDE(), 4), "half_log_snr is infinite"),
        (lambda: Grid.karras(FlowSDE(), 4), "half_log_snr is infinite"),
        (lambda: Grid.log_snr(CosineVPSDE(t_max=1.0), 4), "half_log_snr is infinite"),
        (lambda: Grid.karras(CosineVPSDE(t_max=1.0), 4), "half_log_snr is infinite"),
        (lambda: Grid.karras(VPSDE(), 4, rho=0.0), "rho=0.0"),
        (lambda: Grid.karras(VPSDE(), 4, rho=-7.0), "rho=-7.0"),
        (lambda: Grid.karras(VPSDE(), 4, rho=math.nan), "rho=nan"),
        (lambda: Grid.shifted(FlowSDE(), 4, shift=0.0), "shift=0.0"),
        (lambda: Grid.shifted(FlowSDE(), 4, shift=math.inf), "shift=inf"),
        (lambda: Grid.shifted(FlowSDE(), 4, end=0.1, last=0.2), "last"),
        (lambda: Grid.shifted(FlowSDE(), 4, last=0.0), "last="),
        (lambda: Grid.shifted(FlowSDE(), 4, start=1.5), "0 <= end < start"),
        (lambda: Grid.shifted(VPSDE(), 4), "FlowSDE's times"),  # type: ignore[arg-type]
        (lambda: Grid.strided(VPSDE(), 4), "DDPMChain"),  # type: ignore[arg-type]
        (lambda: Grid.strided(DDPMChain(), 4, "even"), "spacing='even'"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused(build: Callable[[], Grid], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("spacing", STRIDES)
def test_more_steps_than_nodes_are_refused(spacing: str) -> None:
    with pytest.raises(ValueError, match="only 10 nodes"):
        Grid.strided(DDPMChain.linear(10), 11, spacing)  # type: ignore[arg-type]


@pytest.mark.parametrize("K", [100, 500, 1000])
def test_nodes_that_collide_when_rounded_are_refused(K: int) -> None:
    """DDIM's quadratic stride at 100 steps has its first nodes within one; elsewhere this divides by zero."""
    with pytest.raises(ValueError, match="strictly decrease"):
        Grid.strided(DDPMChain(), K, "quadratic")


@pytest.mark.parametrize("spacing", LOGARITHMIC)
def test_an_end_and_a_last_time_at_once_are_refused(spacing: str) -> None:
    """`last` is where the noisy times stop before end = 0; with another end it would be ignored."""
    with pytest.raises(ValueError, match="last"):
        make("vp", spacing, 4, end=1e-2, last=1e-3)


# The way up


def test_only_reversed_makes_a_grid_that_increases() -> None:
    grid = Grid(VPSDE(), [1.0, 0.5, 0.25, 1e-5])
    up = grid.reversed()
    assert (grid.increasing, up.increasing) == (False, True)
    assert up.times.tolist() == [1e-5, 0.25, 0.5, 1.0]
    assert up.steps == grid.steps == 3
    assert up != grid
    assert up == grid.reversed()
    assert up.reversed() == grid
    assert repr(up) == f"Grid({VPSDE()!r}, 3 steps: 1e-05, 0.25, 0.5, 1)"
    assert grid.times.tolist() == [1.0, 0.5, 0.25, 1e-5]
    up.times[0] = 0.1  # no memory is shared
    assert float(grid.times[-1]) == 1e-5
    with pytest.raises(ValueError, match=r"strictly decrease.*reversed\(\)"):
        Grid(VPSDE(), [1e-5, 0.25, 0.5, 1.0])


@all_sdes
def test_pairs_of_the_way_up_are_those_of_the_way_down(name: str) -> None:
    grid = make(name, "uniform", 5, end=SDES[name].t_min)
    alpha_t, sigma_t, alpha_s, sigma_s = (column.flip(0) for column in grid.pairs())
    for found, expected in zip(grid.reversed().pairs(), (alpha_s, sigma_s, alpha_t, sigma_t), strict=True):
        assert torch.equal(found, expected)


def test_a_grid_to_the_data_has_no_way_up() -> None:
    for sde in SDES.values():
        with pytest.raises(ValueError, match=r"end=sde.t_min \("):
            Grid.uniform(sde, 3).reversed()


@all_sdes
@pytest.mark.parametrize("steps", [1, 3])
def test_customary_grid_to_noise(name: str, steps: int) -> None:
    sde = SDES[name]
    grid = Grid.customary(sde, steps, end=sde.t_min)
    assert grid.times[[0, -1]].tolist() == [sde.t_max, sde.t_min]
    assert grid.steps == steps
    assert Grid.customary(sde.unrounded, steps, end=sde.t_min).steps == steps
    if isinstance(sde, DDPMChain):
        assert torch.equal(grid.times, grid.times.round())
        assert Grid(sde, [*grid.times.tolist(), 0.0]) == Grid.strided(sde, steps + 1, "linspace")
    elif isinstance(sde, EDMSDE):
        assert grid == Grid.karras(sde, steps, end=sde.t_min)
    else:
        assert grid == Grid.uniform(sde, steps, end=sde.t_min)
