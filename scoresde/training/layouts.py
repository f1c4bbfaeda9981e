"""The layout that a configuration asks for."""

from __future__ import annotations

from scoresde.training import parallel
from scoresde.training.config import TrainConfig
from scoresde.training.layout import Copies, Layout

__all__ = ["layout_of"]


def layout_of(config: TrainConfig) -> Layout:
    """The layout that a configuration asks for. A single process has nothing to shard.

    Raises:
        ImportError: if this torch has no FSDP2, or cannot save it in safetensors.
    """
    if config.shard and parallel.world() > 1:
        try:
            from scoresde.training.sharded import Shards  # torch's FSDP takes a second to import
        except ImportError as error:
            raise ImportError(f"TrainConfig(shard=True) needs torch 2.9 or newer ({error})") from error
        return Shards(config.precision)
    return Copies()
