"""Data distributions whose denoiser is known in closed form: the ground truth that solvers are tested against.

With data x_0 ~ sum_k w_k N(m_k, C_k), the marginal at t is sum_k w_k N(alpha m_k, alpha^2 C_k + sigma^2 I), and with
r_k(x) the posterior probability of component k given x_t = x,

    E[x_0 | x]   = sum_k r_k mu_k,                             mu_k = m_k + alpha C_k S_k^-1 (x - alpha m_k)
    Var[x_0 | x] = sum_k r_k (v_k + mu_k^2) - E[x_0 | x]^2,    v_k = diag(sigma^2 C_k S_k^-1)
    S_k          = alpha^2 C_k + sigma^2 I

A Gaussian is one component, an empirical distribution has a component of zero width at each data point. Everything is
computed in float64, in each component's eigenbasis, with logsumexp, and returned in the dtype of x: a component of
std 0.01 at t = 1e-5 is no special case.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from scoresde.denoiser import Denoiser, Posterior
from scoresde.sde import SDE
from scoresde.tensors import Time, as_time, drawn_from
from scoresde.views import check_time

__all__ = ["Empirical", "ExactDenoiser", "Gaussian", "GaussianMixture"]

Numbers = Tensor | Sequence[Any] | float


class GaussianMixture:
    """Mixture of Gaussians, of any event shape.

    Args:
        means: m_k, shape (K, *event).
        weights: w_k, shape (K,), positive; normalised. Equal by default.
        std: standard deviations, of shape (), (K,), (*event) or (K, *event). Where (K,) and (*event) have the same
            shape, one number per component is meant.
        cov: instead of std, covariances of the flattened event, shape (D, D) or (K, D, D).

    Raises:
        ValueError: on shapes that do not fit, negative weights or widths, a cov that is not symmetric positive
            semi-definite, or unless exactly one of std and cov is given.

    >>> target = GaussianMixture(means=[[-1.0], [1.0]], std=0.1)
    >>> target.log_prob(torch.tensor([[0.0]])).item() < target.log_prob(torch.tensor([[1.0]])).item()
    True
    """

    def __init__(
        self, means: Numbers, weights: Numbers | None = None, *, std: Numbers | None = None, cov: Numbers | None = None
    ) -> None:
        self._means = _float64(means, "means")
        if self._means.ndim == 0:
            raise ValueError("means is one number: expected the shape (K, *event)")
        if self._means.numel() == 0:
            raise ValueError(f"means has shape {tuple(self._means.shape)}: it is empty")
        K = len(self._means)
        self.event_shape = tuple(self._means.shape[1:])
        self._means = self._means.reshape(K, -1)
        D, device = self._means.shape[1], self._means.device
        w = torch.ones(K, device=device).double() if weights is None else _float64(weights, "weights").to(device)
        if w.shape != (K,) or not bool((w > 0).all()):
            raise ValueError(f"weights {w.tolist()}: expected {K} positive numbers")
        self._log_weights = (w / w.sum()).log()
        self._basis: Tensor | None = None  # (K, D, D), eigenvectors in columns; None where the axes are the basis
        if (std is None) == (cov is None):
            raise ValueError("give exactly one of std= and cov=")
        if cov is not None:
            C = _float64(cov, "cov").to(device)
            if C.shape not in ((D, D), (K, D, D)):
                raise ValueError(f"cov has shape {tuple(C.shape)}: expected {(D, D)} or {(K, D, D)}")
            if not torch.allclose(C, C.mT, rtol=1e-6, atol=1e-12):
                raise ValueError("cov is not symmetric")
            eigenvalues, basis = torch.linalg.eigh(C)
            if bool((eigenvalues < -1e-9 * eigenvalues.abs().amax(-1, keepdim=True)).any()):
                raise ValueError(
                    f"cov is not positive semi-definite: its smallest eigenvalue is {eigenvalues.min():.3g}"
                )
            # Rounding can leave a zero eigenvalue at -1e-17.
            self._variances = eigenvalues.clamp(min=0).expand(K, D)
            self._basis = basis.expand(K, D, D)
        else:
            assert std is not None
            s = _float64(std, "std").to(device)
            if bool((s < 0).any()):
                raise ValueError(f"std has a negative entry: {s.min():.3g}")
            if s.shape in ((), (K,)):
                s = s.expand(K).reshape(K, 1)  # isotropic: one number per component
            elif s.shape in (self.event_shape, (K, *self.event_shape)):
                s = s.expand(K, *self.event_shape).reshape(K, D)
            else:
                raise ValueError(
                    f"std has shape {tuple(s.shape)}: expected (), {(K,)}, {self.event_shape} or "
                    f"{(K, *self.event_shape)}"
                )
            self._variances = s**2  # (K, 1) or (K, D)

    def to(self, device: torch.device | str) -> Self:
        """The same distribution on another device; a denoiser's x must be on its target's."""
        moved = copy.copy(self)
        for name in ("_means", "_log_weights", "_variances", "_basis"):
            value = getattr(self, name)
            setattr(moved, name, None if value is None else value.to(device))
        return moved

    def denoiser(self, sde: SDE) -> ExactDenoiser:
        """The exact denoiser, E[x_0 | x_t] and elementwise Var[x_0 | x_t], on that SDE."""
        return ExactDenoiser(self, sde)

    def sample(self, n: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """n draws, shape (n, *event). Without a generator a freshly seeded one is used."""
        device = self._means.device
        generator = drawn_from(generator, device)
        k = torch.multinomial(self._log_weights.exp(), n, replacement=True, generator=generator)
        z = torch.randn(n, self._means.shape[1], generator=generator, dtype=torch.float64, device=device)
        z = z * self._variances[k].sqrt()
        if self._basis is not None:
            z = torch.einsum("nde,ne->nd", self._basis[k], z)
        return (self._means[k] + z).reshape(n, *self.event_shape).to(dtype)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of the flattened event, float64."""
        w = self._log_weights.exp()
        mean = w @ self._means
        spread = self._means - mean
        variances = self._variances.expand(self._means.shape)
        if self._basis is None:
            within = torch.diag(w @ variances)
        else:
            within = torch.einsum("k,kij,kj,klj->il", w, self._basis, variances, self._basis)
        return mean, within + torch.einsum("k,ki,kj->ij", w, spread, spread)

    def log_prob(self, x: Tensor, sde: SDE | None = None, t: Time | None = None) -> Tensor:
        """log density in nats, shape (B,), of the data, or with sde and t of the marginal p_t.

        Raises:
            ValueError: if only one of sde and t is given, x does not fit, or the distribution has no density there
                (zero width at sigma = 0).
        """
        if (sde is None) != (t is None):
            raise ValueError(
                "log_prob(x) is the density of the data, log_prob(x, sde=, t=) that at t: give both or none"
            )
        flat = self._flat(x)
        one = torch.ones(1, dtype=torch.float64, device=x.device)
        alpha, sigma = (one, 0 * one) if sde is None else self._scales(sde, t, len(x))  # type: ignore[arg-type]
        if bool((sigma == 0).any()) and bool((self._variances == 0).any()):
            raise ValueError("this distribution has components of zero width, so no density at sigma = 0: give t > 0")
        return torch.logsumexp(self._log_joint(flat, alpha, sigma), dim=1).to(x.dtype)

    def measured(self, operator: Callable[[Tensor], Tensor], noise_std: float) -> GaussianMixture:
        """The law of y = A x_0 + noise_std eta, eta ~ N(0, I): sum_k w_k N(A m_k, A C_k A^T + noise_std^2 I).

        Args:
            operator: A, linear: (B, *event) to (B, *measurement).
            noise_std: >= 0.

        >>> law = Gaussian(mean=[1.0, 5.0], std=1.0).measured(lambda x: 2 * x[:, :1], noise_std=1.0)
        >>> [moment.tolist() for moment in law.moments()]
        [[2.0], [[5.0]]]
        """
        A, event = self._matrix(operator)
        S = A @ self._covariances() @ A.T + noise_std**2 * torch.eye(len(A), dtype=A.dtype, device=A.device)
        means = (self._means @ A.T).reshape(-1, *event)
        return GaussianMixture(means, self._log_weights.exp(), cov=(S + S.mT) / 2)

    def given(self, operator: Callable[[Tensor], Tensor], y: Numbers, noise_std: float) -> GaussianMixture:
        """The law of x_0 given y = A x_0 + noise_std eta, eta ~ N(0, I). With S_k = A C_k A^T + noise_std^2 I and the
        gain G_k = C_k A^T S_k^-1 it is the mixture of

            N(m_k + G_k (y - A m_k), (I - G_k A) C_k),    weights in proportion to w_k N(y; A m_k, S_k)

        Components whose weight is zero in float64 are left out.

        Args:
            operator: A, linear: (B, *event) to (B, *measurement).
            y: one measurement, shape (*measurement).
            noise_std: >= 0.

        Raises:
            ValueError: if y is not of the measurement's shape, or some S_k is singular: noise_std = 0 and a measurement
                that says the same twice, or of what has no spread.

        >>> posterior = Gaussian(mean=[0.0, 0.0], std=1.0).given(lambda x: x[:, :1], [1.0], noise_std=1.0)
        >>> posterior.moments()[0], posterior.moments()[1].diagonal()
        (tensor([0.5000, 0.0000], dtype=torch.float64), tensor([0.5000, 1.0000], dtype=torch.float64))
        """
        A, event = self._matrix(operator)
        y = _float64(y, "y").to(A.device)
        if tuple(y.shape) != event:
            raise ValueError(f"y has shape {tuple(y.shape)}: expected one measurement, {event}")
        C, noise = self._covariances(), noise_std**2
        L, failed = torch.linalg.cholesky_ex(A @ C @ A.T + noise * torch.eye(len(A), dtype=A.dtype, device=A.device))
        if bool(failed.any()):
            raise ValueError(f"A C A^T + noise_std^2 I is singular at noise_std={noise_std}: give noise_std > 0")
        G = torch.cholesky_solve(A @ C, L).mT  # (K, D, M)
        e = y.reshape(-1) - self._means @ A.T
        z = torch.linalg.solve_triangular(L, e[..., None], upper=False)[..., 0]
        log_weights = self._log_weights - (z**2).sum(-1) / 2 - L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        weights = (log_weights - log_weights.max()).exp()
        rest = torch.eye(A.shape[1], dtype=A.dtype, device=A.device) - G @ A
        cov = rest @ C @ rest.mT + noise * G @ G.mT  # (I - G A) C, positive whatever the rounding
        means, kept = self._means + torch.einsum("kdm,km->kd", G, e), weights > 0
        return GaussianMixture(means[kept].reshape(-1, *self.event_shape), weights[kept], cov=(cov + cov.mT)[kept] / 2)

    def _matrix(self, operator: Callable[[Tensor], Tensor]) -> tuple[Tensor, tuple[int, ...]]:
        """A as a matrix (M, D), float64, and the shape of a measurement."""
        D = self._means.shape[1]
        basis = torch.eye(D, dtype=torch.float64, device=self._means.device)
        columns = operator(basis.reshape(D, *self.event_shape))
        return columns.reshape(D, -1).T, tuple(columns.shape[1:])

    def _covariances(self) -> Tensor:
        """C_k, shape (K, D, D)."""
        variances = self._variances.expand(self._means.shape)
        if self._basis is None:
            return torch.diag_embed(variances)
        return self._basis * variances[:, None] @ self._basis.mT

    # Below, x is (B, D), alpha and sigma are (B,) or (1,), all float64; K components.

    def _flat(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.event_shape or x.ndim == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected (B, {', '.join(map(str, self.event_shape))})")
        return x.reshape(len(x), -1).double()

    def _scales(self, sde: SDE, t: Time, batch: int) -> tuple[Tensor, Tensor]:
        check_time(t, batch, sde)
        t = as_time(t).to(self._means.device, torch.float64).reshape(-1)
        return sde.alpha(t), sde.sigma(t)

    def _residual(self, x: Tensor, alpha: Tensor) -> Tensor:
        """x - alpha m_k in each component's eigenbasis, (B, K, D)."""
        y = x[:, None] - alpha[:, None, None] * self._means
        return y if self._basis is None else torch.einsum("bkd,kde->bke", y, self._basis)

    def _marginal_variances(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """alpha^2 C_k + sigma^2, (B, K, D), or (B, K, 1) if isotropic."""
        return (alpha**2)[:, None, None] * self._variances + (sigma**2)[:, None, None]

    @property
    def _isotropic(self) -> bool:
        return self._basis is None and self._variances.shape[1] == 1

    def _log_joint(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log (w_k N(x; alpha m_k, S_k)), (B, K)."""
        S = self._marginal_variances(alpha, sigma)
        if self._isotropic:
            # By parts: an empirical distribution has no room for (B, K, D), and |x|^2 - 2 x m + |m|^2 no digits.
            part = max(1, 2**24 // max(1, x.numel()))
            offsets = (x[:, None] - alpha[:, None, None] * means for means in self._means.split(part))
            quadratic = torch.cat([(y**2).sum(-1) for y in offsets], dim=1) / S[..., 0]
        else:
            quadratic = (self._residual(x, alpha) ** 2 / S).sum(-1)
        log_det = S.log().sum(-1) * (x.shape[1] // S.shape[-1])
        return self._log_weights - (quadratic + log_det + x.shape[1] * math.log(2 * math.pi)) / 2

    def _posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and elementwise variance of x_0 given x, each (B, D)."""
        if len(self._means) == 1:
            r = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
        else:
            r = torch.softmax(self._log_joint(x, alpha, sigma), dim=1)
        S = self._marginal_variances(alpha, sigma)
        gain = alpha[:, None, None] * self._variances / S
        var = (sigma**2)[:, None, None] * self._variances / S
        # Seen from the components' centre: their spread must be no small difference of large squares.
        centre = self._log_weights.exp() @ self._means
        means, offset = self._means - centre, x - alpha[:, None] * centre
        if self._isotropic:
            gain, var = gain[..., 0], (r * var[..., 0]).sum(1, keepdim=True)  # (B, K), (B, 1)
            keep = 1 - alpha[:, None] * gain  # mu_k = keep m_k + gain x
            mean = (r * keep) @ means + (r * gain).sum(1, keepdim=True) * offset
            second = (
                (r * keep**2) @ means**2
                + 2 * (r * keep * gain) @ means * offset
                + (r * gain**2).sum(1, keepdim=True) * offset**2
            )
        else:
            step = gain * self._residual(x, alpha)
            if self._basis is not None:
                step = torch.einsum("bke,kde->bkd", step, self._basis)
                var = torch.einsum("bke,kde->bkd", var, self._basis**2)
            mu = means + step
            mean, second = torch.einsum("bk,bkd->bd", r, mu), torch.einsum("bk,bkd->bd", r, mu**2)
            var = (r[..., None] * var).sum(1)
        # The spread is >= 0; its rounding error need not be.
        var = var + (second - mean**2).clamp(min=0)
        known = (sigma == 0)[:, None]  # x is x_0 itself there, and S may be zero
        return torch.where(known, x, mean + centre), torch.where(known, 0.0, var)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(components={len(self._means)}, event_shape={self.event_shape})"


class Gaussian(GaussianMixture):
    """N(mean, C), of any event shape.

    Args:
        mean: shape (*event).
        std: standard deviation, a number or shape (*event).
        cov: instead of std, the covariance of the flattened event, shape (D, D).

    Raises:
        ValueError: as for `GaussianMixture`.
    """

    def __init__(self, mean: Numbers, *, std: Numbers | None = None, cov: Numbers | None = None) -> None:
        m = _float64(mean, "mean")
        if std is not None and (s := _float64(std, "std")).ndim:
            std = s.reshape(1, *s.shape)
        super().__init__(m[None], std=std, cov=cov)

    def flow(self, x: Tensor, sde: SDE, t: Time, s: Time) -> Tensor:
        """Where the probability-flow ODE takes x from time t to time s (either direction), shape (B, *event).

        In the eigenbasis, (x_s - alpha_s m) / sqrt(alpha_s^2 c + sigma_s^2) is constant.
        """
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self._scales(sde, t, len(x)), self._scales(sde, s, len(x))
        ratio = (self._marginal_variances(alpha_s, sigma_s) / self._marginal_variances(alpha_t, sigma_t)).sqrt()
        y = ratio * self._residual(self._flat(x), alpha_t)
        if self._basis is not None:
            y = torch.einsum("bke,kde->bkd", y, self._basis)
        return (alpha_s[:, None] * self._means + y[:, 0]).reshape(x.shape).to(x.dtype)


class Empirical(GaussianMixture):
    """The uniform distribution on the points of a data set: the model that memorises it.

    Args:
        data: shape (N, *event).
    """

    def __init__(self, data: Numbers) -> None:
        super().__init__(data, std=0.0)


class ExactDenoiser(Denoiser):
    """The closed-form denoiser of a `GaussianMixture`, with its posterior variance. Made by `target.denoiser(sde)`.

    Raises:
        ValueError: if x has not the target's event shape.
    """

    def __init__(self, target: GaussianMixture, sde: SDE) -> None:
        self.target, self.sde = target, sde

    @property
    def device(self) -> torch.device:
        return self.target._means.device

    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        if cond:
            raise ValueError(f"an exact denoiser takes no condition, got {', '.join(cond)}")
        alpha, sigma = self.target._scales(self.sde, t, len(x))
        mean, var = self.target._posterior(self.target._flat(x), alpha, sigma)
        return Posterior(mean.reshape(x.shape).to(x.dtype), var.expand(mean.shape).reshape(x.shape).to(x.dtype))

    def view(self, name: str, x: Tensor, t: Time, /, **cond: Any) -> Tensor:
        self._check(x, t)
        return super().view(name, x.double(), t, **cond).to(x.dtype)  # eps = (x - alpha D) / sigma before rounding D

    def __repr__(self) -> str:
        return f"ExactDenoiser({self.target!r}, {self.sde!r})"


def _float64(value: Numbers, name: str) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float64).detach()
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} is not finite")
    return tensor
