"""Training by denoising score matching: the loss, where it puts its effort, and a trainer; and of the autoencoders that
a latent diffusion needs."""

from scoresde.errors import CheckpointError
from scoresde.training import autoencoders, latents, perceptual, weights
from scoresde.training.autoencoder_loss import AutoencoderLoss
from scoresde.training.autoencoder_trainer import AutoencoderTrainer
from scoresde.training.autoencoders import AutoencoderConfig, export_codec, load_autoencoder, load_codec, load_latent
from scoresde.training.config import TrainConfig
from scoresde.training.feed import DataSource
from scoresde.training.latents import LatentData
from scoresde.training.loss import Part, dsm_loss, joint_loss, masked_loss, two_term_loss
from scoresde.training.model import CategoricalConfig, ModelConfig, load, load_categorical, load_ema
from scoresde.training.parallel import start
from scoresde.training.snapshots import averaged
from scoresde.training.states import bound_loss
from scoresde.training.step import NonFiniteLossError
from scoresde.training.steps import step_loss
from scoresde.training.trainer import Trainer
from scoresde.training.weights import *

__all__ = ["CheckpointError", "DataSource", "ModelConfig", "NonFiniteLossError", "Part", "TrainConfig", "Trainer"]
__all__ += ["AutoencoderConfig", "AutoencoderLoss", "AutoencoderTrainer", "LatentData", "autoencoders", "export_codec"]
__all__ += ["latents", "load_autoencoder", "load_codec", "load_latent", "perceptual"]
__all__ += ["CategoricalConfig", "bound_loss", "joint_loss", "load_categorical"]
__all__ += ["averaged", "dsm_loss", "load", "load_ema", "masked_loss", "start", "step_loss", "two_term_loss"]
__all__ += weights.__all__
