"""Data: sets by name or from files, what a network trains on, in which order, and the loader.

    data = training_data("cifar10:/data/cifar", flip=True)      # uint8 in memory, [-1, 1] in a batch
    order = Order(len(data), batch_size=128, seed=0)            # of every step, forever
    for x, cond in loader(data, order, start_step=1000): ...   # resumed where it stood; {"label": ...}, ...

`read_data` gives the items themselves, all of them, in memory.
"""

from scoresde.data.cifar import CIFAR10_CLASSES, cifar10, cifar10_levels
from scoresde.data.conditions import Condition, Given, dropped, nothing
from scoresde.data.download import fetch
from scoresde.data.folder import ImageFolder
from scoresde.data.idx import FASHION_MNIST, fashion_mnist, fashion_mnist_levels, mnist, mnist_levels
from scoresde.data.loader import loader
from scoresde.data.order import Order
from scoresde.data.shown import Shown
from scoresde.data.sources import BUILT_IN, Data, digit_levels, digits, read_data
from scoresde.data.tasks import (
    TASKS,
    Colourisation,
    Inpainting,
    JPEGRestoration,
    SuperResolution,
    Uncropping,
    condition_of,
)
from scoresde.data.toys import TOYS, checkerboard, eight_gaussians, rings, spiral, swiss_roll, two_moons
from scoresde.data.training import Batch, TrainingData, training_data
from scoresde.levels import scaled

__all__ = [
    "BUILT_IN",
    "CIFAR10_CLASSES",
    "FASHION_MNIST",
    "TASKS",
    "TOYS",
    "Batch",
    "Colourisation",
    "Condition",
    "Data",
    "Given",
    "ImageFolder",
    "Inpainting",
    "JPEGRestoration",
    "Order",
    "Shown",
    "SuperResolution",
    "TrainingData",
    "Uncropping",
    "checkerboard",
    "cifar10",
    "cifar10_levels",
    "condition_of",
    "digit_levels",
    "digits",
    "dropped",
    "eight_gaussians",
    "fashion_mnist",
    "fashion_mnist_levels",
    "fetch",
    "loader",
    "mnist",
    "mnist_levels",
    "nothing",
    "read_data",
    "rings",
    "scaled",
    "spiral",
    "swiss_roll",
    "training_data",
    "two_moons",
]
