"""Networks net(x, time, label=None) for the denoisers' adapters: an MLP for vectors and a compact U-Net for images."""

from scoresde.nn.embedding import TimeEmbedding
from scoresde.nn.mlp import MLP
from scoresde.nn.unet import UNet

__all__ = ["MLP", "TimeEmbedding", "UNet"]
