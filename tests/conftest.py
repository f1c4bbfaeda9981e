"""One thread a worker: the tests are many and small, and two workers with two threads each wait on each other."""

import torch

torch.set_num_threads(1)
