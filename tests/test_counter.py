"""Random numbers by counting: the authors' numbers, the same in every company, and as random as can be told.

Each statistic is compared with its standard deviation under the null hypothesis; the numbers are fixed, and a bound of
5.5 of them is crossed by chance with probability 4e-8.
"""

import itertools
import math

import pytest
import torch
from common import Nonlinear

from scoresde import VPSDE, sample
from scoresde.counter import normal, philox, words
from scoresde.noise import CounterNoise, SeededNoise, derive_seed, sample_seeds, stream_seeds
from scoresde.solvers import DDIM, DDPM, DPMSolverPP

SIGMAS = 5.5
N = 2**18


def key(*seeds):
    return torch.tensor(seeds, dtype=torch.int64)


def line(*key_and_place, n=N):
    """Normal numbers of one sample."""
    seed, stream, draw = key_and_place
    return normal(key(seed), stream, draw, n, torch.float64)[0]


def bits_of(word):
    """(n, 32)"""
    return word[:, None] >> torch.arange(32) & 1


# --- what it is -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "of", "expected"),
    [  # the known answers that come with the authors' Random123
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_authors_numbers(counter, of, expected):
    a, b, c, d, k0, k1, *wanted = (key(int(word, 16)) for word in f"{counter} {of} {expected}".split())
    assert [int(word) for word in philox((a, b, c, d), (k0, k1))] == [int(word) for word in wanted]


def test_it_is_philox_in_pythons_own_integers():
    def reference(counter, of):
        (a, b, c, d), (k0, k1) = counter, of
        for _ in range(10):
            p, q = a * 0xD2511F53, c * 0xCD9E8D57
            a, b, c, d = (q >> 32) ^ b ^ k0, q % 2**32, (p >> 32) ^ d ^ k1, p % 2**32
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        return [a, b, c, d]

    seed, stream, draw = 2**62 + 2**33 + 12345, 2**32 - 1, 2**31 + 7
    found = words(key(seed), stream, draw, 40)[0]
    for block in range(10):
        assert found[:, block].tolist() == reference((block, draw, stream, 0), (seed % 2**32, seed >> 32))


def test_normal_numbers_are_the_pairs_of_box_and_muller():
    w, z = words(key(9), 1, 2, 64)[0].double(), line(9, 1, 2, n=64)
    for i in range(64):
        radius = math.sqrt(-2 * math.log((float(w[i % 4 // 2 * 2, i // 4]) + 0.5) / 2**32))
        angle = 2 * math.pi * float(w[i % 4 // 2 * 2 + 1, i // 4]) / 2**32
        assert math.isclose(float(z[i]), radius * (math.sin(angle) if i % 2 else math.cos(angle)), abs_tol=1e-12)


@pytest.mark.parametrize("n", [1, 15, 16, 40])
def test_seeds_are_those_of_numpy(n):
    own = torch.Generator().manual_seed(n)
    for seed in (0, 7, 2**32 - 1, 2**32, 2**63 - 1, 2**64 - 1, 2**64, 2**100 + 5):
        assert sample_seeds(seed, n) == [derive_seed(seed, i) for i in range(n)]
    seeds = [*torch.randint(2**62, (n,), generator=own).tolist()]
    for given in (seeds, [*seeds[1:], 2**64 - 1], [*seeds[1:], 2**70], list(range(n))):
        for stream in (0, 1, 3, 2**31):
            assert stream_seeds(given, stream) == [derive_seed(seed, stream) for seed in given]


# --- the same in every company ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_is_the_same_in_any_batch_and_of_any_length(dtype):
    seeds = [3, 2**62 + 1, 0, 2**63 - 1]
    together = normal(key(*seeds), 1, 5, 103, dtype)
    for i, seed in enumerate(seeds):
        for n in (1, 2, 3, 4, 103, 1000):
            m = min(n, 103)
            assert torch.equal(normal(key(seed), 1, 5, n, dtype)[0, :m], together[i, :m])


@pytest.mark.parametrize("solver", [DDIM(), DDPM(), DPMSolverPP(stochastic=True)], ids=repr)
def test_samples_are_the_same_alone_and_again(solver):
    denoiser = Nonlinear(VPSDE())
    noise = CounterNoise(sample_seeds(7, 6))
    whole = sample(denoiser, (6, 3), solver, noise=noise, steps=5).x
    assert torch.equal(whole, sample(denoiser, (6, 3), solver, noise=noise, steps=5).x)
    parts = [sample(denoiser, (2, 3), solver, noise=CounterNoise(noise.seeds[i : i + 2]), steps=5).x for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)


def test_a_source_draws_again_what_it_drew():
    noise, x = CounterNoise([1, 2, 3]), torch.zeros(3, 5)
    drawn = [noise(0, x) for _ in range(3)]
    assert len({float(z[0, 0]) for z in drawn}) == 3
    noise.rewind()
    assert all(torch.equal(z, noise(0, x)) for z in drawn)
    signs = noise.probes().signs(0, 4, x)
    assert signs.shape == (4, 3, 5)
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    assert torch.equal(CounterNoise([2]).probes().signs(0, 4, x[:1])[:, 0], signs[:, 1])
    assert len(set(noise.entropies(3))) == 3
    assert all(0 <= e < 2**63 for e in noise.entropies(3))
    path = sample(Nonlinear(VPSDE()), (3, 5), DDPM(), steps=4, noise=noise, path=True).x
    alone = sample(Nonlinear(VPSDE()), (1, 5), DDPM(), steps=4, noise=CounterNoise([3]), path=True).x
    torch.testing.assert_close(alone[0], path[2], rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused():
    for seeds in ([-1], [2**63]):
        with pytest.raises(ValueError, match="seeds="):
            CounterNoise(seeds)
    noise, x = CounterNoise([1, 2]), torch.zeros(3, 5)
    for ask in (lambda: noise(0, x), lambda: noise.entropies(3), lambda: noise.signs(0, 1, x)):
        with pytest.raises(ValueError, match="2 seeds for 3 samples"):
            ask()
    with pytest.raises(ValueError, match="2 seeds for 3 samples"):
        sample(Nonlinear(VPSDE()), (3, 5), DDIM(), steps=3, noise=noise)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_every_device_has_the_same_numbers():
    seeds = key(3, 2**62 + 1)
    assert torch.equal(words(seeds.cuda(), 1, 2, 1000).cpu(), words(seeds, 1, 2, 1000))
    torch.testing.assert_close(
        normal(seeds.cuda(), 1, 2, 1000, torch.float64).cpu(),
        normal(seeds, 1, 2, 1000, torch.float64),
        rtol=1e-14,
        atol=1e-14,
    )


# --- as random as can be told -----------------------------------------------------------------------------------------

LINES = {  # of N numbers each, along what may be seen: places, samples with seeds in a row, draws, streams
    "places": lambda: words(key(1), 1, 1, N)[0].mT.flatten(),
    "samples": lambda: words(torch.arange(N), 1, 1, 1)[:, 0, 0],
    "samples by the high word": lambda: words(torch.arange(N) << 32, 1, 1, 1)[:, 0, 0],
    "draws": lambda: torch.cat([words(torch.arange(64), 1, draw, N // 4096).mT.flatten() for draw in range(64)]),
    "streams": lambda: torch.cat([words(torch.arange(64), stream, 1, N // 4096).mT.flatten() for stream in range(64)]),
}


@pytest.mark.parametrize("name", LINES)
def test_bits_are_uniform_and_independent(name):
    word = LINES[name]()
    assert word.shape == (N,)
    assert int(word.min()) >= 0
    assert int(word.max()) < 2**32
    bits = bits_of(word).double().mul_(2).sub_(1)
    assert float(bits.mean(0).abs().max()) * math.sqrt(N) < SIGMAS  # of each of 32 places
    for lag in (0, 1, 2, 3, 4, 64):  # each place with each other, of words apart
        together = bits[: N - lag].T @ bits[lag:] / math.sqrt(N - lag)
        if lag == 0:
            together.fill_diagonal_(0)
        assert float(together.abs().max()) < SIGMAS + 0.7  # 1024 of them
    for byte in range(4):
        counts = torch.bincount(word >> 8 * byte & 255, minlength=256).double()
        chi2 = float(((counts - N / 256) ** 2).sum() * 256 / N)
        assert abs(chi2 - 255) < SIGMAS * math.sqrt(2 * 255) + 10
    pairs = torch.bincount((word[::2] >> 27) * 32 + (word[1::2] >> 27), minlength=1024).double()
    chi2 = float(((pairs - N / 2048) ** 2).sum() * 2048 / N)
    assert abs(chi2 - 1023) < SIGMAS * math.sqrt(2 * 1023) + 10


def test_each_bit_of_key_and_counter_changes_half_of_the_words():
    n = 2**14
    own = torch.Generator().manual_seed(0)
    at = [torch.randint(2**32, (n,), generator=own) for _ in range(6)]
    before = philox((at[0], at[1], at[2], at[3]), (at[4], at[5]))
    for which, bit in itertools.product(range(6), range(0, 32, 5)):
        other = [a ^ (1 << bit) if i == which else a for i, a in enumerate(at)]
        after = philox((other[0], other[1], other[2], other[3]), (other[4], other[5]))
        flipped = torch.cat([bits_of(a ^ b) for a, b in zip(before, after, strict=True)], 1).double()
        assert abs(float(flipped.mean()) - 0.5) * 2 * math.sqrt(n * 128) < SIGMAS
        assert float((flipped.mean(0) - 0.5).abs().max()) * 2 * math.sqrt(n) < SIGMAS + 0.5  # of each of 128


NORMALS = {
    "places": lambda: line(1, 1, 1),
    "samples": lambda: normal(torch.arange(N // 4), 1, 1, 4, torch.float64).flatten(),
    "the first of each sample": lambda: normal(torch.arange(N), 1, 1, 1, torch.float64)[:, 0],
    "a prior": lambda: CounterNoise(sample_seeds(0, 256)).prior(VPSDE(), (256, N // 256), torch.float64, 1.0).flatten(),
}


@pytest.mark.parametrize("name", NORMALS)
def test_normal_numbers_are_normal(name):
    z = NORMALS[name]()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((z**power).mean()) - mean) < (SIGMAS + (power == 6)) * math.sqrt(variance / N)
    ordered, i = torch.special.ndtr(z.sort().values), torch.arange(N, dtype=torch.float64)
    distance = max(float((ordered - i / N).max()), float(((i + 1) / N - ordered).max()))
    assert distance * math.sqrt(N) < 2.9  # Kolmogorov and Smirnov: 1e-7
    tail = int((z.abs() > 4).sum())
    expected = N * 2 * float(torch.special.ndtr(torch.tensor(-4.0, dtype=torch.float64)))
    assert abs(tail - expected) < SIGMAS * math.sqrt(expected) + 5


def test_lines_are_not_correlated():
    """Samples of seeds in a row and of seeds that differ by a bit, draws, streams, and a line with itself farther on;
    and their squares, in which Box and Muller's pairs would show."""
    lines = {f"seed {s}": line(s, 1, 1) for s in (0, 1, 2, 3, 2**31, 2**32, 2**62)}
    lines |= {f"draw {d}": line(0, 1, d) for d in (2, 3)} | {f"stream {s}": line(0, s, 1) for s in (0, 2, 3)}
    lines |= {f"lag {lag}": line(0, 1, 1, n=N + lag)[lag:] for lag in (1, 2, 3, 4, 8, 3072)}
    z = torch.stack(list(lines.values()))
    for values, deviation in ((z, 1.0), (z**2 - 1, 2.0), (z.abs() - math.sqrt(2 / math.pi), 1 - 2 / math.pi)):
        together = values @ values.T / (deviation * math.sqrt(N))
        together.fill_diagonal_(0)
        assert float(together.abs().max()) < SIGMAS


def test_its_streams_are_not_those_of_a_generator():
    x = torch.zeros(1, 1000)
    ours, theirs = CounterNoise([5])(0, x), SeededNoise([5], torch.device("cpu"))(0, x)
    assert abs(float((ours * theirs).mean())) * math.sqrt(1000) < SIGMAS
