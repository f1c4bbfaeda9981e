"""Networks net(x, time, label=None, vector=None, image=None) for the denoisers' adapters: an MLP for vectors, a U-Net
and a transformer (DiT) for series, images and volumes.
"""

from scoresde.nn.dit import DiT
from scoresde.nn.embedding import TimeEmbedding
from scoresde.nn.mlp import MLP
from scoresde.nn.unet import UNet

__all__ = ["MLP", "DiT", "TimeEmbedding", "UNet"]
