"""The variational bound on log p(x_0), of a discrete chain and in continuous time.

For any process q that has the SDE's marginals q(x_t | x_0) = N(alpha_t x_0, sigma_t^2), by Jensen's inequality,

    log p(x_0) >= - KL(q(x_T | x_0) | N(0, prior_std^2))                               prior
                  - sum_{t -> s} E KL(q(x_s | x_t, x_0) | p(x_s | x_t))                denoising
                  + E log p(x_0 | x_{t_1})                                             reconstruction

A denoiser of states z with a codec (`scoresde.Latent`) has this bound of z, and of data that of `scoresde.codecs`: with
the codec's volume, or with an encoder q(z | x) that has noise and a decoder's likelihood,

    log p(x) >= E_q[bound of z] + E_q log p(x | z) + H[q(z | x)]                         decoding, entropy

where each evaluation has a z of its own. A codec with neither leaves the bound of z.

The terms are those of a solver's chain (`scoresde.likelihood.chain`), or of its limit of ever more steps, continuous
time (`scoresde.likelihood.continuous`). The last is the decoder's (`scoresde.likelihood.decoder`).

Errors of the mean are taken in what the network itself predicts, as in `scoresde.training.loss`: no digit is lost at
small t. Everything but the network is in float64, whatever x is: float32 rounds data of mean 1e5 by 0.004, and the
noise of small t is as small.

Sources: Sohl-Dickstein et al. (2015); Ho et al. (2020), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.categorical import StateDenoiser, StateSolver
from scoresde.checks import ArgumentError, check_count, check_option
from scoresde.denoiser import Denoiser, check_call
from scoresde.entries import check_cond
from scoresde.errors import NonFiniteError, not_finite, some
from scoresde.grid import Grid
from scoresde.likelihood.chain import Chain
from scoresde.likelihood.continuous import Continuous
from scoresde.likelihood.decoder import Data, Decoder, Draws, float64, gaussian_kl, square_norm, total
from scoresde.likelihood.interval import degrees_of_freedom, student_interval
from scoresde.likelihood.states import StateBound
from scoresde.masked import own_of
from scoresde.masks import Own
from scoresde.run import encoded
from scoresde.solvers.base import Solver
from scoresde.tensors import check_batch, told

__all__ = ["Elbo", "elbo"]


@dataclass(frozen=True)
class Elbo:
    """A lower bound on log p(x) in nats, estimated without bias: value = prior + denoising + reconstruction, of z where
    there is a codec, and then log_volume, or decoding + entropy.

    Attributes:
        value: the bound, shape (B,).
        stderr: its standard error, shape (B,). It covers the draws of the noise, and of lambda in continuous time, for
            this very x: neither the distance to log p(x), nor the spread over the data. Its square is unbiased, or a
            little large, but uncertain where the terms are few: `interval`. NaN with draws=1.
        dof: its degrees of freedom, at least 1, shape (B,). NaN with draws=1.
        prior: minus the divergence of q(x_T | x_0) from the prior, exact, shape (B,).
        denoising: minus the sum of the steps' divergences, or the integral over lambda, shape (B,).
        reconstruction: E log p(x_0 | x_{t_1}), shape (B,); a log probability if levels were given, else a log density.
        nfe: evaluations of the denoiser that were made, each on the whole batch.
        dim: number of dimensions of a sample of what the bound is of: one for all, or of a `scoresde.Masked` denoiser
            the own of each, float64, shape (B,).
        of: "x", the data given; or "z", where a codec has neither a volume nor a bound, and value says nothing of data.
        log_volume: log |det dz/dx| of a codec that has it, shape (B,), else None.
        decoding: E log p(x | z) of a codec that has it, shape (B,), else None.
        entropy: H[q(z | x)] of its encoder, exact, shape (B,), else None.
        stderrs: the standard error of each term that is estimated, by its name, shape (B,): of denoising,
            reconstruction and, where there is one, decoding. Their draws are not shared, so stderr^2 is the sum of
            their squares.
    """

    value: Tensor
    stderr: Tensor
    dof: Tensor
    prior: Tensor
    denoising: Tensor
    reconstruction: Tensor
    nfe: int
    dim: int | Tensor
    of: Literal["x", "z"] = "x"
    log_volume: Tensor | None = None
    decoding: Tensor | None = None
    entropy: Tensor | None = None
    stderrs: dict[str, Tensor] = field(default_factory=dict)

    __repr__ = told

    @property
    def bits_per_dim(self) -> Tensor:
        """-value / (dim ln 2), shape (B,): an upper bound on the code length if levels were given. Without, that of a
        density in the units of x, which no offset has made a code length yet.

        Raises:
            ValueError: if the bound is that of z.
        """
        if self.of == "z":
            raise ValueError(
                "the bound is of z, not of data: its codec has no volume, and not both of an encoder's noise and a "
                "decoder's likelihood (AutoencoderCodec(encoder, decoder, std=...), with an encoder that returns two)"
            )
        return -self.value / (self.dim * math.log(2))

    def of_levels(self, levels: int, data_range: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """Bits per dimension of images of whole levels and their standard error, each of shape (B,), x being these
        `dequantized`: `bits_per_dim` and the offset log2(levels / (hi - lo)), data_range being (lo, hi).
        """
        lo, hi = data_range
        return self.bits_per_dim.double() + math.log2(levels / (hi - lo)), self.stderr / (self.dim * math.log(2))

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The ends of value -+ t_{(1 + level) / 2}(dof) stderr, t(dof) the quantiles of Student's t: what covers the
        bound's mean over the draws.

        Measured for 95 %, beside value -+ 1.96 stderr, in 1 to 200 dimensions: 91 to 97 % of runs of 20 steps and 2
        draws (82 to 89 %), 92 to 96 % of 20 steps and 8 draws (91 to 95 %), 94 to 97 % of 100 steps and 2 draws (90 to
        93 %), 96 to 98 % of 64 strata (92 to 97 %). With 8 strata or fewer, or 5 steps and 2 draws, down to 80 %.

        Args:
            level: in (0, 1).

        Raises:
            ValueError: on another level.
        """
        return student_interval(self.value, self.stderr, self.dof, level)


def elbo(
    denoiser: Denoiser | StateDenoiser[Any],
    x: Tensor,
    solver: Solver | StateSolver | None = None,
    grid: Grid | None = None,
    *,
    draws: int | None = None,
    seed: int | Sequence[int] | None = None,
    variance: Literal["solver", "posterior"] = "solver",
    decoder: float | None = None,
    levels: int | None = None,
    data_range: tuple[float, float] = (-1.0, 1.0),
    cond: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Elbo:
    """A lower bound on log p(x): of the chain that a solver makes on a grid, or in continuous time without both.

    Of whole states (`scoresde.categorical`) value is a log probability, and the solver Ancestral(); without grid the
    bound is that of all steps of their process, or in continuous time, where it has none. variance, decoder, levels and
    data_range are not for them.

    Args:
        denoiser: the model.
        x: data x_0, shape (B, ...), floating point, or whole states; the denoiser's codec encodes them, if it has one.
            Where the network has dropout, call net.eval() first.
        solver: one evaluation and fresh noise a step: DDPM(), DDIM(eta=1), ExponentialSDE(), EulerMaruyama(), ...
        grid: from x_T to t = 0, given with the solver. Its last step is the decoder.
        draws: of x_t for each term of a chain, by default as many as make 200 evaluations, but 2 at least. In
            continuous time, the number of strata of lambda, 64 by default, with one draw each; the reconstruction then
            takes draws / 16, at least 2. A codec decodes as many as the reconstruction has.
        seed: one integer, or one for each sample; sample i is the same alone or in any batch. By default from the
            operating system.
        variance: v of a step, "solver" for c^2, or "posterior" for c^2 + b'^2 Var[x_0 | x_t] elementwise, the optimum,
            which needs a denoiser that knows its variance (Analytic-DPM). Of chains only.
        decoder: standard deviation of the decoder, of z where there is a codec. By default sigma / alpha at the last
            noisy time, right for data that is smooth on that scale; but on a `DDPMChain` whose last noisy node is 1, as
            in DDPM's code, the square root of the posterior variance sigma_s^2 (1 - e^{-2h}) of its nodes 2 -> 1,
            whatever the grid. (On another grid that variance would vanish with its last step, and the bound fall
            without end as steps are added.)
        levels: for data of so many grey levels, the decoder's Gaussian is integrated over the bin of x: level k fills
            [lo + k Delta, lo + (k + 1) Delta], Delta = (hi - lo) / levels, and the first and last bin go on to
            infinity. x stands anywhere in its bin, best in the middle. Without levels it is a density. Not with a
            codec, whose z have no such bins: give x `dequantized`, and take `Elbo.of_levels`.
        data_range: (lo, hi), what the bins fill (`scoresde.levels.outer_edges` makes it from the lowest
            and the highest level).
        cond: keyword arguments for the network, as for `sample`.
        progress: show a progress bar.

    Returns:
        The bound and its parts, float64, shape (B,): float32 has steps of 0.06 nats at 1e6.

    Raises:
        TypeError: if denoiser or solver is none.
        ValueError: before any evaluation, if the bound is minus infinity (a step without noise, of DDIM(eta=0) say),
            the table has steps of several evaluations or with memory, the grid does not end at t = 0 or has another
            SDE, x is not finite or outside the data range, or arguments contradict each other. After the first, if
            variance="posterior" and the denoiser gives none.
        NonFiniteError: if a term is not finite, with the step, the time and the samples, or what a codec adds.

    >>> from scoresde import VPSDE
    >>> from scoresde.exact import Gaussian
    >>> from scoresde.solvers import DDPM
    >>> target = Gaussian(mean=[3.0, -1.0], std=0.5)
    >>> x, sde = target.sample(4, torch.Generator().manual_seed(0)), VPSDE()
    >>> bound = elbo(target.denoiser(sde), x, DDPM(), Grid.power(sde, 50), seed=0)
    >>> bound.nfe, bool((bound.value < target.log_prob(x)).all())
    (200, True)
    """
    if isinstance(denoiser, StateDenoiser):
        if variance != "solver" or decoder is not None or levels is not None:
            raise ArgumentError("variance=, decoder= and levels= are of numbers: whole states need none of them")
        return _of_states(denoiser, x, (solver, grid, draws), seed, cond, progress)
    check_batch(x, "x")
    if isinstance(solver, StateSolver):
        raise TypeError(f"{solver!r} is of whole states, and {denoiser!r} of numbers")
    denoiser, own = own_of(denoiser, x.shape, cond)
    x = own.only(x)
    check_call(denoiser, x, cond, masks=True)
    check_option(("solver", "posterior"), variance=variance)
    if variance == "posterior" and denoiser.borrowed:
        raise ValueError(
            f"variance='posterior', but that of {denoiser!r} is another law's than its mean's (a guided mean with the "
            "conditional model's variance): the bound is of the model without guidance, or with variance='solver'"
        )
    if (solver is None) != (grid is None):
        raise ValueError("give solver and grid, for the bound of a chain, or neither, for that of continuous time")
    if draws is not None:
        check_count(draws=draws)
    if levels is not None and denoiser.codec is not None:
        raise ArgumentError(
            f"levels={levels} with {denoiser.codec!r}: the bins of levels are of data, and the decoder here is of z; "
            "give x dequantized(images, levels), without levels=, and take .of_levels(levels, data_range)"
        )
    draw = Draws.of(x, seed, own)
    x0 = float64(x)
    if solver is None or grid is None:
        if variance != "solver":
            raise ValueError(f"variance={variance!r} is an option of chains: in continuous time it makes no difference")
        run: Chain | Continuous = Continuous.of(denoiser.sde, draws or 64, draw)
    else:
        run = Chain.of(denoiser, solver, grid, draws, draw, variance)
    decode = Decoder.of(x0, run.decoder if decoder is None else decoder, levels, data_range, own)
    with torch.no_grad():
        given = _Given.of_data(denoiser, x0, own, cond, draw, run.decodings)
        told = denoiser.prepared(cond)
    with torch.no_grad(), tqdm(desc="elbo", total=run.nfe, unit="nfe", disable=not progress, leave=False) as bar:
        terms = run.terms(denoiser, given.data, decode, told, bar.update)
        alpha, sigma = float(denoiser.sde.alpha(run.start)), float(denoiser.sde.sigma(run.start))
        std = denoiser.sde.prior_std_at(run.start)
        prior = -gaussian_kl(given.dim, (sigma / std) ** 2, given.square * (alpha / std) ** 2)
        value = prior + terms.denoising + terms.reconstruction
    squares = {"denoising": terms.of_denoising, "reconstruction": terms.of_reconstruction}
    doubt, decoding = terms.doubt, None
    if given.log_volume is not None:
        value = value + given.log_volume
    elif given.decoded is not None and given.entropy is not None:
        n, decoding = len(given.decoded), given.decoded.mean(0)
        of_decoded = given.decoded.var(0) / n if n > 1 else torch.full_like(value, math.nan)
        value = value + decoding + given.entropy
        squares, doubt = {**squares, "decoding": of_decoded}, doubt + 2 * of_decoded**2 / max(n - 1, 1)
    if bad := not_finite(value):  # the terms of z are
        raise NonFiniteError(f"what the codec adds is not finite for samples {some(bad)}", None, None, bad)
    square_error = sum(squares.values(), torch.zeros_like(value))
    return Elbo(
        value,
        square_error.sqrt(),
        degrees_of_freedom(square_error, doubt),
        prior,
        terms.denoising,
        terms.reconstruction,
        run.nfe,
        own.dims if given.of == "x" else given.dim,
        given.of,
        given.log_volume,
        decoding,
        given.entropy,
        {name: square.sqrt() for name, square in squares.items()},
    )


def _of_states(
    denoiser: StateDenoiser[Any],
    x: Tensor,
    chosen: tuple[object, Grid | None, int | None],
    seed: int | Sequence[int] | None,
    cond: Mapping[str, Any] | None,
    progress: bool,
) -> Elbo:
    """`elbo` of whole states; chosen: solver, grid and draws."""
    denoiser.check(x)
    check_cond(cond, len(x))
    draw = Draws.of(x, seed, Own(x.shape))
    run = StateBound.of(denoiser, *chosen, draw)
    with torch.no_grad(), tqdm(desc="elbo", total=run.nfe, unit="nfe", disable=not progress, leave=False) as bar:
        prior = denoiser.prior_term(x, denoiser.process.t_max)
        terms = run.terms(denoiser, x, denoiser.prepared(cond), bar.update)
    square = terms.of_denoising + terms.of_reconstruction
    return Elbo(
        prior + terms.denoising + terms.reconstruction,
        square.sqrt(),
        degrees_of_freedom(square, terms.doubt),
        prior,
        terms.denoising,
        terms.reconstruction,
        run.nfe,
        max(1, x[0].numel()),
        stderrs={"denoising": terms.of_denoising.sqrt(), "reconstruction": terms.of_reconstruction.sqrt()},
    )


class _Given(NamedTuple):
    """What the bound of z is taken at, and what the codec adds to it.

    Attributes:
        data: z of an evaluation.
        square: E |z|^2, shape (B,).
        dim: of z.
        of: as for `Elbo`.
        log_volume: of the codec.
        decoded: log p(x | z) of draws of z, shape (draws, B).
        entropy: of the encoder, shape (B,).
    """

    data: Data
    square: Tensor
    dim: int | Tensor
    of: Literal["x", "z"] = "x"
    log_volume: Tensor | None = None
    decoded: Tensor | None = None
    entropy: Tensor | None = None

    @classmethod
    def of_data(
        cls,
        denoiser: Denoiser,
        x: Tensor,
        own: Own,
        cond: Mapping[str, Any] | None,
        draw: Draws,
        decodings: int,
    ) -> _Given:
        given, codec = dict(cond or {}), denoiser.codec
        if codec is None:
            return cls(lambda: x, square_norm(x, own), own.dims)
        log_volume = codec.log_volume(x, **given)
        if log_volume is None and (law := codec.encoding(x, **given)) is not None:
            data = draw.data(law)
            found = [codec.log_likelihood(x, data(), **given) for _ in range(decodings)]
            if all(one is not None for one in found):
                decoded = torch.stack([one for one in found if one is not None])
                square = square_norm(law.mean) + total((law.std**2).expand_as(law.mean))
                return cls(data, square, law.mean[0].numel(), decoded=decoded, entropy=law.entropy())
        z = encoded(denoiser, x, cond)
        return cls(lambda: z, square_norm(z), z[0].numel(), "z" if log_volume is None else "x", log_volume)
