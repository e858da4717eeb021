"""One thread a test process: the networks are tiny, and threads only add noise to the time."""

import torch

torch.set_num_threads(1)
