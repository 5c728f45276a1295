"""What a generator is watched by while a reward tunes it: a classifier that is not optimised, and what it sees.

A generator finds what a reward forgot. Beside the reward stand three scores that nothing climbs: whether a second
classifier, trained on other examples, still knows what the images show; how different images of one kind are; how far
they lie from real ones in that classifier's features. `mix` makes one number of all, by which weights are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate import noise
from foveate.learn.answers import Reward, answering, divergence
from foveate.learn.schedule import one_cycle, set_learning_rate
from foveate.learn.settings import Precision
from foveate.models.classifier import ImageClassifier
from foveate.models.diffusion import Denoiser
from foveate.rewards.generated import diversity, frechet_distance
from foveate.run import Run
from foveate.types import map_tree

AT_ONCE = 100  # images looked at together
CHAINS = 10  # of a look, of which the KL is told
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
            # a pixel to any side: they are to judge what is drawn, not what is real
            seen = _rolled(images[rows], noise.integers(keys, 3, 2) - 1)
            loss = F.cross_entropy(judge(seen), labels[rows])
            set_learning_rate(optimizer, one_cycle(run.progress, learning_rate))
            run.optimise(loss, optimizer)
            run.log(**{f"{name}_loss": loss.detach()})


def _rolled(
    images: Float[Tensor, "batch channels height width"], shifts: Int[Tensor, "batch 2"]
) -> Float[Tensor, "batch channels height width"]:
    """Each image moved down and to the right by pixels of its own; what leaves comes in at the other side."""
    down, right = (
        (torch.arange(side, device=images.device) - shifts[:, axis, None]) % side
        for axis, side in enumerate(images.shape[2:])
    )
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[batch, down[:, :, None], right[:, None]].permute(0, 3, 1, 2)


def drawn_images(
    policy: Denoiser,
    inputs: Int[Tensor, " batch"],
    keys: Int[Tensor, " batch"],
    precision: Precision = "fp32",
    start: Denoiser | None = None,
    chains: int = 0,
) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, " chains"]]:
    """An image of each input, drawn with its key; and the KL to the start of the first `chains` of them, in nats."""
    images, far = [], [torch.zeros(0, device=keys.device)]
    most = policy.together()
    for first, (some, each) in enumerate(zip(inputs.split(most), keys.split(most), strict=True)):
        with torch.no_grad(), answering(policy, precision):
            answers = policy.sample(some, 1, False, each)
            images.append(policy.decode(answers))
        if start is not None and (left := chains - first * most) > 0:
            asked, answers = map_tree(lambda leaf: leaf[:left], (some, answers))
            far.append(divergence(policy, start, asked, answers, precision))
    return torch.cat(images), torch.cat(far)


class Watch:
    """Scores of images beside real ones.

    Args:
        judge: a `Judge`; where there are no classes `Thumbnails`, or CLIP.
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
        """`distance`: Fréchet's to the real ones; `diversity`: 1 is theirs; `accuracy` of a `Judge`."""
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

    The gain is in standard deviations of the reward among the start's images. Lost are: accuracy, five points of which
    weigh as a deviation; nearness to real images, where ten times the start's distance weighs as one;
    diversity, where half of the start's weighs as one. What is better than at the start is no gain.

    Args:
        now: "reward", "distance", "diversity", and "accuracy" if there are classes.
        start: the same of the start, with "spread", the deviation of its rewards.
        strict: weight of the losses.
    """
    gain = (now["reward"] - start["reward"]) / start["spread"].clamp(min=1e-6)
    lost = (now["distance"] / start["distance"].clamp(min=1e-9)).clamp(min=1e-9).log10().clamp(min=0)
    lost = lost + 2 * (1 - now["diversity"] / start["diversity"].clamp(min=1e-9)).clamp(min=0)
    if "accuracy" in now:
        lost = lost + (start["accuracy"] - now["accuracy"]).clamp(min=0) / POINTS
    return gain - strict * lost


class Contest:
    """Models beside each other: images of the same noise, the reward of them, and what it does not look at.

    Args:
        reward: what is optimised.
        watch: what is not; None: what `eyes` sees, beside other images of the start.
        start: of the tuning.
        kinds: the classes or prompts of the images that are drawn.
        keys: of their noise.
        precision: of the models.
        named: parts of the reward that an evaluation tells apart; those it does not have are passed over.
        eyes: what has `features` of images, where there are no classes; None: `Thumbnails`.
    """

    def __init__(
        self,
        reward: Reward,
        watch: Watch | None,
        start: Denoiser,
        kinds: Int[Tensor, " batch"],
        keys: Int[Tensor, " batch"],
        precision: Precision = "fp32",
        named: Sequence[str] = (),
        eyes: Any = None,
    ) -> None:
        if watch is None:
            others, _ = drawn_images(start, kinds, noise.fold(keys, "real"), precision)
            watch = Watch(eyes or Thumbnails(), others, kinds)
        self.reward, self.watch, self.start, self.kinds, self.keys = reward, watch, start, kinds, keys
        self.precision, self.named = precision, named
        self._first: dict[str, Tensor] = {}

    def scores(self, policy: Denoiser) -> dict[str, Tensor]:
        """Mean "reward", its "spread", what the watch says, and the "kl" of a few chains to the start, in nats."""
        images, far = self._drawn(policy, CHAINS)
        total = self.reward(images, self.kinds).total
        return {"reward": total.mean(), "spread": total.std(), **self.watch(images, self.kinds), "kl": far}

    def look(self, policy: Denoiser, strict: float) -> dict[str, Tensor]:
        """The scores as "held_out_...", and their `mix` beside the start's, which is scored once."""
        self._first = self._first or self.scores(self.start)
        found = self.scores(policy)
        named = {f"held_out_{name}": value for name, value in found.items() if name != "spread"}
        return named | {"held_out_mix": mix(found, self._first, strict)}

    def row(self, images: Tensor, kinds: Tensor) -> dict[str, float]:
        """Of an evaluation: the scores of any images."""
        found, beside = self.reward(images, kinds), self.watch(images, kinds)
        row = {"reward": found.total.mean(), "frechet_distance": beside["distance"], "diversity": beside["diversity"]}
        row |= {f"{name}_reward": found.parts[name].mean() for name in self.named if name in found.parts}
        row |= {"judge_accuracy": beside["accuracy"]} if "accuracy" in beside else {}
        return {name: float(value) for name, value in row.items()}

    def model(self, policy: Denoiser, chains: int = 100) -> dict[str, float]:
        """Of an evaluation: the scores of a model, and the "kl" of so many chains to the start, in nats."""
        images, far = self._drawn(policy, chains)
        return self.row(images, self.kinds) | {"kl": float(far)}

    def _drawn(self, policy: Denoiser, chains: int) -> tuple[Tensor, Tensor]:
        images, far = drawn_images(policy, self.kinds, self.keys, self.precision, self.start, chains)
        return images, far.mean()
