"""The `foveate` command. Heavy imports happen in the command that needs them."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, make_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from foveate.launch import launch
from foveate.systems import SYSTEMS
from foveate.terminal import print_table

C = TypeVar("C")

USAGE = """usage: foveate COMMAND ...

Reinforcement learning for computer vision.

{commands}

`foveate COMMAND --help` tells its options. To begin with: foveate train ram --variant plain --minutes 3
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 if a run failed, 2 if the input is not usable, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        lines = [f"  {name:<8} {(one.__doc__ or '').splitlines()[0]}" for name, one in COMMANDS.items()]
        print(USAGE.format(commands="\n".join(lines)))
        return 0
    if words[0] == "--version":
        print(f"foveate {version('foveate')}")
        return 0
    if words[0] not in COMMANDS:
        return _complain(f"no command {words[0]!r}; did you mean {_nearest(words[0], COMMANDS)!r}?")
    try:
        return COMMANDS[words[0]](words[1:])
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # what is read is checked where it is read; this is what cannot be written
        return _complain(
            f"{error.filename or words[0]}: {error.strerror or error}; make room, or name another place", 1
        )
    except (ValueError, RuntimeError) as error:
        from foveate.run import RunError
        from foveate.types import InputError

        if not isinstance(error, (InputError, RunError)):
            raise
        code = 2 if isinstance(error, InputError) else 1
        return _complain(str(error), code) if os.environ.get("RANK", "0") == "0" else code


def list_systems(words: list[str]) -> int:
    """Name the systems."""
    _parse(_Nothing, "list", words)
    for name, summary in SYSTEMS.items():
        print(f"{name:<21} {summary}")
    return 0


@dataclass(frozen=True)
class Options:
    """What every training takes beside the system's own fields."""

    out: Path | None = None
    """folder of the run; runs/SYSTEM-DATE-TIME if not given"""
    overwrite: bool = False
    """delete a run that is already there"""
    source: Annotated[Path | None, arg(name="from")] = None
    """a run to take the first weights from"""
    from_part: str | None = None
    """which part of it the start of tuning is; policy: what it was tuned to; by default its own start"""
    config_file: Annotated[Path | None, arg(name="config")] = None
    """a JSON file of fields, or a run's run.json; what is typed goes before it"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps"""
    processes: int = 1
    """how many processes share each batch on this machine"""
    checkpoint_steps: int | None = None
    """save every so many steps; by default every 30 seconds"""


def train(words: list[str]) -> int:
    """Train a system: foveate train SYSTEM [fields]."""
    if not words or words[0] in ("-h", "--help"):
        print("usage: foveate train SYSTEM [fields]; `foveate train SYSTEM --help` names the fields of a system\n")
        return list_systems([])
    system, *rest = words
    if system not in SYSTEMS:
        return _complain(f"system: no {system!r}; did you mean {_nearest(system, SYSTEMS)!r}? `foveate list` names all")
    from foveate import agents, commands

    kind = agents.system_module(system).Config
    default = kind()
    file = _parse_known(Options, rest).config_file
    if file is not None:
        default = agents.config_from_file(system, file)
    both: Any = make_dataclass("Train", [("options", Options, Options()), ("config", kind, default)], frozen=True)
    parsed = _parse(both, f"train {system}", rest, agents.system_module(system).__doc__)
    options = parsed.options
    if options.processes < 1:
        return _complain(f"processes: found {options.processes}, expected at least 1")
    if options.processes > 1 and "WORLD_SIZE" not in os.environ:
        return launch(options.processes, ["train", *words])
    taken = ("out", "overwrite", "source", "from_part", "device", "checkpoint_steps")
    commands.train(system, **{name: getattr(options, name) for name in taken}, **vars(parsed.config))
    return 0


@dataclass(frozen=True)
class _OfARun:
    """What every command on a finished or stopped run takes."""

    run: Positional[Path]
    """folder of the run"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps"""


@dataclass(frozen=True)
class Resume(_OfARun):
    """Go on with a run that was stopped, from its last good checkpoint."""


def resume(words: list[str]) -> int:
    """Go on with a run that was stopped."""
    asked = _parse(Resume, "resume", words)
    from foveate import agents, commands

    processes = agents.processes_of(asked.run)
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        return launch(processes, ["resume", *words])
    commands.resume(asked.run, asked.device)
    return 0


@dataclass(frozen=True)
class Evaluate(_OfARun):
    """Score a run's agent beside its baselines, on test data of its own or on data it never saw."""

    data: str | None = None
    """another data set; scored on its split test if there is one, else val, else all"""
    root: Path | None = None
    """folder of that data"""
    json: bool = False
    """print one JSON object and nothing else"""


def evaluate(words: list[str]) -> int:
    """Score a run's agent beside its baselines."""
    asked = _parse(Evaluate, "eval", words)
    from foveate import commands

    found = commands.evaluate(asked.run, asked.data, asked.root, asked.device)
    if asked.json:
        print(json.dumps({"metrics": found.metrics, "baselines": found.baselines}))
    else:
        print_table({"trained": found.metrics, **found.baselines})
    return 0


@dataclass(frozen=True)
class Show(_OfARun):
    """Draw what a run's agent does, on test pictures or on your own."""

    images: Positional[Path | None] = None
    """a picture, or a folder of pictures"""


def show(words: list[str]) -> int:
    """Draw what a run's agent does, on your own pictures too."""
    asked = _parse(Show, "show", words)
    from foveate import commands

    for path in commands.show(asked.run, asked.images, asked.device):
        print(path)
    return 0


@dataclass(frozen=True)
class Analyse(_OfARun):
    """Draw what tuning did: rewards of many answers, best of N, and the reward against the metric."""

    samples: int = 1000
    """answers to each input; the paper has 10,000"""
    images: int = 8
    """held-out inputs"""


def analyse(words: list[str]) -> int:
    """Draw what tuning did to a model."""
    asked = _parse(Analyse, "analyse", words)
    from foveate import commands

    numbers, files = commands.analyse(asked.run, asked.samples, asked.images, asked.device)
    print_table(numbers)
    for path in files:
        print(path)
    return 0


@dataclass(frozen=True)
class Prefer(_OfARun):
    """Compare a run's answers, two to one input: on a page in the browser, or by a script. It goes on where it was.

    Comparisons are kept in the folder preferences of the run.
    """

    judge: str | None = None
    """a script answers in place of people: colorfulness, vivid, sharpness, compressibility, incompressibility, or
    package.module:function of pictures"""
    comparisons: int = 300
    """how many there are to be at the end"""
    noise: float = 0.1
    """of a script: probability that it answers the other way round"""
    choose: Literal["random", "uncertain"] = "random"
    """pairs by chance, or those about which a model of the comparisons so far is the least certain"""
    part: str | None = None
    """of the checkpoint, which model answers; by default the start that tuning begins from; policy: the tuned one"""
    question: str | None = None
    """what is asked above the pictures; "Which one is better?" if not given"""
    inputs: int = 500
    """training inputs that are answered"""
    seed: int = 0
    """of the draws, and of a script's errors"""
    host: str = "127.0.0.1"
    """address of the page: by default it can be reached from this machine alone"""
    port: int = 7860
    """of the page; 0: any that is free"""


def prefer(words: list[str]) -> int:
    """Compare a run's answers two by two, on a page or by a script."""
    asked = _parse(Prefer, "prefer", words)
    shared = {name: getattr(asked, name) for name in ("comparisons", "choose", "part", "question", "inputs", "seed")}
    if asked.judge is None:
        from foveate.studio.prefer import serve

        serve(asked.run, host=asked.host, port=asked.port, device=asked.device, **shared)
        return 0
    from foveate import commands

    print_table(
        {"answers": commands.prefer(asked.run, judge=asked.judge, noise=asked.noise, device=asked.device, **shared)}
    )
    return 0


@dataclass(frozen=True)
class Compare:
    """Lay the curves of runs over each other."""

    runs: Positional[tuple[Path, ...]]
    """folders of the runs"""
    out: Path = Path("compare.png")
    """the picture to write"""


def compare(words: list[str]) -> int:
    """Lay the curves of runs over each other."""
    asked = _parse(Compare, "compare", words)
    from foveate import commands

    print(commands.compare(asked.runs, asked.out))
    return 0


def data(words: list[str]) -> int:
    """Check data: foveate data check [SYSTEM] [fields]."""
    if not words or words[0] != "check":
        return _complain(
            "data: expected `foveate data check [SYSTEM] [fields]`, e.g. foveate data check ram --data digits"
        )
    rest = words[1:]
    system = rest.pop(0) if rest and not rest[0].startswith("-") else "ram"
    if system not in SYSTEMS:
        return _complain(f"system: no {system!r}; did you mean {_nearest(system, SYSTEMS)!r}? `foveate list` names all")
    from foveate import agents, commands

    kind = agents.system_module(system).Config
    both: Any = make_dataclass("Check", [("out", Path, Path("data-check")), ("config", kind, kind())], frozen=True)
    parsed = _parse(both, f"data check {system}", rest, "Draw the first inputs of a system's data with their targets.")
    for path in commands.check_data(parsed.config, system, parsed.out):
        print(path)
    return 0


@dataclass(frozen=True)
class Bench:
    """Measure speed against peers on the same work in one process."""

    names: Positional[tuple[str, ...]] = ()
    """rows to measure; all if none is named"""
    json: bool = False
    """print one JSON object and nothing else"""


def bench(words: list[str]) -> int:
    """Measure speed against peers in one process."""
    asked = _parse(Bench, "bench", words)
    from foveate import commands

    rows = commands.bench(asked.names)
    if asked.json:
        print(json.dumps({"rows": rows}))
    else:
        print_table({row.pop("name"): row for row in rows})
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "list": list_systems,
    "train": train,
    "eval": evaluate,
    "show": show,
    "resume": resume,
    "prefer": prefer,
    "compare": compare,
    "analyse": analyse,
    "data": data,
    "bench": bench,
}


@dataclass(frozen=True)
class _Nothing:
    """This command takes no options."""


def _parse(kind: type[C], command: str, words: list[str], description: str | None = None) -> C:
    return tyro.cli(kind, args=words, prog=f"foveate {command}", description=description, config=(OmitArgPrefixes,))


def _parse_known(kind: type[C], words: list[str]) -> C:
    """Read some options before all of them are known; a plea for help is left for later."""
    words = [word for word in words if word not in ("-h", "--help")]
    return tyro.cli(kind, args=words, return_unknown_args=True)[0]


def _nearest(word: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(word, list(known), 1, cutoff=0.0)[0]


def _complain(message: str, code: int = 2) -> int:
    print(f"foveate: {message}", file=sys.stderr)
    return code
