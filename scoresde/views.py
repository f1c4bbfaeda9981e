"""Views: what a network can predict, and a solver step in, as affine functions of the posterior mean D = E[x_0 | x_t].

Each is written once, as the identity m F = k x + l D:

    x0        F = D
    eps       sigma   F = x - alpha D
    score     sigma^2 F = -x + alpha D                                  (Tweedie: score = grad log p_t)
    v         sigma   F = alpha x - (alpha^2 + sigma^2) D               (alpha eps - sigma x0; Salimans and Ho, 2022)
    velocity  sigma   F = sigma' x + (alpha' sigma - alpha sigma') D    (dx/dt of the probability flow)

Read for D it adapts a network, read for F it is a view. At sigma = 0 (m = 0) D tells nothing of eps, score, v and
velocity; at alpha = 0 (l = 0) an eps or score network tells nothing of D. Both raise, where t is known on the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scoresde.checks import check_option
from scoresde.sde import SDE, Forward
from scoresde.tensors import Time, as_time, expand_like, known_any, widen

__all__ = ["VIEWS", "Affine", "check_time", "combine", "first_where", "mean_of_view", "tells_nothing", "view_of_mean"]

Affine = tuple[Tensor, Tensor]
"""(p, q): the map p x + q D of the state and the mean."""
View = Callable[[SDE, Tensor], tuple[Tensor, Tensor, Tensor]]


def _x0(sde: SDE, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    one = torch.ones_like(t)
    return one, torch.zeros_like(t), one


def _eps(sde: SDE, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return sde.sigma(t), torch.ones_like(t), -sde.alpha(t)


def _score(sde: SDE, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return sde.sigma(t) ** 2, -torch.ones_like(t), sde.alpha(t)


def _v(sde: SDE, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    return sigma, alpha, -(alpha**2 + sigma**2)


def _velocity(sde: SDE, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    alpha_dot, sigma_dot = sde.rates(t)
    return sigma, sigma_dot, alpha_dot * sigma - alpha * sigma_dot


VIEWS: dict[str, View] = {"x0": _x0, "eps": _eps, "score": _score, "v": _v, "velocity": _velocity}
"""View name -> function (sde, t) -> (m, k, l) with m F = k x + l D."""


def view_of_mean(view: str, sde: SDE, t: Tensor) -> Affine:
    """(p, q) of F = p x + q D.

    Raises:
        ValueError: if the view is unknown, or if sigma = 0 at a t on the host, where only x0 is defined.
    """
    check_option(VIEWS, view=view)
    m, k, l = VIEWS[view](sde, t)  # noqa: E741
    if known_any(m == 0):
        raise ValueError(f"{view} at t = {first_where(t, m == 0)} of {sde!r}: sigma is zero there and {view} undefined")
    return k / m, l / m


def mean_of_view(view: str, sde: SDE, t: Tensor) -> Affine:
    """(r, s) of D = r x + s F: the same identity, read for D.

    Raises:
        ValueError: if alpha = 0 at a t on the host and the view is eps or score.
    """
    m, k, l = VIEWS[view](sde, t)  # noqa: E741
    if known_any(l == 0):
        raise tells_nothing(view, sde, first_where(t, l == 0), "zero")
    return -k / l, m / l


def tells_nothing(view: str, sde: SDE, t: float, alpha: str) -> ValueError:
    """The error of a view from which D cannot be read at t, alpha being what it says there."""
    return ValueError(
        f"a network that predicts {view} says nothing of x0 at t = {t} of {sde!r}: alpha is {alpha} there; stay below "
        "that time (start= of a grid, t_max= of the SDE), or use an x0, v or velocity network"
    )


def first_where(t: Tensor, bad: Tensor) -> float:
    """The first t for which bad holds."""
    return float(t.expand(bad.shape)[bad].flatten()[0])


def check_time(t: Time, batch: int, sde: Forward, limit: float | None = None) -> None:
    """Raises ValueError unless t has shape () or (B,) and, on the host, lies in [0, limit]; sde.t_limit by default."""
    t, limit = as_time(t), sde.t_limit if limit is None else limit
    if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, batch)):
        raise ValueError(f"t has shape {tuple(t.shape)} for a batch of {batch}: give one time, or one per sample")
    if known_any(~((t >= 0) & (t <= limit * (1 + 1e-6)))):
        raise ValueError(f"t = {t.tolist()} leaves [0, {limit}] of {sde!r}")


def combine(u: Tensor, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """u x + w y, in at least float32."""
    x, y = widen(x), widen(y)
    return expand_like(u, x) * x + expand_like(w, x) * y
