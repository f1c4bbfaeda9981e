"""Training by denoising score matching: the loss, where it puts its effort, and a trainer."""

from scoresde.errors import CheckpointError
from scoresde.training import weights
from scoresde.training.config import TrainConfig
from scoresde.training.feed import DataSource
from scoresde.training.loss import Part, dsm_loss, two_term_loss
from scoresde.training.model import ModelConfig, load, load_ema
from scoresde.training.parallel import start
from scoresde.training.snapshots import averaged
from scoresde.training.step import NonFiniteLossError
from scoresde.training.trainer import Trainer
from scoresde.training.weights import *

__all__ = ["CheckpointError", "DataSource", "ModelConfig", "NonFiniteLossError", "Part", "TrainConfig", "Trainer"]
__all__ += ["averaged", "dsm_loss", "load", "load_ema", "start", "two_term_loss"]
__all__ += weights.__all__
