"""How many comparisons each way of choosing pairs needs: random ones, or those about which judges disagree most.

    python benchmarks/asking.py RUN [JUDGE]        # a run of colorization or diffusion; colorfulness; minutes

A scripted judge that errs in one of ten answers compares answers of the run's start. After every twenty comparisons
judges are fitted to them, as `foveate prefer --choose uncertain` does, and held against the script's hidden score on
a thousand random pairs that nobody was asked about. The run's own comparisons are not touched.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate import noise
from foveate.commands import preferences
from foveate.data.comparisons import Comparisons
from foveate.learn.answers import Reward
from foveate.learn.preferences import accuracy, chances
from foveate.preferring import Asked, Choose, Pairs, collect_by_script, draw_pairs, fit
from foveate.rewards.named_images import picture_score

EVERY, MOST, UNSEEN, SEEDS = 20, 200, 1000, 8


def hidden(score: Reward, pictures: Tensor) -> Tensor:
    """The script's score of uint8 pictures."""
    output: Any = score(pictures.float() / 255, None)
    return output.total


def learned(asked: Asked, score: Reward, unseen: Pairs, choose: Choose, most: int = MOST) -> list[float]:
    """Share of the unseen pairs that judges order as the script does, after every `EVERY` comparisons."""
    wanted = (hidden(score, unseen.left) > hidden(score, unseen.right)).float()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        store = Comparisons(Path(folder), "asking", None, True)
        for count in range(EVERY, most + 1, EVERY):
            collect_by_script(store, asked, score, "script", count, choose=choose, every=EVERY)
            judges = fit(store.load(), noise.key(asked.seed, "told", count))
            with torch.no_grad():
                said = chances(judges(unseen.left.float() / 255), judges(unseen.right.float() / 255)).mean(0)
            found.append(float(accuracy(said, wanted)))
    return found


def needed(curve: list[float], level: float) -> str:
    """Comparisons after which a curve stands at a level for the first time."""
    return next((str(EVERY * (place + 1)) for place, value in enumerate(curve) if value >= level), f"> {MOST}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run, judge = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "colorfulness"
    answers, script = preferences(run, None, None, 500, 0, "cpu")[1], picture_score(judge)
    others = draw_pairs(answers, 10**6 + torch.arange(UNSEEN))
    means: dict[Choose, list[float]] = {}
    print(f"{'':12}{'seed':>5}" + "".join(f"{count:>7}" for count in range(EVERY, MOST + 1, EVERY)))
    for how in ("random", "uncertain"):
        curves = []
        for number in range(SEEDS):
            curves.append(learned(replace(answers, seed=number), script, others, how))
            print(f"{how:12}{number:>5}" + "".join(f"{value:7.3f}" for value in curves[-1]), flush=True)
        means[how] = torch.tensor(curves).mean(0).tolist()
        print(f"{how:12}{'mean':>5}" + "".join(f"{value:7.3f}" for value in means[how]))
    for share in (means["random"][MOST // EVERY // 2 - 1], means["random"][-1]):
        print(
            f"to order {share:.3f} of unseen pairs: " + ", ".join(f"{h} {needed(c, share)}" for h, c in means.items())
        )
