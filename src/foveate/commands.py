"""What the commands do, callable from Python: train, resume, evaluate, show, analyse, prefer, compare, check, bench.

agent = foveate.train("ram", variant="plain", minutes=3)
"""

from __future__ import annotations

import difflib
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from foveate import agents, pictures, plots, report
from foveate.analysis import along_training, compare_models, findings, looks_at_reward, reward_curves, still_learning
from foveate.data.comparisons import Comparisons
from foveate.preferring import Asked, Choose, collect_by_script, opened
from foveate.rewards.named_images import picture_score
from foveate.run import Run
from foveate.run.checkpoints import write_atomically
from foveate.run.folder import check_budget, check_free
from foveate.systems import SYSTEMS
from foveate.types import Evaluation, InputError, map_tree


def train(
    system: str,
    *,
    out: Path | str | None = None,
    overwrite: bool = False,
    source: Path | str | None = None,
    from_part: str | None = None,
    device: str = "auto",
    checkpoint_steps: int | None = None,
    **settings: Any,
) -> agents.Agent:
    """Train a system, score it, and write its pictures and report.

    Args:
        system: its name, as in `foveate list`.
        out: the run's folder; runs/SYSTEM-DATE-TIME if not given.
        overwrite: delete a run that is already there.
        source: a run to take the first weights from.
        from_part: which part of that run the start of tuning is, e.g. "policy", what it was tuned to; None: its start.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        checkpoint_steps: save every so many steps; by default every 30 seconds.
        **settings: fields of the system's `Config`, e.g. `minutes=3`.

    Raises:
        InputError: a field is out of its range, the data cannot be read, or the source has no such part.
    """
    module = agents.system_module(system)
    starts = {} if from_part is None else {_start_of(module, system, source): from_part}
    given = agents.config_from(system, settings, "train")
    _check_root(given.data, given.root)
    folder = Path(out) if out else Path("runs") / f"{system}-{datetime.now():%Y%m%d-%H%M%S}"
    check_budget(given.steps, given.minutes)  # these two before the data are read, which can take minutes
    check_free(folder, overwrite)
    config = module.resolve(given)
    run = Run(
        folder,
        system=system,
        config=asdict(config),
        seed=config.seed,
        steps=config.steps,
        minutes=config.minutes,
        device=device,
        checkpoint_steps=checkpoint_steps,
        overwrite=overwrite,
        source=None if source is None else Path(source),
        source_parts=starts,
    )
    for entry in fields(config):
        if getattr(given, entry.name) is None and getattr(config, entry.name) is not None:
            run.say(f"{entry.name} = {_plain(getattr(config, entry.name))} (chosen by the data)")
    return _train(module, config, run)


def _start_of(module: ModuleType, system: str, source: Path | str | None) -> str:
    """The part that tuning begins from, for a run that is to take it from another part of a source."""
    if source is None:
        raise InputError("from_part: given, but no run to take it from; name it with --from RUN")
    if not hasattr(module, "compared"):
        raise InputError(f"from_part: {system} is not tuned from a start; leave it out")
    part: str = next(iter(module.ROWS.values()))
    return part


def resume(folder: Path | str, device: str = "auto") -> agents.Agent:
    """Go on with a run from its last good checkpoint, to the end of the budget it was begun with."""
    record, module, config = agents.opened(folder, "cpu")
    run = Run(Path(folder), system=record.system, config=asdict(config), seed=config.seed, device=device, resume=True)
    return _train(module, config, run)


def _train(module: ModuleType, config: Any, run: Run) -> agents.Agent:
    module.train(config, run)
    if run.is_main:
        policy = agents.policy_of(module, config, run)
        run.say("scoring")
        evaluation = module.evaluate(config, policy, run)
        _save_evaluation(run.folder, evaluation)
        drawn = _save_pictures(run.folder / "pictures", module.picture(config, policy, run))
        path = _write_report(config, run, evaluation, drawn)
        run.say(f"report: {path}")
    return agents.load(run.folder, str(run.device))


def evaluate(
    folder: Path | str, data: str | None = None, root: Path | str | None = None, device: str = "auto"
) -> Evaluation:
    """Score a run's agent and its baselines on test data.

    With `data` or `root` the agent is scored on data it was not trained on: the split test if there is one, else val,
    else all. The scores are written to `evaluation.json` of the run's folder, those on other data to
    `evaluation-NAME.json`, by the name of the folder or of the data.
    """
    run, module, config = agents.opened(folder, device)
    policy = agents.policy_of(module, config, run)
    there = replace(config, data=data or config.data, root=Path(root) if root else config.root)
    _check_root(there.data, root)
    if (there.data, _absolute(there.root)) == (config.data, _absolute(config.root)):
        evaluation = module.evaluate(config, policy, run)
        _save_evaluation(run.folder, evaluation)
        return evaluation
    evaluation = module.evaluate(there, policy, run, elsewhere=True)
    _save_evaluation(run.folder, evaluation, f"evaluation-{Path(root).resolve().name if root else there.data}.json")
    return evaluation


def show(folder: Path | str, images: Path | str | None = None, device: str = "auto") -> list[Path]:
    """Draw what a run's agent does, on test pictures or on the user's own; returns the files written."""
    run, module, config = agents.opened(folder, device)
    policy = agents.policy_of(module, config, run)
    if images is None:
        return list(_save_pictures(run.folder / "pictures", module.picture(config, policy, run)).values())
    path = Path(images).resolve()  # "." has a name, too
    shown = map_tree(lambda leaf: leaf.to(run.device), module.read(config, Path(images)))
    drawn = module.picture(config, policy, run, shown)
    name = path.name if path.is_dir() else path.stem
    return list(_save_pictures(run.folder / "pictures" / name, drawn).values())


def analyse(
    folder: Path | str, samples: int = 1000, images: int = 8, device: str = "auto"
) -> tuple[dict[str, dict[str, float]], list[Path]]:
    """Draw what tuning did to a model: many answers of the start and of the tuned model to a few held-out inputs.

    Three figures (Pinto et al. 2023, section 5): how the rewards of answers are distributed, the best hundredth marked;
    the reward against the field's metric along the training (or the reward alone, where nothing else was looked at);
    and what N answers are worth by their best and by their most probable one, N up to `samples`. They are written to
    the run's folder `analysis`.

    Returns:
        The numbers of each model, and the files.

    Raises:
        InputError: a system that tunes nothing, or fewer than 100 samples.
    """
    run, module, config = agents.opened(folder, device)
    if not hasattr(module, "compared"):
        raise InputError(
            f"{folder}: {run.system} is not tuned from a start; analyse runs of detection, captioning, ..."
        )
    if samples < 100:
        raise InputError(f"samples: found {samples}, expected at least 100, as the best hundredth is looked at")
    first, *_ = module.ROWS.items()  # its start
    models: dict[str, Any] = {
        name: agents.policy_of(module, config, run, part) for name, part in (first, ("tuned", module.PART))
    }
    reward, inputs, targets = module.compared(config, models["tuned"], run, images)
    numbers, values, curves = compare_models(models, reward, inputs, targets, samples, run.seed)
    drawn: dict[str, Any] = {
        "rewards of answers": plots.histogram(values, "reward"),
        "best of N": plots.line_plot(curves, "N answers", "reward", logx=True),
    }
    rows = _metrics(run.folder)
    if along := along_training(rows):
        drawn["reward against metric"] = plots.line_plot(along, "held-out reward", "held-out metric", dots=True)
    elif looks := looks_at_reward(rows):  # nothing else was measured: no metric is made up
        drawn["reward along training"] = plots.line_plot(looks, "step of the phase", "held-out reward", dots=True)
    return numbers, list(_save_pictures(run.folder / "analysis", drawn).values())


def prefer(
    folder: Path | str,
    *,
    judge: str,
    comparisons: int = 300,
    noise: float = 0.1,
    choose: Choose = "random",
    part: str | None = None,
    question: str | None = None,
    inputs: int = 500,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, int]:
    """Let a scripted judge compare a run's answers, in place of people on the page of `foveate prefer`.

    Args:
        folder: of the run.
        judge: the hidden score: "colorfulness", "vivid", "sharpness", "compressibility", "incompressibility", or
            package.module:function of pictures.
        comparisons: how many there are to be at the end, those that are there already among them.
        noise: probability that an answer is the other way round.
        choose: "random" pairs, or the most "uncertain" ones.
        part: of the checkpoint, which model answers; None: the start that tuning begins from.
        question: what is asked; kept with the first comparison.
        inputs: how many training inputs are answered.
        seed: of the draws and the errors.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".

    Returns:
        How many of each answer there are.

    Raises:
        InputError: a system whose answers are no pictures, no such judge, comparisons of another run or version.
    """
    store, asked = preferences(folder, part, question, inputs, seed, device)
    return collect_by_script(store, asked, picture_score(judge), judge, comparisons, choose=choose, flip=noise)


def preferences(
    folder: Path | str, part: str | None, question: str | None, inputs: int, seed: int, device: str
) -> tuple[Comparisons, Asked]:
    """Where the comparisons of a run's answers are kept, and what answers; as `prefer` says."""
    run, module, config = agents.opened(folder, device)
    if not hasattr(module, "posed"):
        raise InputError(
            f"{folder}: the answers of {run.system} are not compared; name a run of colorization or diffusion"
        )
    if inputs < 1:
        raise InputError(f"inputs: found {inputs}, expected at least 1")
    policy: Any = agents.policy_of(module, config, run, part or next(iter(module.ROWS.values())))
    posed, shown = module.posed(config, run, inputs)
    return opened(Path(folder), question, make=True), Asked(policy, posed, shown, seed)


def compare(folders: Sequence[Path | str], out: Path | str) -> Path:
    """Lay the curves of several runs over each other in one picture."""
    rows = {}
    for folder in map(Path, folders):
        run = Run.open(folder)
        rows[folder.name if folder.name not in rows else str(folder)] = _metrics(run.folder)
    drawn = plots.compare_curves(rows)
    if drawn is None:
        raise InputError(f"{', '.join(map(str, folders))}: no metric is in the logs of these runs yet")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    try:
        drawn.save(out)
    except ValueError as error:
        raise InputError(f"out: {out} names no kind of picture ({error}); call it {Path(out).stem}.png") from error
    return Path(out)


def check_data(config: Any, system: str, out: Path | str) -> list[Path]:
    """Draw the first inputs of a system's data with their targets."""
    module = agents.system_module(system)
    _check_root(config.data, config.root)
    return list(_save_pictures(Path(out), module.check(module.resolve(config))).values())


def bench(names: Sequence[str]) -> list[dict[str, Any]]:
    """Measure rows of the benchmarks in the source checkout: name, ours, peer, ratio, unit.

    Raises:
        InputError: there is no such row, or no checkout.
    """
    folder = Path(__file__).parents[2] / "benchmarks"
    if not folder.is_dir():
        raise InputError("bench: the benchmarks are in the source checkout; clone it and install with pip install -e .")
    sys.path.insert(0, str(folder.parent))
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.py")):
        module = importlib.import_module(f"benchmarks.{path.stem}")
        found.update(getattr(module, "ROWS", {}))
    for name in names:
        if name not in found:
            nearest = difflib.get_close_matches(name, found, 1, cutoff=0.0)[0]
            raise InputError(f"bench: no row {name!r}; did you mean {nearest!r}? There are: {', '.join(found)}")
    rows = []
    for name in names or found:
        ours, peer, unit = found[name]()
        rows.append({"name": name, "ours": ours, "peer": peer, "ratio": ours / peer, "unit": unit})
    return rows


def _check_root(data: str, root: Path | str | None) -> None:
    """A folder that would not be looked at is a forgotten --data; nobody wants to learn that from the pictures."""
    if root is not None and data in ("digits", "grid", "photographs", "scenes", "template"):
        raise InputError(
            f"root: {root} would not be read, as data {data!r} needs no folder; name what it holds: --data"
        )


def _absolute(root: Path | None) -> Path | None:
    return None if root is None else root.resolve()


def _save_evaluation(folder: Path, evaluation: Evaluation, name: str = "evaluation.json") -> None:
    write_atomically(folder / name, json.dumps(asdict(evaluation), indent=1).encode())


def _save_pictures(folder: Path, drawn: dict[str, Any]) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, picture in drawn.items():
        moving = isinstance(picture, list)
        files[name] = folder / f"{name.replace(' ', '-')}.{'gif' if moving else 'png'}"
        if moving:
            pictures.save_gif(files[name], picture)
        else:
            picture.save(files[name])
    return files


def _write_report(config: Any, run: Run, evaluation: Evaluation, drawn: dict[str, Path]) -> Path:
    shown, summary, rows = dict[str, Any](drawn), [SYSTEMS[run.system]], _metrics(run.folder)
    if hasattr(module := agents.system_module(run.system), "compared"):
        phase = "reward" if any(row["phase"] == "reward" for row in rows) else module.PART
        tuned = [row for row in rows if row["phase"] == phase]
        if any(row.get("reward") is not None for row in tuned):
            summary += [*findings(tuned), *still_learning(evaluation)]
            shown |= reward_curves(tuned)
    for name, series in evaluation.curves.items():
        value, over = name.split(" against ")
        shown[name] = plots.line_plot(series, over, value)
    curves = plots.training_curves(rows)
    if curves is not None:
        shown["training"] = curves
    path = run.folder / "report.html"
    words = report.command(run.system, config, run.source, run.source_part)
    report.write_report(path, run.system, "\n\n".join(summary), evaluation, shown, asdict(config), words)
    return path


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may have cut the last one


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
