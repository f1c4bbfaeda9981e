"""A Brownian path per sample: the same path whatever the grid, so that refining the steps converges sample by sample.

The reverse SDE has a Brownian motion of its own clock, the SNR. With lambda = half log-SNR and tau = e^{2 lambda}, its
exact solution with D held fixed (`ExponentialSDE`) is, for z = tau x / alpha,

    dz = D dtau + dB_tau,    x_s = (alpha_s / tau_s) z_s

so the noise of a step t -> s is (alpha_s / tau_s) (B(tau_s) - B(tau_t)), of standard deviation
(alpha_s / tau_s) sqrt(tau_s - tau_t) = sigma_s sqrt(1 - e^{-2h}): DDPM's. `BrownianNoise` therefore hands a table

    z_i = (B(tau_s) - B(tau_t)) / sqrt(tau_s - tau_t)

as the z of the row that steps t -> s. Methods that see the noise in another clock (Euler-Maruyama in t) meet increments
of another weighting within the step, which differ by O(h) of their size: strong order 1 all the same.

The path is built from the coarse to the fine. Over an interval of length h (in its clock) it is known by its increment
W and, where a solver asks for it, by its area H: h H is the integral of the path less its chord, H ~ N(0, h / 12)
independent of W. Cut at the fraction p, with q = 1 - p and the path D above the chord there,

    H = p H_left + q H_right + D / 2,    D ~ N(0, h p q),    H_left ~ N(0, h p / 12),    H_right ~ N(0, h q / 12)

and the halves are drawn from the Gaussian law of D and H_left given H. (The pair is that of Foster, Lyons and
Oberhauser, 2020, "An optimal polynomial approximation of Brownian motion".) The cuts are the dyadic fractions of a
fixed interval of lambda, down to cells of 2^-11, each with its own random numbers: nothing depends on the times or the
order of questions. Inside a cell the path is a curve on which each point has the law that it should have. Hence the law
at any times is exact where no two of them share a cell; nearer ones are too alike.

Solvers whose samples have times of their own, in a clock of their own, take `BridgeNoise`, which is fed with draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from scoresde.masks import Own
from scoresde.sde import SDE
from scoresde.tableau import Tableau
from scoresde.tensors import expand_like

__all__ = ["BridgeNoise", "BrownianNoise", "BrownianPath", "FreshNoise", "snr", "where_sample"]

_RANGE = 64.0  # lambda runs over [-64, 64]
_LEVELS = 18  # cells of 2^-11


def snr(half_log_snr: float) -> float:
    """tau = alpha^2 / sigma^2, the clock of the reverse SDE's noise."""
    return math.exp(2 * half_log_snr)


class _Interval:
    """The path over [low, high] of lambda, clock times [a, b], shape (B, n) each.

    Attributes:
        W, H: its increment, and its area over b - a or None.
        start: value of the path at its left end, and the path's integral over the clock up to there or None.
        halves: once it has been cut.
    """

    def __init__(self, level: int, index: int, a: float, b: float, W: Tensor, H: Tensor | None, start: _Point) -> None:
        self.level, self.index, self.a, self.b, self.W, self.H, self.start = level, index, a, b, W, H, start
        width = 2 * _RANGE / 2**level
        self.low = -_RANGE + index * width
        self.high = self.low + width
        self.halves: tuple[_Interval, _Interval] | None = None


_Point = tuple[Tensor, Tensor | None]


class BrownianPath:
    """A Brownian motion for each sample, as a function of half log-SNR. Its increment over [lambda_0, lambda_1] has the
    variance clock(lambda_1) - clock(lambda_0).

    Args:
        entropies: one number per sample, in [0, 2^128): all that its path depends on.
        event: shape of a sample.
        clock: increasing function of lambda; by default the identity.
        area: whether its integral is wanted too.
        own: the entries that a sample has a path of, by default all: the numbers of the path depend on them alone.
    """

    def __init__(
        self,
        entropies: Sequence[int],
        event: Sequence[int],
        clock: Callable[[float], float] = float,
        area: bool = False,
        own: Own | None = None,
    ) -> None:
        self.shape = (len(entropies), *event)
        self._own = own or Own(self.shape)
        n = math.prod(event)
        self._counts = [n] * len(entropies) if self._own.mask is None else self._own.dims.long().tolist()
        self._keys = [np.array([e % 2**64, e >> 64], dtype=np.uint64) for e in entropies]
        self._philox = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._philox)
        self._clock, self._area = clock, area
        a, b = clock(-_RANGE), clock(_RANGE)
        W, *Y = math.sqrt(b - a) * self._normals(0, 0)
        zero = torch.zeros_like(W)
        root = _Interval(0, 0, a, b, W, Y[0] / math.sqrt(12) if area else None, (zero, zero if area else None))
        self._stack = [root]

    def at(self, half_log_snr: float) -> tuple[Tensor, Tensor | None]:
        """The path W, and with `area` its integral over the clock, each float64 of shape (B, *event) on the host; zero
        at -inf.

        Raises:
            ValueError: if lambda > 64, or it is NaN.
        """
        if not half_log_snr <= _RANGE:
            raise ValueError(f"the Brownian path ends at half_log_snr = {_RANGE}, asked at {half_log_snr}")
        at = max(half_log_snr, -_RANGE)
        while not self._stack[-1].low <= at <= self._stack[-1].high:
            self._stack.pop().halves = None  # made again when asked for: a batch's worth of memory for each
        while self._stack[-1].level < _LEVELS:
            left, right = self._halves(self._stack[-1])
            self._stack.append(left if at <= left.high else right)
        cell = self._stack[-1]
        W, A = cell.start
        if at > cell.low:
            left = self._left(cell, self._clock(at))
            W, A = self._end(left)
        return self._own.placed(W), None if A is None else self._own.placed(A)

    def between(self, start: float, end: float) -> _Point:
        """The increment over [start, end] of lambda, and with `area` the integral of the path over it less its value at
        the start, (B, *event) each.
        """
        (W_a, A_a), (W_b, A_b) = self.at(start), self.at(end)
        if A_a is None or A_b is None:
            return W_b - W_a, None
        return W_b - W_a, A_b - A_a - W_a * (self._clock(end) - self._clock(start))

    def _end(self, i: _Interval) -> _Point:
        """The path and its integral at an interval's right end."""
        W, A = i.start
        return W + i.W, None if A is None or i.H is None else A + (i.b - i.a) * (W + i.W / 2 + i.H)

    def _halves(self, i: _Interval) -> tuple[_Interval, _Interval]:
        """An interval in two, at the middle of its lambda."""
        if i.halves is None:
            middle = self._clock((i.low + i.high) / 2)
            left = self._left(i, middle)
            H = None
            if i.H is not None and left.H is not None:
                p, q = (middle - i.a) / (i.b - i.a), (i.b - middle) / (i.b - i.a)
                H = (i.H - p * left.H - (left.W - p * i.W) / 2) / q
            right = _Interval(left.level, left.index + 1, middle, i.b, i.W - left.W, H, self._end(left))
            i.halves = left, right
        return i.halves

    def _left(self, i: _Interval, cut: float) -> _Interval:
        """What is left of a clock time, by the law of the module's docstring; the random numbers are the interval's."""
        h, p, q = i.b - i.a, (cut - i.a) / (i.b - i.a), (i.b - cut) / (i.b - i.a)
        X, *Y = self._normals(i.level + 1, i.index)
        if i.H is None:
            D, H = math.sqrt(h * p * q) * X, None
        else:
            D = 6 * p * q * i.H + math.sqrt(h * p * q * (1 - 3 * p * q)) * X
            cubes = p**3 + q**3
            H = p * p / cubes * (i.H - D / 2) + math.sqrt(h * p * q**3 / (12 * cubes)) * Y[0]
        return _Interval(i.level + 1, 2 * i.index, i.a, cut, p * i.W + D, H, i.start)

    def _normals(self, level: int, index: int) -> Tensor:
        """Standard normals (1, B, n), or two of them for the area: Philox's counter says of which interval."""
        X = np.zeros((1 + self._area, self.shape[0], max(self._counts)))
        for (sample, key), count in zip(enumerate(self._keys), self._counts, strict=True):
            self._philox.state = {
                "bit_generator": "Philox",
                "state": {"counter": np.array([0, 0, index, level], dtype=np.uint64), "key": key},
                "buffer": np.zeros(4, dtype=np.uint64),
                "buffer_pos": 4,
                "has_uint32": 0,
                "uinteger": 0,
            }
            for x in X:
                self._generator.standard_normal(out=x[sample, :count])
        return torch.from_numpy(X)


class BrownianNoise:
    """The noise of a table as the normalised increments of one path per sample: z_i of the module's docstring.

    Called as noise(row, x), in any order of the rows and as often as you like. Tables on other grids see the same
    path. A row costs about ten draws of the batch's size, on the host: for studies of convergence and samples
    that keep their look when the step count changes, not for speed.

    Args:
        table: the table.
        entropies: one per sample, as `SeededNoise.entropies` gives them.
        own: the entries that a sample has, as for `BrownianPath`.

    Raises:
        ValueError: if a noisy row is not a whole step of the grid, one row from one time to the next, with noise left
            at its end.
    """

    def __init__(self, table: Tableau, entropies: Sequence[int], own: Own | None = None) -> None:
        sde, times = table.grid.sde, table.grid.times
        noisy = table.c > 0
        rows_of_step = torch.bincount(table.step, minlength=table.grid.steps)[table.step]
        whole = (rows_of_step == 1) & (table.t == times[table.step]) & (sde.sigma(times[table.step + 1]) > 0)
        if bool((noisy & ~whole).any()):
            rows = (noisy & ~whole).nonzero().flatten().tolist()
            raise ValueError(
                f"row {rows[0]} draws noise but is not a whole step of the grid, so its noise is no increment of a "
                "path: use a solver with one row a step (DDPM, ExponentialSDE, EulerMaruyama, ...), or path=False"
            )
        self._ends = list(zip(_lambdas(sde, table.t), _lambdas(sde, times[table.step + 1]), strict=True))
        self._entropies, self._own = list(entropies), own
        self._path: BrownianPath | None = None

    def __call__(self, row: int, x: Tensor) -> Tensor:
        if self._path is None:
            if len(self._entropies) != len(x):
                raise ValueError(f"{len(self._entropies)} entropies for {len(x)} samples: give one per sample")
            self._path = BrownianPath(self._entropies, x.shape[1:], snr, own=self._own)
        start, end = self._ends[row]
        before, after = self._path.at(start)[0], self._path.at(end)[0]
        return ((after - before) / math.sqrt(snr(end) - snr(start))).to(x)


def _lambdas(sde: SDE, t: Tensor) -> list[float]:
    """log(alpha c / sigma), c the SDE's `data_scale`: in whatever unit the data are, the path is the same."""
    numbers: list[float] = (sde.half_log_snr(t) + math.log(sde.data_scale)).tolist()
    return numbers


def where_sample(chosen: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Samples of x where chosen, shape (B,), holds, else of y."""
    return torch.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), x, y)


class FreshNoise:
    """Brownian increments drawn anew at every attempt, sqrt(h) z.

    Args:
        clock: where each sample starts, shape (B,).
        x: what the increments are shaped like, (B, ...).
    """

    def __init__(self, clock: Tensor, x: Tensor) -> None:
        self.full = torch.zeros((), dtype=torch.bool, device=x.device)

    def increment(self, clock: Tensor, h: Tensor, z: Tensor) -> Tensor:
        """From clock to clock + h, each of shape (B,), made of z ~ N(0, I)."""
        return expand_like(h.sqrt(), z) * z

    def move(self, accept: Tensor, clock: Tensor) -> None:
        """After an attempt: which samples accepted it, and where the clock now is."""

    def grow(self) -> None:
        """Make room, if `full` said so."""


class BridgeNoise(FreshNoise):
    """A Brownian path for each sample that remembers where it was seen, at the ends s of attempts. Between two such
    points, l and r, it is a bridge, W(s) = W_l + (s - l) / (r - l) (W_r - W_l) + sqrt((s - l) (r - s) / (r - l)) z.

    Slots hold the points seen, in any order, shape (S, B); one that the sample has passed, or -inf, is free.
    """

    def __init__(self, clock: Tensor, x: Tensor) -> None:
        super().__init__(clock, x)
        self.at, self.seen = clock.new_full((1, len(clock)), -math.inf), torch.zeros_like(x)[None]
        self.here = self.end = torch.zeros_like(x)

    def increment(self, clock: Tensor, h: Tensor, z: Tensor) -> Tensor:
        s, sample = clock + h, torch.arange(len(clock), device=clock.device)
        l, i = torch.where(self.at <= s, self.at, -math.inf).max(0)  # noqa: E741
        r, j = torch.where(self.at > s, self.at, math.inf).min(0)
        W_l = where_sample(l > clock, self.seen[i, sample], self.here)
        l = torch.maximum(l, clock)  # noqa: E741
        share = (s - l) / (r - l)  # 0 where nothing was seen beyond
        bridge = expand_like(share, z) * (self.seen[j, sample] - W_l)
        W = W_l + bridge + expand_like(((s - l) * (1 - share)).sqrt(), z) * z
        free = self.at.argmin(0)
        self.at[free, sample], self.seen[free, sample] = s, W
        self.end = W
        return W - self.here

    def move(self, accept: Tensor, clock: Tensor) -> None:
        self.here = where_sample(accept, self.end, self.here)
        self.full = (self.at > clock).all(0).any()

    def grow(self) -> None:
        self.at = torch.cat([self.at, torch.full_like(self.at[:1], -math.inf)])
        self.seen = torch.cat([self.seen, torch.zeros_like(self.seen[:1])])
