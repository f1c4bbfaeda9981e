"""Codecs: maps between data x and the space of the diffusion, whose states are called z here.

base.py         Codec: encode, decode, and what a density needs; codecs after one another
linear.py       Orthonormal, Standardise, Shift: with a volume, so that densities of data are exact
autoencoder.py  AutoencoderCodec: a network's encoder and decoder, with a bound
"""

from scoresde.codecs.autoencoder import AutoencoderCodec
from scoresde.codecs.base import Chained, Codec, Encoded
from scoresde.codecs.linear import Orthonormal, Shift, Standardise

__all__ = ["AutoencoderCodec", "Chained", "Codec", "Encoded", "Orthonormal", "Shift", "Standardise"]
