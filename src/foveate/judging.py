"""What a generator is watched by while a reward tunes it: a classifier that is not optimised, and what it sees.

A generator finds what a reward forgot. Beside the reward stand three scores that nothing climbs: whether a second
classifier, trained on other examples, still knows what the images show; how different images of one kind are; how far
they lie from real ones in that classifier's features. `mix` makes one number of all, by which weights are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate import noise
from foveate.learn.answers import Precision, answering
from foveate.learn.schedule import one_cycle, set_learning_rate
from foveate.models.classifier import ImageClassifier
from foveate.rewards.generated import diversity, frechet_distance
from foveate.run import Run
from foveate.types import Sampler

AT_ONCE = 100  # images drawn or looked at together
POINTS = 0.05  # of accuracy, the loss of which weighs as much as a standard deviation of the reward


class Judge(nn.Module):
    """A classifier of images in [0, 1], and the features by which it decides."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.classifier = ImageClassifier(channels, classes)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Class scores."""
        return self.classifier(images)

    def features(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """What stands before the last layer."""
        return self.classifier.layers[:-1](images)


class Thumbnails(nn.Module):
    """Where there are no classes: the colours of 6×6 regions as features. It sees layout, not content."""

    def features(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """Mean colours."""
        return F.adaptive_avg_pool2d(images, 6).flatten(1)


def learn_to_judge(
    run: Run,
    share: float,
    judges: Mapping[str, tuple[nn.Module, torch.optim.Optimizer]],
    images: Float[Tensor, "size channels height width"],
    labels: Int[Tensor, " size"],
    batch: int,
    learning_rate: float = 2e-3,
) -> None:
    """The phase "judges" of a run: each classifier learns from examples of its own, which it shares with no other.

    Args:
        run: owns the loop.
        share: of its budget.
        judges: name → classifier and optimizer, as `run.track` returned them.
        images: to learn from, in [0, 1], shared out one to each in turn.
        labels: their classes.
        batch: images in an update.
        learning_rate: peak of the one-cycle schedule.
    """
    for step in run.steps("judges", share):
        for place, (name, (judge, optimizer)) in enumerate(judges.items()):
            own = torch.arange(place, len(images), len(judges))
            rows = own[noise.examples(run.seed, step, batch, len(own))[run.rows(batch)]].to(images.device)
            keys = noise.key(run.seed, "judges", step, rows)
            seen = images[rows]
            shifts = noise.integers(keys, 3, 2) - 1  # a pixel to any side: they are to judge what is drawn, not real
            seen = torch.stack(
                [torch.roll(one, tuple(by), (1, 2)) for one, by in zip(seen, shifts.tolist(), strict=True)]
            )
            loss = F.cross_entropy(judge(seen), labels[rows])
            set_learning_rate(optimizer, one_cycle(run.progress, learning_rate))
            run.optimise(loss, optimizer)
            run.log(**{f"{name}_loss": loss.detach()})


def drawn_images(
    policy: Sampler, inputs: Int[Tensor, " batch"], keys: Int[Tensor, " batch"], precision: Precision = "fp32"
) -> Float[Tensor, "batch channels height width"]:
    """An image of each input, drawn with its key."""
    with torch.no_grad(), answering(policy, precision):
        pieces = zip(inputs.split(AT_ONCE), keys.split(AT_ONCE), strict=True)
        return torch.cat([policy.decode(policy.sample(some, 1, False, each)) for some, each in pieces])


class Watch:
    """Scores of images beside real ones.

    Args:
        judge: a `Judge`, or `Thumbnails` where there are no classes.
        real: images in [0, 1] that the drawn ones should lie near; as many as are drawn, or more.
        kinds: their classes, or what each shows.
    """

    def __init__(
        self, judge: Any, real: Float[Tensor, "size channels height width"], kinds: Int[Tensor, " size"]
    ) -> None:
        self.judge = judge
        self.real = self._features(real)
        self.various = float(diversity(self.real, kinds))

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch channels height width"], kinds: Int[Tensor, " batch"]
    ) -> dict[str, Tensor]:
        """`distance`: Fréchet's to the real ones; `diversity`: 1 is theirs; `accuracy` of a `Judge` on the drawn ones."""
        features = self._features(images)
        found = {"distance": frechet_distance(features, self.real[: len(features)])}
        found["diversity"] = diversity(features, kinds) / max(self.various, 1e-9)
        if isinstance(self.judge, Judge):
            right = [self.judge(some).argmax(1) for some in images.split(AT_ONCE)]
            found["accuracy"] = (torch.cat(right) == kinds).float().mean()
        return found

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        still = answering(self.judge) if isinstance(self.judge, Judge) else contextlib.nullcontext()
        with still:
            return torch.cat([self.judge.features(some) for some in images.split(AT_ONCE)])


def mix(now: Mapping[str, Tensor], start: Mapping[str, Tensor], strict: float) -> Tensor:
    """One score of all: what the reward gained, less what was lost in what it does not look at.

    The gain is in standard deviations of the reward among the start's images. Lost are: accuracy, where five points weigh
    as one deviation; nearness to real images, where a distance e times the start's weighs as one; diversity, where half
    of the start's weighs as one. What is better than at the start is no gain.

    Args:
        now: "reward", "distance", "diversity", and "accuracy" if there are classes.
        start: the same of the start, with "spread", the deviation of its rewards.
        strict: weight of the losses.
    """
    gain = (now["reward"] - start["reward"]) / start["spread"].clamp(min=1e-6)
    lost = (now["distance"] / start["distance"].clamp(min=1e-9)).clamp(min=1e-9).log().clamp(min=0)
    lost = lost + 2 * (1 - now["diversity"] / start["diversity"].clamp(min=1e-9)).clamp(min=0)
    if "accuracy" in now:
        lost = lost + (start["accuracy"] - now["accuracy"]).clamp(min=0) / POINTS
    return gain - strict * lost
