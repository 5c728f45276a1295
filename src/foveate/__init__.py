"""Foveate: reinforcement learning for computer vision.

import foveate

agent = foveate.train("ram", variant="plain", minutes=3)
agent = foveate.load("runs/demo")
agent(images)["classes"]        # images: float32 [batch, channels, height, width] in [0, 1]
foveate.tune(model, reward, batches, out="runs/tuned", minutes=10)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.commands import Agent, evaluate, load, resume, train
    from foveate.tuning import tune

__all__ = ["Agent", "evaluate", "load", "resume", "train", "tune"]


def __getattr__(name: str) -> Any:
    # PyTorch takes seconds to import; `foveate --help` has no need of it.
    if name in __all__:
        return getattr(import_module("foveate.tuning" if name == "tune" else "foveate.commands"), name)
    raise AttributeError(f"module 'foveate' has no attribute {name!r}")
