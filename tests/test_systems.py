"""One test over every system: the names its file must have, and what `foveate train` makes of it."""

import ast
import dataclasses
import inspect
import json
import math
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
import tyro
from torch import nn

import foveate
from foveate import agents, commands, report
from foveate.cli import main
from foveate.run import Run
from foveate.systems import SYSTEMS
from foveate.types import InputError

QUICK = {
    "seednet": {"scenes": 20, "image_size": 20, "copies": 4, "rows": 6, "batch": 4, "width": 8, "depth": 1, "draws": 1},
    "tune-detector": {"batch": 4, "scenes": 32, "image_size": 32, "width": 16, "samples": 2, "candidates": 4},
    "ram": {"batch": 16, "variant": "plain", "glimpses": 3},
    "detection": {"image_size": 16, "scenes": 64, "width": 16, "depth": 1, "batch": 4, "tuning_batch": 2, "most": 5},
    "captioning": {
        "image_size": 16,
        "scenes": 64,
        "width": 16,
        "depth": 1,
        "batch": 4,
        "tuning_batch": 4,
        "samples": 2,
    },
    "colorization": {"image_size": 16, "width": 16, "depth": 1, "code_width": 8, "batch": 4, "tuning_batch": 2},
    "sequential-detection": {
        "image_size": 32,
        "scenes": 40,
        "patch": 6,
        "hidden": 16,
        "batch": 4,
        "samples": 2,
        "glimpses": 3,
    },
    "panoptic": {
        "image_size": 16,
        "scenes": 64,
        "width": 16,
        "depth": 1,
        "code_width": 8,
        "batch": 4,
        "tuning_batch": 2,
        "samples": 2,
    },
    "localization": {"image_size": 16, "scenes": 40, "width": 8, "hidden": 16, "bins": 3, "batch": 8, "copies": 4},
    "landmarks": {
        "spacing": 8.0,
        "warps": 4,
        "copies": 8,
        "rows": 50,
        "batch": 8,
        "starts": 1,
        "side": 8,
        "registrations": 1,
    },
    "cutting": {"image_size": 32, "scenes": 4, "length": 4, "crop": 8, "width": 4, "patch": 8, "copies": 4, "batch": 4},
    "registration": {
        "image_size": 32,
        "pairs": 8,
        "held_out": 4,
        "horizon": 4,
        "width": 8,
        "copies": 2,
        "segment": 2,
        "batch": 4,
        "look_ahead": 2,
        "depth": 2,
    },
    "diffusion": {
        "widths": (8, 16),
        "image_size": 8,
        "denoising": 3,
        "batch": 4,
        "inputs": 2,
        "samples": 2,
        "looks": 20,
        "images": 20,
        "anchors": (0.0,),
    },
    "adversarial": {"batch": 4, "strokes": 2, "looks": 20, "images": 20},
    "foveating-grid": {"batch": 16, "episodes": 200},
    "tune-captioner": {"scenes": 64, "image_size": 16, "width": 16, "depth": 1, "batch": 4, "tuning_batch": 4},
    "tracking": {"scenes": 1, "image_size": 32, "patch": 12, "hidden": 16, "batch": 8, "copies": 8, "horizon": 2},
    "reward-model": {"pairs": 40, "batch": 4, "width": 2, "members": 2},
    "tune-segmenter": {"batch": 4, "looks": 4, "image_size": 24, "width": 8},
}
NAMES = ("Config", "PART", "resolve", "build", "train", "evaluate", "predict", "picture", "read", "check")


@pytest.fixture(scope="module", params=sorted(SYSTEMS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> agents.Agent:
    folder = tmp_path_factory.mktemp(request.param) / "run"
    return foveate.train(request.param, steps=3, out=folder, device="cpu", **QUICK[request.param])


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_the_file_opens_with_the_decision_process_and_has_the_names(system: str) -> None:
    module = agents.system_module(system)
    for name in NAMES:
        assert hasattr(module, name), name
    for row in ("state", "action", "reward", "horizon", "learner", "corner"):
        assert f"| {row} |" in module.__doc__
    assert f"foveate train {system}" in module.__doc__
    assert len(inspect.getsource(module).splitlines()) <= 350


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_every_field_has_a_default_and_a_line_of_help(system: str) -> None:
    config = agents.system_module(system).Config
    assert config.__dataclass_params__.frozen
    config()
    body = ast.parse(inspect.getsource(config)).body[0].body[1:]
    fields, helps = body[0::2], body[1::2]
    assert [entry.target.id for entry in fields] == [entry.name for entry in dataclasses.fields(config)]
    assert all(isinstance(line.value.value, str) and line.value.value.strip() for line in helps)
    assert {"data", "root", "seed", "steps", "minutes"} <= {entry.name for entry in dataclasses.fields(config)}


def test_scores_stand_beside_baselines_and_are_finite(trained: agents.Agent) -> None:
    found = json.loads((trained.folder / "evaluation.json").read_text())
    assert found["metrics"]
    assert found["baselines"]
    for row in (found["metrics"], *found["baselines"].values()):
        assert row
        for name, value in row.items():
            assert math.isfinite(value)
            assert report.direction(name), f"{name}: add its word to report.LOWER_IS_BETTER or HIGHER_IS_BETTER"


def test_what_is_tuned_from_a_start_is_analysed(trained: agents.Agent) -> None:
    module = agents.system_module(Run.open(trained.folder).system)
    assert hasattr(module, "compared") == hasattr(module, "ROWS")
    if hasattr(module, "compared"):
        numbers, files = commands.analyse(trained.folder, samples=100, images=1)
        assert list(numbers) == [next(iter(module.ROWS)), "tuned"]
        assert {"rewards-of-answers.png", "best-of-N.png"} <= {path.name for path in files}


@pytest.mark.parametrize("system", ["detection", "tune-segmenter"])
def test_tuning_goes_on_from_what_another_run_was_tuned_to(system: str, tmp_path: Path) -> None:
    """With no share for likelihood and a learning rate of 0 the agent ends as that run's, not as its start."""
    module = agents.system_module(system)
    config = module.resolve(module.Config(**QUICK[system]))
    start, tuned = (module.build(config) for _ in range(2))
    source = Run(tmp_path / "source", system=system, config={}, steps=1, device="cpu", quiet=True)
    source.track(likelihood=start, policy=tuned)
    list(source.steps())
    go = partial(foveate.train, system, steps=1, device="cpu", source=source.folder, likelihood_share=0.0)
    go = partial(go, tuning_rate=0.0, **QUICK[system])
    assert not same(start, tuned)
    assert same(go(out=tmp_path / "again").policy, start)
    assert same(go(out=tmp_path / "on", from_part="policy").policy, tuned)
    with pytest.raises(InputError, match=r"has no part 'polic' for likelihood to begin with; it has likelihood, pol"):
        go(out=tmp_path / "wrong", from_part="polic")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    "system",
    ["captioning", "colorization", "detection", "panoptic", "tune-captioner", "tune-detector", "tune-segmenter"],
)
def test_numbers_with_which_nothing_can_be_tuned_are_named_at_once(system: str) -> None:
    module = agents.system_module(system)
    config = module.Config(**QUICK[system])
    wrong = {
        "batch": 0,
        "tuning_batch": 0,
        "every": 0,
        "samples": 0,
        "tuning_rate": -1.0,
        "anchor": -0.5,
        "jitter": -1.0,
    }
    wrong |= {"learning_rate": math.nan, "patch": 0, "width": -8, "scenes": 0, "stride": 0}
    for name in wrong.keys() & {entry.name for entry in dataclasses.fields(config)}:
        with pytest.raises(InputError, match=f"^{name}: found {wrong[name]:g}"):
            module.resolve(dataclasses.replace(config, **{name: wrong[name]}))


@pytest.mark.parametrize("system", ["tune-detector", "tune-segmenter"])
def test_half_precision_leaves_the_ratio_at_one(system: str, tmp_path: Path) -> None:
    agent = foveate.train(system, steps=8, device="cpu", out=tmp_path / "run", precision="bf16", **QUICK[system])
    rows = [json.loads(line) for line in (agent.folder / "metrics.jsonl").open()]
    ratios = [row["ratio"] for row in rows if row.get("ratio") is not None]
    assert ratios == pytest.approx([1.0] * len(ratios), abs=1e-5)
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in agent.policy.parameters())


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_what_a_start_is_taken_from_is_asked_for(tmp_path: Path) -> None:
    how = {"steps": 1, "device": "cpu", "out": tmp_path / "run"}
    with pytest.raises(InputError, match=r"^from_part: given, but no run to take it from; name it with --from RUN"):
        foveate.train("detection", from_part="policy", **how, **QUICK["detection"])
    with pytest.raises(InputError, match=r"^from_part: ram is not tuned from a start"):
        foveate.train("ram", source=tmp_path, from_part="policy", **how, **QUICK["ram"])
    with pytest.raises(InputError, match=r"^likelihood_share: 0, but no run to take it from; add --from RUN"):
        foveate.train("detection", likelihood_share=0.0, **how, **QUICK["detection"])


def test_the_report_shows_pictures_and_curves(trained: agents.Agent) -> None:
    page = (trained.folder / "report.html").read_text()
    assert page.count("data:image/") >= 2
    if hasattr(agents.system_module(trained.system), "compared"):
        assert "The reward of drawn answers w" in page, "it says whether the curve is normal"
        assert "<figcaption>reward</figcaption>" in page
    assert any(path.suffix == ".png" for path in (trained.folder / "pictures").iterdir())


def test_the_policy_is_rebuilt_from_its_run(trained: agents.Agent) -> None:
    module = agents.system_module(trained.system)
    torch.manual_seed(1)
    fresh = module.build(trained.config).state_dict()
    there = foveate.load(trained.folder, "cpu").policy.state_dict()
    assert {name: value.shape for name, value in fresh.items()} == {name: value.shape for name, value in there.items()}
    assert any(not torch.equal(fresh[name], there[name]) for name in fresh)


def test_the_same_seed_gives_the_same_agent_and_another_seed_another(trained: agents.Agent, tmp_path: Path) -> None:
    settings = {"steps": 3, "device": "cpu", **QUICK[trained.system]}
    again = foveate.train(trained.system, out=tmp_path / "again", **settings)
    other = foveate.train(trained.system, out=tmp_path / "other", seed=1, **settings)
    state = trained.policy.state_dict()
    assert all(torch.equal(state[name], value) for name, value in again.policy.state_dict().items())
    assert any(not torch.equal(state[name], value) for name, value in other.policy.state_dict().items())


def test_the_commands_take_its_run(trained: agents.Agent, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(trained.folder), "--json"]) == 0
    found = json.loads((trained.folder / "evaluation.json").read_text())
    assert json.loads(capsys.readouterr().out) == {"metrics": found["metrics"], "baselines": found["baselines"]}
    assert main(["show", str(trained.folder)]) == 0
    assert all(Path(line).stat().st_size > 0 for line in capsys.readouterr().out.splitlines())
    assert main(["data", "check", trained.system, "--out", str(tmp_path)]) == 0
    assert list(tmp_path.glob("*.png"))


def test_the_command_of_a_run_makes_its_config_again() -> None:
    """What the report prints can be typed."""
    module = agents.system_module("tune-segmenter")
    config = module.Config(skip_bad=True, flip=False, classes=("teddy bear", "cup"), root=Path("a b"), minutes=2.5)
    words = shlex.split(report.command("tune-segmenter", config, "/runs/my start", "control"))
    assert {"--skip-bad", "--no-flip", "--classes", "teddy bear", "cup"} <= set(words)
    assert words[-4:] == ["--from", "/runs/my start", "--from-part", "control"]
    assert tyro.cli(module.Config, args=words[3:-4]) == config


@pytest.mark.parametrize(
    ("system", "more"),
    [(name, {}) for name in ("localization", "tracking", "landmarks", "seednet", "cutting")]
    + [("localization", {"target": "each"})],
)
def test_an_agent_that_was_stopped_ends_as_one_that_was_not(
    system: str, more: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it acts, its replay filled: the weights are equal to the last bit."""
    module = agents.system_module(system)
    config = module.resolve(module.Config(**QUICK[system], **more, steps=36))
    kept = {"system": system, "config": {}, "steps": 36, "device": "cpu", "checkpoint_steps": 6, "quiet": True}
    whole, cut = (Run(tmp_path / name, **kept) for name in ("whole", "cut"))
    module.train(config, whole)
    log, calls = Run.log, []

    def stopped(run: Run, **told: object) -> None:
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        log(run, **told)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "log", stopped)
        with pytest.raises(KeyboardInterrupt):
            module.train(config, cut)
    again = Run(tmp_path / "cut", **{**kept, "resume": True})
    module.train(config, again)
    ends = [module.build(config).state_dict() for _ in range(2)]
    for run, end in zip((whole, again), ends, strict=True):
        policy = module.build(config)
        assert run.restore(module.PART, policy)
        end.update(policy.state_dict())
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
