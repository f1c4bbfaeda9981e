"""Training by denoising score matching: the loss, where it puts its effort, and a trainer."""

from scoresde.training.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from scoresde.training.loss import dsm_loss
from scoresde.training.trainer import NonFiniteLossError, TrainConfig, Trainer, load_ema
from scoresde.training.weights import (
    ImportanceTimes,
    LogNormalTimes,
    TimeSampler,
    UniformTimes,
    Weighting,
    edm,
    likelihood,
    min_snr,
    simple,
    uniform_in,
)

__all__ = [
    "CheckpointError",
    "ImportanceTimes",
    "LogNormalTimes",
    "NonFiniteLossError",
    "TimeSampler",
    "TrainConfig",
    "Trainer",
    "UniformTimes",
    "Weighting",
    "dsm_loss",
    "edm",
    "likelihood",
    "load_ema",
    "min_snr",
    "read_checkpoint",
    "simple",
    "uniform_in",
    "write_checkpoint",
]
