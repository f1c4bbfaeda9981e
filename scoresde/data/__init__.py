"""Data: sets by name or from files, what a network trains on, in which order, and the loader.

    data = training_data("cifar10:/data/cifar", flip=True)      # uint8 in memory, [-1, 1] in a batch
    order = Order(len(data), batch_size=128, seed=0)            # of every step, forever
    for x, cond in loader(data, order, start_step=1000): ...   # resumed where it stood; {"label": ...}, ...

`read_data` gives the items themselves, all of them, in memory.
"""

from scoresde.data import augmented, cifar, download, folder, idx, order, series, tasks, toys, training, words
from scoresde.data.augmented import *
from scoresde.data.captions import Captions, read_captions
from scoresde.data.cifar import *
from scoresde.data.conditions import Condition, Given, GivenContext, dropped, nothing
from scoresde.data.download import *
from scoresde.data.folder import *
from scoresde.data.idx import *
from scoresde.data.loader import loader
from scoresde.data.order import *
from scoresde.data.raw import Itself, Raw
from scoresde.data.series import *
from scoresde.data.shown import Shown
from scoresde.data.sources import BUILT_IN, Data, digit_levels, digits, read_data
from scoresde.data.states import StateData, pictured, states_of
from scoresde.data.tasks import *
from scoresde.data.toys import *
from scoresde.data.training import *
from scoresde.data.words import *
from scoresde.levels import scaled

__all__ = [
    "BUILT_IN",
    "Captions",
    "Condition",
    "Data",
    "Given",
    "GivenContext",
    "Itself",
    "Raw",
    "Shown",
    "StateData",
    "digit_levels",
    "digits",
    "dropped",
    "loader",
    "nothing",
    "pictured",
    "read_captions",
    "read_data",
    "scaled",
    "states_of",
]
__all__ += augmented.__all__
__all__ += cifar.__all__
__all__ += download.__all__
__all__ += folder.__all__
__all__ += idx.__all__
__all__ += order.__all__
__all__ += series.__all__
__all__ += tasks.__all__
__all__ += toys.__all__
__all__ += training.__all__
__all__ += words.__all__
