"""A denoiser that knows its posterior variance from a table (Analytic-DPM; Bao et al., 2022)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from scoresde.checks import check_range
from scoresde.denoiser import Denoiser, Posterior
from scoresde.tensors import Time, expand_like
from scoresde.variance.table import VarianceTable, fingerprint
from scoresde.wrappers import SameMean

__all__ = ["AnalyticDenoiser"]


class AnalyticDenoiser(SameMean):
    """A denoiser with Var[x_0 | x_t] = C_t, one number a time, from its table. The mean is untouched.

    `OptimalVariance` samples with it, and `elbo(..., variance="posterior")` bounds the likelihood.

    Args:
        denoiser: the model that the table was estimated for.
        table: what `estimate` returned, or `VarianceTable.load`.
        data_range: (lo, hi) of the data, if they are bounded: C_t then is at most ((hi - lo) / 2)^2. Not assumed.
        any_model: take the table though it was made for another model, an earlier checkpoint say.

    Raises:
        TypeError: if denoiser or table is none.
        ValueError: if the table is of another SDE, or of another model by its `fingerprint` and not any_model, or
            data_range is no interval.

    >>> import torch
    >>> from scoresde import VPSDE
    >>> from scoresde.exact import Gaussian
    >>> from scoresde.variance.estimate import estimate
    >>> target = Gaussian(mean=[3.0, -1.0], std=0.5)
    >>> model, data = target.denoiser(VPSDE()), target.sample(1000, torch.Generator().manual_seed(0))
    >>> analytic = AnalyticDenoiser(model, estimate(model, data, [0.1, 0.5, 1.0]))
    >>> analytic(torch.zeros(4, 2), 0.5).var.shape
    torch.Size([1, 1])
    """

    masks = True

    def __init__(
        self,
        denoiser: Denoiser,
        table: VarianceTable,
        data_range: tuple[float, float] | None = None,
        *,
        any_model: bool = False,
    ) -> None:
        super().__init__(denoiser)
        if not isinstance(table, VarianceTable):
            raise TypeError(f"table is {type(table).__name__}: expected a VarianceTable, estimate(denoiser, data) say")
        if table.sde != denoiser.sde:
            raise ValueError(f"the table was made for {table.sde!r}, the denoiser for {denoiser.sde!r}: estimate one")
        if data_range is not None:
            check_range(data_range)
        if table.model and not any_model and (ours := fingerprint(denoiser)) != table.model:
            raise ValueError(
                f"the table was made for another model ({table.model}) than {denoiser!r} ({ours}): estimate one for "
                "this model, or say any_model=True to take it as it is"
            )
        self.table, self.data_range = table, data_range

    @property
    def borrowed(self) -> bool:
        return False

    def covariance(self, t: Time) -> Tensor:
        return self.table.covariance(t, self.data_range)

    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        mean, C = self.denoiser.posterior(x, t, **cond).mean, self.covariance(t)
        return Posterior(mean, expand_like(C.reshape(-1), x))

    def __repr__(self) -> str:
        bounded = "" if self.data_range is None else f", data_range={self.data_range!r}"
        return f"AnalyticDenoiser({self.denoiser!r}, {self.table!r}{bounded})"
