"""How a density is computed: the ODE, and whole levels as data with one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from scoresde.cli.options import Options, option
from scoresde.data import Data
from scoresde.levels import outer_edges
from scoresde.likelihood.bits import Dequantize

__all__ = ["LevelOptions", "OdeOptions"]


@dataclass(frozen=True, kw_only=True)
class OdeOptions(Options):
    """How the ODE is solved: arguments of `log_prob`."""

    divergence: str | None = option("(hutchinson)", choices=("hutchinson", "exact", "hutch++"))
    probes: int | None = option("of the divergence", metavar="N")
    steps: int | None = option("fixed ones, instead of adaptive steps", metavar="N")
    rtol: float | None = option("of adaptive steps")
    atol: float | None = option("of adaptive steps")


@dataclass(frozen=True, kw_only=True)
class NoiseOptions(Options):
    """How levels are dequantised: arguments of `bits_per_dim`."""

    dequantize: Dequantize | None = option("noise in the bins (uniform)", choices=get_args(Dequantize))
    repeats: int | None = option("independent estimates per image (1)", metavar="R")
    importance: int | None = option("draws of the importance-weighted bound (1)", metavar="K")
    t: float | None = option("where the ODE starts")


@dataclass(frozen=True, kw_only=True)
class LevelOptions(Options):
    """Data of whole levels."""

    levels: int | None = option("how many (256)", metavar="L")
    range: list[float] | None = option(
        "what the bins of the levels fill, in the model's units (-1 1)", metavar=("LO", "HI"), nargs=2
    )
    levels_at_ends: bool = option("level 0 is at LO itself and the last at HI, as after torchvision's ToTensor")
    noise: NoiseOptions

    def of_data(self, source: str | None, data: Data) -> dict[str, Any]:
        """The arguments of `bits_per_dim` that say what the levels are and how they are dequantised.

        Raises:
            ValueError: if they contradict what is known of the data.
        """
        if self.levels is not None and data.levels not in (None, self.levels):
            raise ValueError(f"--levels {self.levels}: {source} has {data.levels}")
        levels, (lo, hi) = self.levels or data.levels or 256, self.range or (-1.0, 1.0)
        data_range = (lo, hi) if self.range or data.data_range is None else data.data_range
        if self.levels_at_ends:
            data_range = outer_edges(lo, hi, levels)
        return {"levels": levels, "data_range": data_range, **self.noise.given()}
