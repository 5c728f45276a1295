"""A run as an agent: its system, its settings, its weights.

agent = foveate.load("runs/demo")
agent(images)["classes"]
"""

from __future__ import annotations

import difflib
import importlib
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

from beartype import BeartypeConf
from beartype.door import is_bearable
from torch import nn

from foveate.run import Run
from foveate.run import folder as run_folder
from foveate.systems import SYSTEMS
from foveate.types import InputError, Tree


@dataclass(frozen=True)
class Agent:
    """A trained system.

    Attributes:
        system: its name.
        config: its resolved settings.
        policy: its weights.
        folder: the run it comes from.
    """

    system: str
    config: Any
    policy: nn.Module
    folder: Path

    def __call__(self, images: Tree) -> dict[str, Any]:
        """Run on images, float32 [batch, channels, height, width] in [0, 1], or what the system's `predict` takes."""
        return system_module(self.system).predict(self.config, self.policy, images)


def system_module(name: str) -> ModuleType:
    """The file of a system.

    Raises:
        InputError: there is no such system.
    """
    if name not in SYSTEMS:
        nearest = difflib.get_close_matches(name, SYSTEMS, 1, cutoff=0.0)[0]
        raise InputError(f"system: no {name!r}; did you mean {nearest!r}? (`foveate list` shows all)")
    return importlib.import_module(f"foveate.systems.{name.replace('-', '_')}")


def config_from(system: str, settings: dict[str, Any], where: str) -> Any:
    """A system's config from plain settings, as they stand in a JSON file.

    Raises:
        InputError: there is no such field, or its value is of another kind; `where` names the file in the message.
    """
    kind = system_module(system).Config
    known = get_type_hints(kind)
    for name in settings:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1, cutoff=0.0)[0]
            raise InputError(f"{where}: {system} has no field {name!r}; did you mean {nearest!r}?")
    ready = {}
    for name, value in settings.items():
        if isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, str) and Path in get_args(known[name]):
            value = Path(value)
        if not is_bearable(value, known[name], conf=BeartypeConf(is_pep484_tower=True)):  # an int may be a float
            raise InputError(f"{where}: {name} is {value!r}, expected {_kind(known[name])}")
        ready[name] = value
    return kind(**ready)


def _kind(hint: Any) -> str:
    """A type as a user reads it: the choices, or its name."""
    parts = [part for part in get_args(hint) if part is not type(None) and part is not ...]
    if not parts:
        return str(getattr(hint, "__name__", hint))
    return ", ".join(part if isinstance(part, str) else _kind(part) for part in parts)


def config_from_file(system: str, path: Path) -> Any:
    """A system's config from a JSON file of fields, or from a run's run.json.

    Raises:
        InputError: the file is missing or is not such a file.
    """
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"config: {path} is not a readable JSON file ({error})") from error
    if isinstance(settings, dict) and isinstance(settings.get("config"), dict):
        settings = settings["config"]
    if not isinstance(settings, dict):
        raise InputError(f"config: {path} holds {type(settings).__name__}, expected an object of fields")
    return config_from(system, settings, str(path))


def opened(folder: Path | str, device: str = "auto") -> tuple[Run, ModuleType, Any]:
    """A run that is there, the file of its system, and its config.

    Raises:
        InputError: the folder holds no run, or one of fields that the system does not have.
    """
    run = Run.open(Path(folder), device)
    return run, system_module(run.system), config_from(run.system, run.config, f"{folder}/run.json")


def processes_of(folder: Path) -> int:
    """How many processes a run was begun with."""
    return int(run_folder.read(folder).get("processes", 1))


def load(folder: Path | str, device: str = "auto") -> Agent:
    """The trained agent of a run; call it on images.

    Raises:
        InputError: the folder holds no run, or no checkpoint.
    """
    run, module, config = opened(folder, device)
    return Agent(run.system, config, policy_of(module, config, run), run.folder)


def policy_of(module: ModuleType, config: Any, run: Run, part: str | None = None) -> nn.Module:
    """The weights of a tracked part of a run; None: its policy. Of a run that has not ended yet stderr says so.

    Raises:
        InputError: its checkpoint holds no such part.
    """
    policy, part = module.build(config).to(run.device), part or module.PART
    if not run.restore(part, policy):
        raise InputError(f"{run.folder}: its checkpoint holds no {part!r} part; train it anew")
    if run.stopped and part == module.PART:
        more = f"what comes later has taught it nothing yet; foveate resume {shlex.quote(str(run.folder))} goes on"
        print(f"{run.folder}: has not ended, its checkpoint is {run.stopped}; {more}", file=sys.stderr)
    return policy.eval()
