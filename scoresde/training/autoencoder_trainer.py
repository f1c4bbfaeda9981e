"""The trainer of an autoencoder, in the loop of `scoresde.training.loop`: order, feed, averages, checkpoints, log and
resuming are those of `Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.codecs import AutoencoderCodec
from scoresde.errors import CheckpointError
from scoresde.networks import seeded_global_generators
from scoresde.nn import Autoencoder
from scoresde.training import parallel
from scoresde.training.autoencoder_loss import AutoencoderLoss, AutoencoderWorker, Players
from scoresde.training.autoencoders import AutoencoderConfig, Measured, measured
from scoresde.training.config import TrainConfig
from scoresde.training.feed import DataSource, source_of
from scoresde.training.identity import config_in_words, network_in_words, weights_digest
from scoresde.training.loop import Loop
from scoresde.training.perceptual import perceptual_distance

__all__ = ["AutoencoderTrainer"]


class AutoencoderTrainer(Loop[Autoencoder]):
    """Trains an autoencoder, perhaps against a discriminator, and measures its latent.

    Args:
        autoencoder: of `scoresde.nn`; trained in place.
        data: as for `Trainer`; what a source tells of its items is not looked at.
        config: as for `Trainer`. The gradient of each player is cut to `grad_clip` by itself.
        loss: see `AutoencoderLoss`. Its parts are columns of the log.
        folder, augment, settings: as for `Trainer`.
        evaluate: a function (autoencoder, step) -> numbers by name, with the averaged weights.
        model: what the autoencoder is in words, for `load_codec`.

    Attributes: as `Trainer`'s.

    Raises:
        TypeError, ValueError, ImportError, CheckpointError: as `Trainer`; if the autoencoder does not take the data; if
            features of the loss are not to be had; if the data are too small for the discriminator; with one or
            config.shard on several processes: the adaptive weight is of a whole batch. (In parts, config.accumulate,
            each part has its own.)

    `fit` ends with `codec.json` in the folder: what `load_codec` scales the latent by.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        data: Tensor | DataSource,
        config: TrainConfig,
        *,
        loss: AutoencoderLoss | None = None,
        folder: str | Path | None = None,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        evaluate: Callable[[Autoencoder, int], Mapping[str, float]] | None = None,
        model: AutoencoderConfig | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(autoencoder, Autoencoder):
            raise TypeError(f"autoencoder is {type(autoencoder).__name__}: expected one of scoresde.nn")
        if not any(p.requires_grad for p in autoencoder.parameters()):
            raise ValueError("no parameter of the autoencoder takes a gradient: call requires_grad_(True)")
        self.autoencoder, self.loss = autoencoder, loss or AutoencoderLoss()
        if parallel.world() > 1 and (self.loss.adversarial or config.shard):
            raise ValueError("several processes train an autoencoder without a discriminator and without config.shard")
        source, about = source_of(data, None)
        first = source.batch(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))[0]
        autoencoder.latent_shape(first.shape[1:])
        words = network_in_words(autoencoder)
        if model is not None:
            with torch.device("meta"):
                theirs = model.build()
            if [(k, v.shape) for k, v in theirs.state_dict().items()] != [
                (k, v.shape) for k, v in autoencoder.state_dict().items()
            ]:
                raise ValueError("model= describes another autoencoder (model.build() makes its own)")
        features = self.loss.features
        self._distance = None if features is None else perceptual_distance(features).to(autoencoder.last_layer.device)
        if self._distance is not None:
            self._distance(first[:1].to(autoencoder.last_layer), first[:1].to(autoencoder.last_layer))
        with seeded_global_generators(config.seed):
            players = self.loss.players(autoencoder).to(autoencoder.last_layer)
        if players.discriminator is not None:  # not at the step that it begins at
            players.discriminator(first[:1].to(autoencoder.last_layer))
        super().__init__(
            players,
            source,
            config,
            made_for={
                "autoencoder": words,
                **about,
                **{f"loss.{name}": value for name, value in self.loss.to_dict().items()},
                **config_in_words(config),
            },
            folder=folder,
            augment=augment,
            evaluate=evaluate,
            model=model,
            settings=settings,
            averaged=players.autoencoder,
            told=self.loss.tells(autoencoder),
        )

    @property
    def device(self) -> torch.device:
        return self.autoencoder.last_layer.device

    @property
    def ema(self) -> Autoencoder:
        """The autoencoder with the (first) averaged weights, a copy in eval mode."""
        net = self._layout.whole(self.averages[0].module).eval().requires_grad_(False)
        assert isinstance(net, Autoencoder)
        return net

    @property
    def codec(self) -> AutoencoderCodec:
        """`ema` as a codec, measured on the training's data."""
        net = self.ema
        return measured(net, self.data).codec(net)

    @contextmanager
    def averaged(self, i: int = 0) -> Iterator[Autoencoder]:
        """With the i-th averaged weights in the autoencoder itself, in eval mode; see `Trainer.averaged`."""
        with self._averaged(i):
            yield self.autoencoder

    def _groups(self) -> list[dict[str, Any]]:
        assert isinstance(self.net, Players)
        betas = self.loss.betas or ((0.5, 0.9) if self.loss.adversarial else (0.9, 0.999))
        players = [self.net.autoencoder, self.net.discriminator]
        return [{"params": list(player.parameters()), "betas": betas} for player in players if player is not None]

    def _worker(self, net: nn.Module, bare: bool = False) -> nn.Module:
        assert isinstance(net, Players)
        call: nn.Module | None = None
        if self.config.compile and not bare:
            backend = self.config.compile if isinstance(self.config.compile, str) else "inductor"
            call = self._layout.compiled(net.autoencoder, backend)
        half = self.config.precision == "bfloat16"
        autocast: Callable[[], AbstractContextManager[Any]] = partial(
            torch.autocast, self.device.type, torch.bfloat16, enabled=half
        )
        worker = AutoencoderWorker(net, self.loss, self._distance, lambda: self.step, autocast, call)
        return worker if bare else self._layout.worker(worker)

    def _subject(self, net: nn.Module) -> Autoencoder:
        assert isinstance(net, Autoencoder)
        return net

    def _finished(self) -> None:
        if self.folder is None:
            return
        net = self.ema
        try:
            if Measured.read(self.folder).weights == weights_digest([net]):
                return
        except (FileNotFoundError, CheckpointError):
            pass
        measured(net, self.data).write(self.folder)
