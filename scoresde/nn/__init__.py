"""Networks net(x, time, label=None, vector=None, image=None, context=None, context_mask=None) for the denoisers'
adapters: an MLP for vectors (which takes neither image nor context), a U-Net and a transformer (DiT) for series, images
and volumes, a transformer for sets of any number of points; one whose conditions others encode (`Encoding`), texts by a
transformer (`TextEncoder`) say; one of a step in time, told the state before it (`Stepwise`); and net(x, time) to
logits, a classifier of what is noisy. Beside them autoencoders, whose latent a diffusion may be of, and the
discriminator of patches that some are trained against. `OneHot` and `Columns` make of these networks ones of whole
states; `monotonic_durations` aligns tokens with frames.
"""

from scoresde.nn.alignment import aligned, monotonic_durations
from scoresde.nn.autoencoder import Autoencoder, Codebook, KLAutoencoder, Reconstruction, VQAutoencoder
from scoresde.nn.classifier import NoisyClassifier
from scoresde.nn.context import padded
from scoresde.nn.discriminator import PatchDiscriminator
from scoresde.nn.dit import DiT, SetTransformer
from scoresde.nn.embedding import TimeEmbedding
from scoresde.nn.encoding import Encoding
from scoresde.nn.image import ImageEncoder
from scoresde.nn.magnitude import MagnitudeUNet
from scoresde.nn.mlp import MLP
from scoresde.nn.onehot import Columns, OneHot
from scoresde.nn.pretrained import PretrainedText
from scoresde.nn.song import SongUNet
from scoresde.nn.states import CausalTransformer, Recurrent, Stepwise
from scoresde.nn.text import TextEncoder
from scoresde.nn.tokens import ByteTokens, PretrainedTokens, Tokenizer, WordTokens, tokenizer_of
from scoresde.nn.unet import UNet

__all__ = ["MLP", "Autoencoder", "ByteTokens", "CausalTransformer", "Codebook", "DiT", "Encoding", "ImageEncoder"]
__all__ += ["Columns", "OneHot"]
__all__ += ["KLAutoencoder", "MagnitudeUNet", "NoisyClassifier", "PatchDiscriminator", "PretrainedText"]
__all__ += ["PretrainedTokens", "Reconstruction", "Recurrent", "SetTransformer", "SongUNet", "Stepwise", "TextEncoder"]
__all__ += ["TimeEmbedding", "Tokenizer", "UNet", "VQAutoencoder", "WordTokens", "padded", "tokenizer_of"]
__all__ += ["aligned", "monotonic_durations"]
