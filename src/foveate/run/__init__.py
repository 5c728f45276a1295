"""A run: a folder, a device, a seed, and the loop that every system is trained in."""

from foveate.run.loop import Run
from foveate.run.processes import RunError

__all__ = ["Run", "RunError"]
