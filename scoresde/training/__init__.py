"""Training by denoising score matching: the loss, where it puts its effort, and a trainer."""

from scoresde.errors import CheckpointError
from scoresde.training.config import TrainConfig
from scoresde.training.feed import DataSource
from scoresde.training.loss import Part, dsm_loss
from scoresde.training.model import ModelConfig, load, load_ema
from scoresde.training.parallel import start
from scoresde.training.step import NonFiniteLossError
from scoresde.training.trainer import Trainer
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
    "DataSource",
    "ImportanceTimes",
    "LogNormalTimes",
    "ModelConfig",
    "NonFiniteLossError",
    "Part",
    "TimeSampler",
    "TrainConfig",
    "Trainer",
    "UniformTimes",
    "Weighting",
    "dsm_loss",
    "edm",
    "likelihood",
    "load",
    "load_ema",
    "min_snr",
    "simple",
    "start",
    "uniform_in",
]
