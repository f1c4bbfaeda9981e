"""Several models at once.

    Product      score' = sum_i w_i score_i, or from a base score_0 + sum_i w_i (score_i - score_0)
    Mixture      score' = sum_i r_i score_i,    r_i = w_i p_i,t(x_t) / sum_j w_j p_j,t(x_t)

The mixture is exact where the r_i are: its marginals are sum_i w_i p_i,t. The product is not. At t -> 0 its score is
that of p' ~ prod_i p_i^{w_i} (with a base, p_0 prod_i (p_i / p_0)^{w_i}), but the noised marginals of p' are not the
products of the p_i,t, so no solver of the reverse SDE or ODE samples p', however many its steps, nor is log_prob its
density. Two unit Gaussians of means +-1 on a VP SDE are an extreme: p' is N(0, 1/2), and so is the product of the
marginals at every t; but from that score the reverse SDE samples N(0, 1/3), and the ODE a single point. With the base
N(0, 1) p' is N(0, 1), and everything is exact. So give a base where there is one (composable diffusion; Liu et al.,
2022), and to sample p' itself, run Langevin steps at a small t, where its score is right (`scoresde.solvers.langevin`,
`PredictorCorrector`, `AnnealedLangevin`; Du et al., 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde.denoiser import Denoiser, Posterior
from scoresde.exact import ExactDenoiser
from scoresde.guidance.base import Scale, check_scale, known_all, scale_at, scaled
from scoresde.guidance.branches import Branch, Branching, Combined
from scoresde.tensors import Time, known_any, precise
from scoresde.views import Affine, first_where

__all__ = ["Mixture", "Product"]


class Product(Branching):
    """Conjunction and negation of models, prod_i p_i^{w_i} or p_0 prod_i (p_i / p_0)^{w_i}.

    A denoiser whose weight is 0, known on the host, is not evaluated. The models that are one network under several
    conditions, `Conditioned(denoiser, label=3)`, are evaluated in one call. See the module for what it samples.

    Args:
        denoisers: of one SDE.
        weights: w_i, each a number, one per sample (B,), or a function of t; negative to lead away from p_i. 1 each by
            default.
        base: p_0, the unconditional model of composable diffusion. Without it, and unless the weights are numbers that
            sum to one, the score has not the width of the prior at large t; the mean is undefined at alpha = 0.
        batched: False makes a call for each.

    The posterior variance is passed on where one model runs alone, else None.

    Raises:
        TypeError: if one is no denoiser.
        ValueError: if there is none, they are of different SDEs, or the weights are not one for each; by the call,
            where alpha = 0 without a base.

    >>> from scoresde import VPSDE
    >>> from scoresde.exact import Gaussian
    >>> low, high, base = (Gaussian([m], std=1.0).denoiser(VPSDE()) for m in (-1.0, 3.0, 0.0))
    >>> x, expected = torch.linspace(-2, 2, 5)[:, None], Gaussian([2.0], std=1.0).denoiser(VPSDE())
    >>> found = Product([low, high], base=base)(x, 0.3).mean  # N(0, 1) e^{-x} e^{3 x} is N(2, 1)
    >>> torch.allclose(found, expected(x, 0.3).mean, atol=1e-5)
    True
    """

    masks = True

    def __init__(
        self,
        denoisers: Sequence[Denoiser],
        weights: Sequence[Scale] | Tensor | None = None,
        base: Denoiser | None = None,
        *,
        batched: bool = True,
    ) -> None:
        weights = weights.tolist() if isinstance(weights, Tensor) and weights.ndim == 1 else weights
        self.weights: list[Scale] = [1.0] * len(denoisers) if weights is None else list(weights)
        if len(self.weights) != len(denoisers):
            raise ValueError(f"{len(self.weights)} weights for {len(denoisers)} denoisers: give one for each")
        for i, weight in enumerate(self.weights):
            check_scale(f"weights[{i}]", weight)
        numbers = [float("nan") if isinstance(w, Tensor) or callable(w) else float(w) for w in self.weights]
        self.normalised = base is not None or abs(sum(numbers) - 1) < 1e-12
        super().__init__([*([] if base is None else [base]), *denoisers], None if self.normalised else "eps", batched)
        self.factors, self.base = tuple(denoisers), base

    def affine(self, t: Time) -> Affine:
        if not self.normalised and known_any(nothing := self.sde.alpha(precise(t)) == 0):
            raise ValueError(
                f"a product without a base is undefined at t = {first_where(precise(t), nothing)} of {self.sde!r}, "
                "where alpha is zero: give base=, or weights that sum to one, or start the grid at a smaller t"
            )
        return super().affine(t)

    def branches(self, x: Tensor, t: Time, cond: Mapping[str, Any]) -> tuple[list[Branch], Combined | None]:
        weights = [scale_at(f"weights[{i}]", weight, t, len(x)) for i, weight in enumerate(self.weights)]
        counting = [(d, w) for d, w in zip(self.factors, weights, strict=True) if not known_all(w == 0)]
        branches: list[Branch] = [(denoiser, self.told(denoiser, cond)) for denoiser, _ in counting]
        w = [w for _, w in counting]
        if self.base is not None:
            branches = [(self.base, self.told(self.base, cond)), *branches]
            if not counting:
                return branches, None
        if len(counting) == 1 and known_all(w[0] == 1):
            return branches[-1:], None
        if not self.normalised:
            return branches, lambda *F: sum(
                (scaled(F_i, w_i) for F_i, w_i in zip(F, w, strict=True)), torch.zeros_like(x)
            )
        # Without a base the first's weight is what is left of one.
        return branches, lambda *F: averaged(F, w if self.base is not None else w[1:])

    def __repr__(self) -> str:
        return f"Product({list(self.factors)!r}, weights={self.weights!r}, base={self.base!r})"


class Mixture(Branching):
    """The mixture sum_i w_i p_i of models.

    Fixed factors in place of the r_i would not give a mixture: they are a `Product` whose weights sum to one.

    Args:
        denoisers: of one SDE.
        weights: w_i, positive, shape (K,); equal by default.
        log_densities: function of (x, t), x (B, ...) and t float64 () or (B,), to log p_i,t(x) up to a term that
            all share, shape (B, K), differentiable if the mixture is to be. It may be a noise-conditional classifier's
            logits, which tell the components apart (its own prior, and so w_i, then included: leave weights equal). By
            default those of exact denoisers (`scoresde.exact`); networks do not know their densities.
        batched: False makes a call for each.

    Its posterior variance is sum_i r_i (v_i + (D_i - D)^2) where all are known, else None.

    Raises:
        TypeError: if one is no denoiser.
        ValueError: if there is none, they are of different SDEs, weights are not positive, one for each, or there are
            no log_densities for denoisers that are not exact.

    >>> from scoresde import VPSDE
    >>> from scoresde.exact import Gaussian, GaussianMixture
    >>> parts = [Gaussian([m], std=0.5).denoiser(VPSDE()) for m in (-1.0, 1.0)]
    >>> expected = GaussianMixture([[-1.0], [1.0]], std=0.5).denoiser(VPSDE())
    >>> x = torch.linspace(-2, 2, 5)[:, None]
    >>> torch.allclose(Mixture(parts)(x, 0.3).mean, expected(x, 0.3).mean, atol=1e-6)
    True
    """

    def __init__(
        self,
        denoisers: Sequence[Denoiser],
        weights: Sequence[float] | Tensor | None = None,
        *,
        log_densities: Callable[[Tensor, Tensor], Tensor] | None = None,
        batched: bool = True,
    ) -> None:
        super().__init__(denoisers, batched=batched)
        w = torch.ones(len(denoisers)) if weights is None else torch.as_tensor(weights)
        if w.shape != (len(denoisers),) or not bool(((w > 0) & w.isfinite()).all()):
            raise ValueError(f"weights {w.tolist()}: expected {len(denoisers)} positive numbers")
        if log_densities is None and not all(isinstance(denoiser, ExactDenoiser) for denoiser in denoisers):
            raise ValueError(
                "a mixture weighs its models by their densities at x_t, which networks do not know: give "
                "log_densities=, a classifier of noisy data that tells them apart say. Fixed weights are no mixture "
                "but a Product(denoisers, weights) whose weights sum to one"
            )
        self.log_weights = (w.double() / w.double().sum()).log().cpu()
        self.log_densities = log_densities

    def responsibilities(self, x: Tensor, t: Time) -> Tensor:
        """r_i, the posterior probability of each model at x_t, shape (B, K), float64."""
        K = len(self.denoisers)
        if self.log_densities is None:
            exact = [d for d in self.denoisers if isinstance(d, ExactDenoiser)]
            logits = torch.stack([d.target.log_prob(x.double(), sde=self.sde, t=t) for d in exact], dim=1)
        else:
            logits = self.log_densities(x, precise(t))
            if not isinstance(logits, Tensor) or logits.shape != (len(x), K):
                found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"log_densities returned {found}: expected ({len(x)}, {K})")
        logits = precise(logits)
        return (logits + self.log_weights.to(logits)).softmax(1)

    def branches(self, x: Tensor, t: Time, cond: Mapping[str, Any]) -> tuple[list[Branch], Combined | None]:
        branches: list[Branch] = [(denoiser, self.told(denoiser, cond)) for denoiser in self.denoisers]

        def combined(*F: Tensor) -> Tensor:
            # log_densities may call a network of these, which may reuse the memory of its output.
            held = F if self.log_densities is None else [F_i.clone() for F_i in F]
            return averaged(held, self.responsibilities(x, t).T[1:])

        return branches, combined

    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        r, parts = self.responsibilities(x, t).T, [d.posterior(x, t, **self.told(d, cond)) for d in self.denoisers]
        D = sum((scaled(part.mean, r_i) for part, r_i in zip(parts, r, strict=True)), torch.zeros_like(x))
        var: Tensor | None = torch.zeros_like(x)
        for part, r_i in zip(parts, r, strict=True):
            var = None if var is None or part.var is None else var + scaled(part.var + (part.mean - D) ** 2, r_i)
        return Posterior(D, var)

    def __repr__(self) -> str:
        return f"Mixture({list(self.denoisers)!r}, weights={self.log_weights.exp().tolist()})"


def averaged(F: Sequence[Tensor], weights: Sequence[Tensor] | Tensor) -> Tensor:
    """F_0 + sum_i w_i (F_i - F_0), i >= 1: an average, in which F_0 has what is left of one."""
    return F[0] + sum(scaled(F_i - F[0], w) for F_i, w in zip(F[1:], weights, strict=True))
