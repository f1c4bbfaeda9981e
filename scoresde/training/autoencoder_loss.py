"""The loss of an autoencoder (Esser et al., 2021, "Taming transformers for high-resolution image synthesis", section
3.1; Rombach et al., 2022, "High-resolution image synthesis with latent diffusion models", appendix G), y = decode(m):

    R + cost C + adversarial lambda G    of the autoencoder,    H    of the discriminator

    R = mean |x - y| + perceptual d(x, y)                      d of `scoresde.training.perceptual`
    C = KL(q(m | x) | N(0, I)) / D, D dimensions of x; or what the codebook costs (`scoresde.nn.autoencoder`)
    G = -mean F(y)                                             F the discriminator's logits (`PatchDiscriminator`)
    lambda = |grad R| / (|grad G| + 1e-6)                      at the decoder's last layer; 10^4 at most
    H = (mean max(0, 1 - F(x)) + mean max(0, 1 + F(y))) / 2    the hinge loss, y taken as it is

G and H begin at a step of their own, when R has done what it can: before, the discriminator is not trained. Both
players take their step on the same batch, from one y, where the papers' code draws a second one for the discriminator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scoresde.checks import ArgumentError, check_keys, check_nonnegative, check_option, check_whole
from scoresde.nn import Autoencoder, KLAutoencoder, PatchDiscriminator, Reconstruction
from scoresde.training.loss import Draws, Part
from scoresde.training.perceptual import PerceptualDistance

__all__ = ["AutoencoderLoss", "AutoencoderWorker", "Players"]


@dataclass(frozen=True)
class AutoencoderLoss:
    """What an autoencoder is trained for.

    Args:
        error: "l1" for mean |x - y|, "l2" for the mean of its square.
        cost: weight of what the latent costs: by default 1e-6 of a KL divergence, as in Rombach et al. (who sum both
            over the entries of an item, which has the same minimum), 1 of a codebook.
        perceptual: weight of the perceptual distance.
        features: that it is of, by name; see `perceptual_distance`. None for no such distance.
        adversarial: weight of the generator's part; 0 for no discriminator. 0.5 in Rombach et al.
        start: the step from which on there is a discriminator.
        discriminator: options of `PatchDiscriminator`, but its channels and axes of data.
        betas: of AdamW; (0.9, 0.999) by default, (0.5, 0.9) with a discriminator, as in the papers.

    Raises:
        ValueError: on a value out of its range.
    """

    error: Literal["l1", "l2"] = "l1"
    cost: float | None = None
    perceptual: float = 1.0
    features: str | None = None
    adversarial: float = 0.0
    start: int = 0
    discriminator: dict[str, Any] = field(default_factory=dict)
    betas: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_option(("l1", "l2"), error=self.error)
        check_nonnegative(perceptual=self.perceptual, adversarial=self.adversarial)
        if self.cost is not None:
            check_nonnegative(cost=self.cost)
        check_whole(start=self.start)
        check_keys("discriminator", self.discriminator, ("channels", "layers"))
        if self.betas is not None:
            object.__setattr__(self, "betas", tuple(self.betas))
            if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
                raise ArgumentError(f"betas={self.betas}: expected two numbers in [0, 1)")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> AutoencoderLoss:
        """From a mapping, what TOML or JSON gives.

        Raises:
            ValueError: on a key that is none of the arguments, naming it; on a value out of its range.
        """
        check_keys(cls.__name__, settings, (f.name for f in fields(cls)))
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """What `of` takes, of JSON's types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def players(self, autoencoder: Autoencoder) -> Players:
        """The autoencoder and its discriminator, whose weights are drawn from the global generator."""
        if not self.adversarial:
            return Players(autoencoder, None)
        how = {**self.discriminator, "dims": autoencoder.dims}
        return Players(autoencoder, PatchDiscriminator(autoencoder.image_channels, **how))

    def tells(self, autoencoder: Autoencoder) -> tuple[str, ...]:
        """Names of what the loss tells beside its value."""
        perceptual = ("perceptual",) if self.features is not None else ()
        adversarial = ("generator", "discriminator", "adaptive_weight") if self.adversarial else ()
        return ("error", *perceptual, *autoencoder.tells, *adversarial)


class Players(nn.Module):
    """An autoencoder and, perhaps, its discriminator: what is trained."""

    def __init__(self, autoencoder: Autoencoder, discriminator: PatchDiscriminator | None) -> None:
        super().__init__()
        self.autoencoder, self.discriminator = autoencoder, discriminator


class AutoencoderWorker(nn.Module):
    """The loss of a part of a batch, and what it tells of itself.

    Args:
        players: that are trained.
        loss: what for.
        distance: the perceptual one, or None.
        step: the step under way, when asked.
        autocast: what networks are called in.
        call: the autoencoder, compiled perhaps.
    """

    def __init__(
        self,
        players: Players,
        loss: AutoencoderLoss,
        distance: PerceptualDistance | None,
        step: Callable[[], int],
        autocast: Callable[[], AbstractContextManager[Any]],
        call: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.players, self._loss, self._distance, self._step, self._autocast = players, loss, distance, step, autocast
        self._call: Callable[..., Any] = players.autoencoder if call is None else call
        default = 1e-6 if isinstance(players.autoencoder, KLAutoencoder) else 1.0
        self._cost = default if loss.cost is None else loss.cost

    def forward(self, x: Tensor, draws: Draws, cond: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        net, loss = self.players.autoencoder, self._loss
        x = x.to(net.last_layer.dtype)
        part = Part.of(draws, len(x), x.device)
        shape = (len(x), *net.latent_shape(x.shape[1:]))
        noise = part.draw(shape, lambda whole: torch.randn(whole, generator=part.generator, device=x.device)).to(x)
        with self._autocast():
            found = Reconstruction(*self._call(x, noise))
        y, r = found.x.float(), found.x.float() - x
        told = [r.abs().mean() if loss.error == "l1" else r.square().mean()]
        fit = told[0]
        if self._distance is not None:
            with self._autocast():
                told.append(self._distance(x, y).float().mean())
            fit = fit + loss.perceptual * told[-1]
        told += [one.float() for one in found.told]
        total = fit + self._cost * found.cost.float()
        if self.players.discriminator is not None:
            game, said = self._game(x, y, fit, self.players.discriminator)
            total, told = total + game, [*told, *said]
        return total, torch.stack([one.detach() for one in told])

    def _game(
        self, x: Tensor, y: Tensor, fit: Tensor, discriminator: PatchDiscriminator
    ) -> tuple[Tensor, list[Tensor]]:
        """adversarial lambda G + H, and G, H and lambda."""
        zero = fit.detach() * 0
        if self._step() < self._loss.start:
            return zero, [zero, zero, zero]
        fixed = {name: p.detach() for name, p in discriminator.named_parameters()}
        with self._autocast():
            G = -torch.func.functional_call(discriminator, fixed, (y,)).float().mean()
            real, fake = discriminator(x).float(), discriminator(y.detach()).float()
        last = self.players.autoencoder.last_layer
        norms = [torch.autograd.grad(one, last, retain_graph=True)[0].float().norm() for one in (fit, G)]
        weight = (norms[0] / (norms[1] + 1e-6)).clamp(max=1e4).detach()
        H = ((1 - real).relu().mean() + (1 + fake).relu().mean()) / 2
        return self._loss.adversarial * weight * G + H, [G, H, weight]
