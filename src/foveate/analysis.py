"""What tuning did to a model, from many answers to a few inputs: the figures of Pinto et al. 2023, section 5.

rewards, log_probs = draw_answers(policy, reward, inputs, targets, samples=1000, seed=0)
best_of(rewards), likeliest_of(rewards, log_probs)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate import noise, plots, report
from foveate.learn.answers import Reward, answering, log_prob, repeat
from foveate.types import Evaluation, Sampler, Tree, split

AT_ONCE = 256  # answers drawn in one pass


@torch.no_grad()
def draw_answers(
    policy: Sampler, reward: Reward, inputs: Tree, targets: Tree, samples: int, seed: int
) -> tuple[Float[Tensor, "batch samples"], Float[Tensor, "batch samples"]]:
    """Rewards of so many answers to each input, and their log-probabilities in nats.

    Args:
        policy: what answers.
        reward: (predictions, targets) → a score for each answer.
        inputs: tree whose tensors begin with the batch.
        targets: the same.
        samples: answers to each input.
        seed: of the draws.
    """
    device = next(policy.parameters()).device
    rewards, log_probs = [], []
    with answering(policy):
        for row, (some, wanted) in enumerate(split((inputs, targets), 1)):
            mine, logs = [], []
            for first in range(0, samples, AT_ONCE):
                count = min(AT_ONCE, samples - first)
                keys = noise.key(seed, "analysis", row, torch.tensor([first])).to(device)
                actions = policy.sample(some, count, False, keys)
                mine.append(reward(policy.decode(actions), repeat(wanted, count)).total)
                logs.append(log_prob(policy, some, actions))
            rewards.append(torch.cat(mine))
            log_probs.append(torch.cat(logs))
    return torch.stack(rewards), torch.stack(log_probs)


def compare_models(
    models: Mapping[str, Sampler], reward: Reward, inputs: Tree, targets: Tree, samples: int, seed: int
) -> tuple[dict[str, dict[str, float]], dict[str, list[float]], dict[str, list[tuple[float, float]]]]:
    """Of every model: its numbers, the rewards of all its answers, and what N answers are worth, as points (N, reward).

    The arguments are those of `draw_answers`, for several models by their names.
    """
    numbers, values = {}, {}
    curves: dict[str, list[tuple[float, float]]] = {}
    sizes = sorted({min(samples, round(1.2**power)) for power in range(math.ceil(math.log(samples, 1.2)) + 1)})
    for name, model in models.items():
        rewards, log_probs = draw_answers(model, reward, inputs, targets, samples, seed)
        best, likeliest = best_of(rewards).tolist(), likeliest_of(rewards, log_probs).tolist()
        values[name] = rewards.flatten().tolist()
        top = sorted(values[name])[-max(1, rewards.numel() // 100) :]
        numbers[name] = {
            "mean": float(rewards.mean()),
            "best hundredth": sum(top) / len(top),
            f"best of {samples}": best[-1],
            f"likeliest of {samples}": likeliest[-1],
        }
        curves[f"{name}, best"] = [(float(size), best[size - 1]) for size in sizes]
        curves[f"{name}, likeliest"] = [(float(size), likeliest[size - 1]) for size in sizes]
    return numbers, values, curves


def along_training(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Held-out reward and metric at each look of a run's log, for every phase that has both."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        names = [name for name in row if name.startswith("held_out_") and name != "held_out_reward"]
        if names and row.get("held_out_reward") is not None:
            found.setdefault(row["phase"], []).append((row["held_out_reward"], row[names[0]]))
    return found


def looks_at_reward(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Step and held-out reward at each look of a run's log, for every phase that has it."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get("held_out_reward") is not None:
            found.setdefault(row["phase"], []).append((float(row["step"]), row["held_out_reward"]))
    return found


def curve_page(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write report.html of a run of `foveate.tune`: what the curve shows, the reward against the KL, all curves.

    Args:
        folder: of the run, with its metrics.jsonl.
        config: its settings.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    series, shown = _rewards(rows), reward_curves(rows)
    if (curves := plots.training_curves(rows)) is not None:
        shown["training"] = curves
    scores = {name: [reward for _, reward in points] for name, points in series.items()}
    table = Evaluation(
        {
            f"reward of {name}": max(values) if name != "drawn answers" else values[-1]
            for name, values in scores.items()
        },
        {"at the start": {f"reward of {name}": values[0] for name, values in scores.items()}},
    )
    path = folder / "report.html"
    command = "foveate.tune(model, reward, batches, ...)"
    report.write_report(path, "Tuned on a reward", "\n\n".join(findings(rows)), table, shown, config, command)
    return path


def _rewards(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Points (step, reward) of drawn answers, and of greedy ones to held-out inputs if there are any."""
    named = {"drawn answers": "reward", "greedy, held out": "held_out_reward"}
    found = {
        what: [(float(row["step"]), row[name]) for row in rows if row.get(name) is not None]
        for what, name in named.items()
    }
    return {what: points for what, points in found.items() if points}


def reward_curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The reward along the steps of a tuning, and against the KL to the start if that was logged: name → picture."""
    shown = {"reward": plots.line_plot(_rewards(rows), "step", "reward")}
    if against := [(row["kl"], row["reward"]) for row in rows if row.get("kl") is not None]:
        title = "the price of the reward"
        shown["reward against KL"] = plots.line_plot({"drawn answers": against}, "nats", "reward", title, dots=True)
    return shown


def findings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the log of a tuning shows, a sentence each; the first says how the reward went, the rest what is unusual.

    Args:
        rows: of metrics.jsonl: {"reward", "held_out_reward", "kl", "alike", "distinct", "length", "ratio", ...}.
    """
    first, last = _ends(rows, "reward")
    held_first, held_last = _ends(rows, "held_out_reward")
    kl = _ends(rows, "kl")[1]
    once = sum(row.get("reward") is not None for row in rows) == 1
    went = f"was {last:.4g}" if once else f"went from {first:.4g} to {last:.4g}"
    told = [f"The reward of drawn answers {went}"]
    told[0] += "." if math.isnan(kl) else f", {kl:.3g} nats an answer from the start."
    if once:
        told.append("One line of the log says nothing about where it goes: give it more steps.")
    elif not last > first:
        told.append("It did not rise: give it more steps, a higher learning rate, or more samples.")
    if held_last < held_first and last > first:
        told.append(
            f"Held out it fell from {held_first:.4g} to {held_last:.4g} while that of drawn answers rose: the model "
            "learns the training inputs by heart. Stop earlier, or give it more of them; the best weights were kept."
        )
    if _ends(rows, "alike")[1] > 0.9:
        told.append(
            "Of more than nine inputs in ten all answers score alike, and nothing is learned from them: the task is "
            "too easy, too hard, or the reward too coarse."
        )
    length_first, length_last = _ends(rows, "length")
    if not length_first / 4 <= length_last <= 4 * length_first and not math.isnan(length_first):
        told.append(f"Answers went from {length_first:.3g} to {length_last:.3g} decisions: is that what you want?")
    distinct_first, distinct_last = _ends(rows, "distinct")
    if distinct_last < distinct_first / 3:
        told.append("Answers to an input have become nearly one: raise the anchor or the entropy if that is too few.")
    if abs(_ends(rows, "ratio")[1] - 1) > 1e-3:
        told.append("The ratio of the first epoch is not 1: the model scores the same answers differently.")
    if len(told) == 1:
        told.append("Nothing about the curve is unusual.")
    return told


def _ends(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """Mean of the first and of the last tenth of the rows that have a value; NaN if none has."""
    values = [float(row[name]) for row in rows if row.get(name) is not None]
    if not values:
        return math.nan, math.nan
    some = max(1, len(values) // 10)
    return sum(values[:some]) / some, sum(values[-some:]) / some


def best_of(rewards: Float[Tensor, "batch samples"]) -> Float[Tensor, " samples"]:
    """Expected best reward of N answers, N = 1, 2, ..., the mean over inputs.

    Exact for N answers drawn without replacement from these: of the sorted rewards, the k-th smallest of n is the best
    of N with probability C(k-1, N-1) / C(n, N). What a perfect judge would make of N tries.
    """
    return _last_of(rewards.sort(dim=1).values)


def likeliest_of(
    rewards: Float[Tensor, "batch samples"], log_probs: Float[Tensor, "batch samples"]
) -> Float[Tensor, " samples"]:
    """Expected reward of the most probable of N answers, N = 1, 2, ..., the mean over inputs; exact as `best_of`.

    What the model's own judgement makes of N tries. Equally probable answers count in the order given.
    """
    order = log_probs.argsort(dim=1, stable=True)
    return _last_of(rewards.gather(1, order))


def _last_of(ordered: Float[Tensor, "batch samples"]) -> Float[Tensor, " samples"]:
    """Expected value of the last in this order of N that are drawn, N = 1, 2, ...; the mean over rows."""
    values = ordered.double().mean(0)
    count = len(values)
    logs = torch.arange(count + 1, dtype=torch.float64, device=values.device).clamp(min=1).log().cumsum(0)  # of n!
    found = []
    for size in range(1, count + 1):
        place = torch.arange(size, count + 1, device=values.device)
        ways = logs[place - 1] - logs[size - 1] - logs[place - size]
        all_ways = logs[count] - logs[size] - logs[count - size]
        found.append((values[size - 1 :] * (ways - all_ways).exp()).sum())
    return torch.stack(found).to(ordered)


def still_learning(evaluation: Evaluation) -> list[str]:
    """A sentence if as much more likelihood brought the start further than the reward did.

    By what was tuned on, `reward`, if that was measured; else by the first metric.
    """
    rows = evaluation.baselines
    name = "reward" if "reward" in evaluation.metrics else next(iter(evaluation.metrics))
    found = evaluation.metrics[name]
    start = next((rows[row][name] for row in ("mle", "start") if name in rows.get(row, {})), None)
    control = rows.get("control", {}).get(name)
    way = report.direction(name)
    if start is None or control is None or way * (control - start) <= max(0.0, way * (found - start)):
        return []
    before, after, ours = (f"{value:.3g}" for value in (start, control, found))
    if after in (before, ours):  # nobody would see it
        return []
    said = f"{name} {before} to {after}, tuned to {ours}"
    return [
        f"As much more likelihood gained more ({said}): the start was still learning; give likelihood its time first."
    ]
