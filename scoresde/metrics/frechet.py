"""The Frechet distance between Gaussians fitted to two sets of features (Heusel et al., 2017, eq. 6):

    |mu_x - mu_y|^2 + tr C_x + tr C_y - 2 tr (C_x^{1/2} C_y C_x^{1/2})^{1/2}

With C = R^T R the root's trace is the sum of the singular values of R_x R_y^T: no eigenvalue is rooted that is zero but
for rounding, so it holds for fewer samples than features, too. R is the triangle of a QR decomposition of the centred
features, over sqrt(n - 1). Two sets are merged without a look at their samples (Chan, Golub and LeVeque, 1983):

    R^T R (n - 1) = sum (x - mu)(x - mu)^T = S,    S_ab = S_a + S_b + (n_a n_b / (n_a + n_b)) delta delta^T

delta = mu_b - mu_a; in terms of roots, the rows of both and one more, sqrt(n_a n_b / (n_a + n_b)) delta.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.files import write_whole
from scoresde.metrics.checks import as_features

__all__ = ["Statistics", "frechet_distance"]

FORMAT = "scoresde-statistics-1"


class Statistics:
    """Mean and covariance of features, in float64 on the CPU, from as many batches as there are.

    What is kept is a root of the covariance, never its square: `frechet_distance` of two `Statistics` is that of the
    features themselves, to rounding. Several processes each make theirs and `merge` them (they can be pickled, so that
    torch.distributed.all_gather_object carries them).

    Args:
        features: name of the feature space, kept in the file: statistics of spaces of different names are not compared.

    Attributes:
        n: how many samples there were; None where a file of another program does not say.
        mean: float64, shape (d,).
        features: the argument.

    >>> statistics = Statistics()
    >>> for batch in torch.arange(12.0).reshape(6, 2).split(4):
    ...     statistics.update(batch)
    >>> statistics.n, statistics.mean.tolist(), statistics.cov.round(decimals=6).tolist()
    (6, [5.0, 6.0], [[14.0, 14.0], [14.0, 14.0]])
    """

    def __init__(self, features: str = "") -> None:
        self.features = features
        self.n: int | None = 0
        self._mean: Tensor | None = None
        self._rows: list[Tensor] = []  # of them S = sum of the squares of their rows; gathered until a QR is due

    @classmethod
    def of(cls, x: Tensor, features: str = "") -> Statistics:
        """Of all the features x at once, shape (n, d)."""
        statistics = cls(features)
        statistics.update(x)
        return statistics

    def update(self, x: Tensor) -> None:
        """Add features, shape (B, d), B >= 1.

        Raises:
            ValueError: if they have another d than those before, are not finite, or the statistics are from a file
                that does not say of how many samples.
        """
        x = as_features(x, "features", device=torch.device("cpu"))
        mean = x.mean(0)
        self._add(len(x), mean, [x - mean])

    @classmethod
    def merge(cls, parts: Iterable[Statistics]) -> Statistics:
        """Of all the samples of several.

        Raises:
            ValueError: if there is none, or they differ in d or in the name of the features, or one is from a file that
                does not say of how many samples.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("merge got no statistics")
        total = cls(parts[0].features)
        for part in parts:
            _check_names(total, part)
            total.features = total.features or part.features
            if part.n is None:
                raise ValueError(f"{part!r} cannot be merged: its file does not say of how many samples it is")
            if part._mean is not None:
                total._add(part.n, part._mean, part._rows)
        return total

    def _add(self, n: int, mean: Tensor, rows: list[Tensor]) -> None:
        if self.n is None:
            raise ValueError(f"{self!r} cannot be added to: its file does not say of how many samples it is")
        if self._mean is None:
            self.n, self._mean, self._rows = n, mean, list(rows)
        else:
            if mean.shape != self._mean.shape:
                raise ValueError(f"features of d = {len(mean)}, but those before have d = {len(self._mean)}")
            delta, total = mean - self._mean, self.n + n
            self._rows = [*self._rows, *rows, delta[None] * math.sqrt(self.n * n / total)]
            self._mean = self._mean + delta * (n / total)
            self.n = total
        if sum(map(len, self._rows)) > max(3 * len(mean), 1024):
            self._compress()

    def _compress(self) -> None:
        rows = torch.cat(self._rows)
        self._rows = [torch.linalg.qr(rows, mode="r").R if len(rows) > 1 else rows]

    @property
    def mean(self) -> Tensor:
        if self._mean is None:
            raise ValueError("statistics of no samples: call update(features) first")
        return self._mean

    @property
    def root(self) -> Tensor:
        """R, R^T R being the sum of the squared deviations; the covariance itself where n is unknown. Shape (., d)."""
        self.mean  # noqa: B018  # refuses where there is none
        if len(self._rows) > 1 or len(self._rows[0]) > self._rows[0].shape[1]:
            self._compress()
        return self._rows[0]

    @property
    def scaled_root(self) -> Tensor:
        """R, R^T R being the covariance. Shape (., d), of at most d rows.

        Raises:
            ValueError: of fewer than two samples.
        """
        if self.n is None:
            return self.root
        if self.n < 2:
            raise ValueError(f"{self!r}: a covariance needs two samples at least")
        return self.root / (self.n - 1) ** 0.5

    @property
    def cov(self) -> Tensor:
        """The covariance, over n - 1, shape (d, d).

        Raises:
            ValueError: of fewer than two samples.
        """
        R = self.scaled_root
        return R.mT @ R

    def save(self, path: str | Path) -> None:
        """Write them to a .npz file, whole or not at all. Programs that read the usual statistics of FIDs read it, too:
        it has their mu and sigma.

        Raises:
            ValueError: of fewer than two samples.
        """
        arrays: dict[str, Any] = {"mu": self.mean.numpy(), "sigma": self.cov.numpy()}
        if self.n is not None:
            arrays |= {"root": self.root.numpy(), "n": np.int64(self.n)}
            arrays |= {"format": np.array(FORMAT), "features": np.array(self.features)}
        file = io.BytesIO()
        np.savez(file, **arrays)
        write_whole(Path(path), lambda out: out.write(file.getvalue()))

    @classmethod
    def load(cls, path: str | Path, features: str = "") -> Statistics:
        """Read a file that `save` wrote, or the usual one of FIDs, which has the keys mu and sigma. Nothing in it is
        executed.

        Args:
            path: the file.
            features: name of the feature space, where the file does not say it.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged, or something else, or sigma is no covariance; the message names the file.
        """
        path = Path(path)
        content = path.read_bytes()
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
            return cls._from(found, features)
        except Exception as error:  # zip, zlib, header and pickle errors, missing keys, and what _from refuses
            raise ValueError(f"{path} cannot be read as statistics of features: {error}") from error

    @classmethod
    def _from(cls, found: dict[str, np.ndarray], features: str) -> Statistics:
        if not {"mu", "sigma"} <= set(found):
            raise ValueError(f"it holds the arrays {sorted(found)}: expected mu and sigma")
        made = cls(features)
        mu, sigma = (torch.from_numpy(np.asarray(found[name], dtype=np.float64)) for name in ("mu", "sigma"))
        d = mu.numel()
        if mu.shape != (d,) or d == 0 or sigma.shape != (d, d):
            raise ValueError(
                f"mu and sigma have the shapes {tuple(mu.shape)} and {tuple(sigma.shape)}: not (d,), (d, d)"
            )
        if not bool(mu.isfinite().all() & sigma.isfinite().all()):
            raise ValueError("mu or sigma is not finite")
        made._mean = mu
        if "format" not in found:
            made.n, made._rows = None, [_root(sigma)]
            return made
        if str(found["format"]) != FORMAT:
            raise ValueError(f"its format is {str(found['format'])!r}: expected {FORMAT}")
        root, made.n = torch.from_numpy(found["root"].astype(np.float64)), int(found["n"])
        if (
            made.n < 2
            or root.ndim != 2
            or root.shape[1] != d
            or len(root) > max(d, 1)
            or not bool(root.isfinite().all())
        ):
            raise ValueError(f"n is {made.n} and root has the shape {tuple(root.shape)}: it is altered")
        made._rows, made.features = [root], str(found["features"]) or features
        scale = float(sigma.diagonal().max().clamp(min=1e-300))
        if not torch.allclose(made.cov, sigma, rtol=1e-8, atol=1e-8 * scale):
            raise ValueError("sigma is not the covariance that root says: it is altered")
        return made

    def __repr__(self) -> str:
        d = "" if self._mean is None else f", d={len(self._mean)}"
        return f"Statistics(n={self.n}{d}{f', features={self.features!r}' if self.features else ''})"


def frechet_distance(x: Tensor | Statistics, y: Tensor | Statistics) -> float:
    """Frechet distance between Gaussians fitted to two sets of features (Heusel et al., 2017, eq. 6), in float64:

        |mu_x - mu_y|^2 + tr C_x + tr C_y - 2 tr (C_x^{1/2} C_y C_x^{1/2})^{1/2}

    (the squared 2-Wasserstein distance of the Gaussians). For finite samples of the same law it is above zero, by about
    d / n: quote it with the floor that real data gives against real data of the same sizes.

    Args:
        x, y: features, shapes (n, d) and (m, d), n, m >= 2; or their `Statistics`.

    Raises:
        ValueError: if the shapes do not fit or a feature is not finite, or the statistics are of different features.

    >>> x = torch.tensor([[0.0], [2.0]])
    >>> frechet_distance(x, x + 3), frechet_distance(Statistics.of(x), x + 3)
    (9.0, 9.0)
    """
    a, b = (z if isinstance(z, Statistics) else Statistics.of(as_features(z, s, 2)) for z, s in ((x, "x"), (y, "y")))
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of d = {len(a.mean)} and of d = {len(b.mean)}: expected (n, d) and (m, d)")
    _check_names(a, b)
    R_x, R_y = a.scaled_root, b.scaled_root
    cross = torch.linalg.svdvals(R_x @ R_y.mT).sum()
    return float((a.mean - b.mean).square().sum() + R_x.square().sum() + R_y.square().sum() - 2 * cross)


def _check_names(a: Statistics, b: Statistics) -> None:
    if a.features and b.features and a.features != b.features:
        raise ValueError(f"statistics of the features {a.features!r} and of {b.features!r} do not compare")


def _root(sigma: Tensor) -> Tensor:
    """R with R^T R = sigma, which may be singular.

    Raises:
        ValueError: if sigma is no covariance, but for rounding (in float32, as some files are).
    """
    scale = float(sigma.abs().max())
    if not torch.allclose(sigma, sigma.mT, rtol=0, atol=1e-5 * scale):
        raise ValueError("sigma is not symmetric")
    w, V = torch.linalg.eigh((sigma + sigma.mT) / 2)
    if float(w[0]) < -1e-5 * float(w[-1].abs()) or float(w[-1]) < 0:
        raise ValueError(f"sigma has the eigenvalue {float(w[0]):.3g} beside {float(w[-1]):.3g}: it is no covariance")
    # What is zero but for rounding stays zero: its root would be 1e-8, and there may be many.
    kept = w > len(w) * torch.finfo(torch.float64).eps * w[-1]
    return (V[:, kept] * w[kept].sqrt()).mT if bool(kept.any()) else sigma[:1] * 0
