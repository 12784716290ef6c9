"""For all tests."""

import logging

import torch  # noqa: F401  (sets its loggers up)

# pytest listens to loggers that do not propagate, and torch formats its traces of every capture as soon as anybody listens.
logging.getLogger("torch.__trace").propagate = True
