"""For all tests."""

import logging
import os

import torch

# pytest listens to loggers that do not propagate, and torch formats its traces of every capture as soon as anybody listens.
logging.getLogger("torch.__trace").propagate = True

# One thread per worker: two workers with two threads each wait for each other on two cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
