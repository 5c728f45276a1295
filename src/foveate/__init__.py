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
    from foveate.agents import Agent, load
    from foveate.commands import evaluate, resume, train
    from foveate.tuning import tune

__all__ = ["Agent", "evaluate", "load", "resume", "train", "tune"]
_ROOMS = {"Agent": "agents", "load": "agents", "tune": "tuning"}  # the others stand in commands


def __getattr__(name: str) -> Any:
    # PyTorch takes seconds to import; `foveate --help` has no need of it.
    if name in __all__:
        return getattr(import_module(f"foveate.{_ROOMS.get(name, 'commands')}"), name)
    raise AttributeError(f"module 'foveate' has no attribute {name!r}")
