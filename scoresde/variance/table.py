"""The mean posterior variance of x_0 at every time, from one number a time, for any step of any sampler:

    eps_square(t) = E |eps_hat(x_t, t)|^2 / d = sigma^2 Gamma,    Gamma = E |score|^2 / d
    C_t           = E tr Cov(x_0 | x_t) / d   = (sigma^2 / alpha^2) (1 - eps_square)

since E |eps - eps_hat|^2 = E |eps|^2 - E |eps_hat|^2 for eps_hat = E[eps | x_t]. Bounds (Bao et al., 2022, theorem 2 in
terms of C_t): 0 <= C_t <= sigma^2 / alpha^2, and C_t <= ((hi - lo) / 2)^2 where the data lie in [lo, hi].

Between its times the table interpolates, linearly in half log-SNR lambda,

    G = C_t (1 + e^{2 lambda}) = (1 - eps_square) (1 + e^{-2 lambda})

which is flat at both ends, C_t where noise is all there is and 1 - eps_square where there is none (and 1 throughout for
data of unit variance); beyond the table's times G is held, so C_t is finite even at alpha = 0. Between 100 times on VP
C_t so is within 0.4 % for Gaussian data of std 0.2 to 3; a straight line in eps_square itself is 0.7 % off for all.

Source: Bao, Li, Zhu and Zhang (2022), Analytic-DPM.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from scoresde.checks import check_count, check_range
from scoresde.denoiser import Denoiser, NetworkDenoiser
from scoresde.errors import CheckpointError
from scoresde.files import write_whole
from scoresde.processes import sde_from
from scoresde.sde import SDE
from scoresde.tensors import Time, precise, shown
from scoresde.wrappers import Latent

__all__ = ["Moments", "VarianceTable", "check_nodes", "fingerprint"]

FORMAT = "scoresde-variance-table-1"


@shown
class Moments(NamedTuple):
    """Means of random numbers at R times, and what their errors are made of; parts of a whole are pooled exactly.

    Attributes:
        n: how many numbers there are at each time.
        mean: float64, shape (R,).
        squares: sum of the squared deviations from the mean, float64, shape (R,).
    """

    n: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Of numbers of shape (R, n)."""
        mean = values.mean(1)
        return cls(values.shape[1], mean, ((values - mean[:, None]) ** 2).sum(1))

    @classmethod
    def pool(cls, parts: Sequence[Moments]) -> Moments:
        """Of all the numbers of the parts (Chan, Golub and LeVeque, 1983)."""
        total = parts[0]
        for part in parts[1:]:
            n = total.n + part.n
            shift = part.mean - total.mean
            total = cls(
                n,
                total.mean + shift * (part.n / n),
                total.squares + part.squares + shift**2 * (total.n * part.n / n),
            )
        return total

    @property
    def stderr(self) -> Tensor:
        """Standard error of the mean, NaN for a single number."""
        if self.n == 1:
            return torch.full_like(self.mean, math.nan)
        return (self.squares / (self.n - 1) / self.n).sqrt()


@dataclass(frozen=True, eq=False, repr=False)
class VarianceTable:
    """E |eps_hat|^2 / d of a model on an SDE's times. Made by `scoresde.variance.estimate`, once a model.

    Args:
        sde: the SDE that the times belong to.
        t: times, strictly increasing, where alpha > 0 and sigma > 0, shape (R,).
        eps_square: E |eps_hat(x_t, t)|^2 / d at each, shape (R,). At most 1 in theory; a trained network may exceed it
            where noise is nearly all there is, and `covariance` is then 0.
        stderr: its standard error, shape (R,); NaN if unknown.
        samples: how many draws of x_t each is a mean of.
        model: `fingerprint` of the denoiser; "" where nothing is to be compared.

    Attributes: the arguments, the tensors float64 on the CPU.

    Raises:
        TypeError, ValueError: if sde is none, shapes do not fit, or times or numbers are not as said.

    >>> from scoresde import VPSDE
    >>> sde, t = VPSDE(), torch.linspace(0.1, 1.0, 10)
    >>> unit = VarianceTable(sde, t, sde.sigma(t) ** 2, torch.zeros(10), samples=1)  # of unit variance: C = sigma^2
    >>> unit
    VarianceTable(VPSDE(beta_min=0.1, beta_max=20.0, t_min=1e-05, t_max=1.0), 10 times: 0.1 to 1, samples=1)
    >>> torch.allclose(unit.covariance(0.55), sde.sigma(0.55) ** 2)
    True
    """

    sde: SDE
    t: Tensor
    eps_square: Tensor
    stderr: Tensor
    samples: int
    model: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.sde, SDE):
            raise TypeError(f"sde is {type(self.sde).__name__}: expected the SDE that the times belong to")
        check_count(samples=self.samples)
        for name in ("t", "eps_square", "stderr"):
            column = torch.as_tensor(getattr(self, name), dtype=torch.float64).detach().cpu().clone()
            object.__setattr__(self, name, column)
        check_nodes(self.sde, self.t)
        for name in ("eps_square", "stderr"):
            if getattr(self, name).shape != self.t.shape:
                found = tuple(getattr(self, name).shape)
                raise ValueError(f"{name} has shape {found} for {len(self.t)} times: expected ({len(self.t)},)")
        if not bool(self.eps_square.isfinite().all()):
            i = int(self.eps_square.isfinite().int().argmin())
            raise ValueError(f"eps_square is not finite at t = {float(self.t[i]):.6g}: {float(self.eps_square[i])}")

    def at(self, t: Time) -> Tensor:
        """eps_square at any times, float64 of the shape of t."""
        lam = self.sde.half_log_snr(precise(t))
        return 1 - self._interpolated(lam) * torch.sigmoid(2 * lam)

    def covariance(self, t: Time, data_range: tuple[float, float] | None = None) -> Tensor:
        """C_t = E tr Cov(x_0 | x_t) / d, float64 of the shape of t, in [0, sigma^2 / alpha^2]: 0 at sigma = 0.

        Args:
            t: times of any shape.
            data_range: (lo, hi), that the data are known to lie in: C_t then is at most ((hi - lo) / 2)^2.

        Raises:
            ValueError: unless lo < hi are finite.
        """
        lam = self.sde.half_log_snr(precise(t))
        C = (self._interpolated(lam) * torch.sigmoid(-2 * lam)).clamp(min=0)
        C = torch.minimum(C, (-2 * lam).exp())
        return C if data_range is None else C.clamp(max=check_range(data_range) ** 2)

    @cached_property
    def _nodes(self) -> tuple[Tensor, Tensor]:
        """(lambda, G) with lambda increasing, each of shape (R,)."""
        lam = self.sde.half_log_snr(self.t)
        return lam.flip(0), ((1 - self.eps_square) / torch.sigmoid(2 * lam)).flip(0)

    def _interpolated(self, lam: Tensor) -> Tensor:
        nodes, G = (column.to(lam.device, lam.dtype) for column in self._nodes)
        if len(nodes) == 1:
            return G.expand(lam.shape)
        lam = lam.clamp(nodes[0], nodes[-1])
        above = torch.searchsorted(nodes, lam.contiguous()).clamp(1, len(nodes) - 1)
        low, high = nodes[above - 1], nodes[above]
        return torch.lerp(G[above - 1], G[above], (lam - low) / (high - low))

    @classmethod
    def merge(cls, tables: Sequence[VarianceTable]) -> VarianceTable:
        """The table of all the samples of several: the shards of one estimate, or estimates under different seeds.

        Raises:
            ValueError: if there is none, they differ in SDE, times or model, or two hold the same samples.
        """
        if not tables:
            raise ValueError("merge got no tables")
        first = tables[0]
        for i, table in enumerate(tables):
            for name in ("sde", "t", "model"):
                ours, theirs = getattr(first, name), getattr(table, name)
                if not (torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs):
                    raise ValueError(f"tables 0 and {i} differ in {name}: {ours!r} and {theirs!r}")
            for j, other in enumerate(tables[:i]):
                if bool((table.stderr != 0).any()) and torch.equal(table.eps_square, other.eps_square):
                    raise ValueError(f"tables {j} and {i} hold the same samples: give each shard once")
        pooled = Moments.pool([table._moments for table in tables])
        return cls(first.sde, first.t, pooled.mean, pooled.stderr, pooled.n, first.model)

    @property
    def _moments(self) -> Moments:
        # Of a single sample the error is unknown and the sum of squares zero.
        squares = self.stderr**2 * self.samples * (self.samples - 1) if self.samples > 1 else 0 * self.eps_square
        return Moments(self.samples, self.eps_square, squares)

    def save(self, path: str | Path) -> None:
        """Write the table to a .npz file, whole or not at all, with what it was made for."""
        columns: dict[str, Any] = {"t": self.t, "eps_square": self.eps_square, "stderr": self.stderr}
        columns = {name: column.numpy() for name, column in (columns | self.sde.arrays()).items()}
        columns |= {"format": FORMAT, "sde": repr(self.sde), "model": self.model, "samples": np.int64(self.samples)}
        file = io.BytesIO()
        np.savez(file, **columns)
        write_whole(Path(path), lambda out: out.write(file.getvalue()))

    @classmethod
    def load(cls, path: str | Path, sde: SDE | None = None) -> VarianceTable:
        """Read a table that `save` wrote; nothing in the file is executed.

        Args:
            path: the file.
            sde: the SDE that it must have been made for. It may be left out for the SDEs of this package, which are
                made anew from the file.

        Raises:
            FileNotFoundError: if there is none.
            scoresde.training.CheckpointError: if the file is truncated, damaged or no such table, was made for another
                SDE than the given one, or for one that is not known here and not given. All name the file.
        """
        path = Path(path)
        found = _read(path)
        made_for = str(found["sde"])
        if sde is None:
            sde = sde_from(made_for, found)
            if sde is None:
                raise CheckpointError(
                    f"{path} was made for {made_for}, which is not known here: give it, load(path, sde=)"
                )
        elif repr(sde) != made_for:
            raise CheckpointError(f"{path} was made for {made_for}, not for {sde!r}: estimate a table for that SDE")
        try:
            t, eps_square, stderr = (torch.from_numpy(found[name]) for name in ("t", "eps_square", "stderr"))
            return cls(sde, t, eps_square, stderr, int(found["samples"]), str(found["model"]))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error

    def __repr__(self) -> str:
        R, (low, high) = len(self.t), (float(self.t[i]) for i in (0, -1))
        model = f", model={self.model!r}" if self.model else ""
        times = f"{R} time{'s' * (R > 1)}: {low:.4g} to {high:.4g}"
        return f"VarianceTable({self.sde!r}, {times}, samples={self.samples}{model})"


def check_nodes(sde: SDE, t: Tensor) -> None:
    """Raises ValueError unless t is a row of strictly increasing times of the SDE, where alpha > 0 and sigma > 0."""
    if t.ndim != 1 or len(t) == 0:
        raise ValueError(f"t has shape {tuple(t.shape)}: expected at least one time, in one dimension")
    if not bool((t.diff() > 0).all()) or not bool(((t > 0) & (t <= sde.t_limit)).all()):
        raise ValueError(
            f"times {_short(t)}: expected finite, strictly increasing times in (0, {sde.t_limit}] of {sde!r}"
        )
    usable = sde.half_log_snr(t).isfinite()
    if not bool(usable.all()):
        raise ValueError(f"half log-SNR is infinite at t = {_short(t[~usable])} of {sde!r}: leave such times out")


def fingerprint(denoiser: Denoiser) -> str:
    """A hash of a denoiser: of the reprs and plain options of its wrappers, itself and its SDE, and of the parameters
    and buffers of its network, if that is an nn.Module (compiled or data-parallel ones count as what they wrap).

    What it cannot see: a network that is a bare function, the time label's function, the numbers of an exact
    distribution. Another dtype of the parameters is another network.
    """
    digest = hashlib.sha256()
    level: Any = denoiser
    while isinstance(level, Denoiser):
        if isinstance(level, Latent):  # nothing here depends on what z is decoded to
            level = level.denoiser
            continue
        net: Any = getattr(level, "net", None)
        while isinstance(inside := getattr(net, "_orig_mod", None) or getattr(net, "module", None), nn.Module):
            net = inside
        if isinstance(level, NetworkDenoiser) and net is not level.net:
            level = level.with_net(net)
        plain = {k: v for k, v in sorted(vars(level).items()) if isinstance(v, bool | int | float | str | tuple)}
        digest.update(f"{type(level).__name__} {re.sub(r' at 0x[0-9a-f]+', '', repr(level))} {plain}\n".encode())
        if isinstance(net, nn.Module):
            for name, value in sorted(net.state_dict().items()):
                digest.update(f"{name} {value.dtype if isinstance(value, Tensor) else value}\n".encode())
                if isinstance(value, Tensor):
                    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        level = getattr(level, "denoiser", None)
    return digest.hexdigest()[:16]


def _short(t: Tensor) -> str:
    shown = [f"{x:.6g}" for x in t.tolist()[:8]]
    return ", ".join(shown) + (f", ... ({len(t)} in all)" if len(t) > 8 else "")


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the file."""
    try:
        # From memory: of a file that is damaged, numpy leaves the handle open.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # zip, zlib, header and pickle errors, and an AttributeError for a bare array
        raise CheckpointError(f"{path} cannot be read: truncated, damaged, or no variance table ({error})") from error
    if str(found.get("format")) != FORMAT:
        raise CheckpointError(f"{path} is not a variance table of this version ({FORMAT})")
    expected = {"format", "sde", "model", "samples", "t", "eps_square", "stderr"}
    different = sorted((set(found) - {"betas"}) ^ expected)
    if different:
        raise CheckpointError(f"{path} lacks, or has besides what is known, {different}: it is altered")
    return found
