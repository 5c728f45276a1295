"""How a model is tuned on a reward: the settings of `foveate.learn.answers`, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from foveate.types import InputError

Baseline = Literal["leave-one-out", "normalised", "greedy", "moving-average", "learned", "none"]
Credit = Literal["answer", "to-go", "difference", "flip", "expected"]
Anchored = Literal["loss", "reward"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Tuning:
    """How to tune.

    Attributes:
        samples: answers to each input of a batch.
        baseline: what is subtracted from a reward: the mean of the other answers, that of the greedy answer, a moving
            average, the model's own expectation (`values` of its decisions), or nothing. "normalised" takes off the
            mean of the input's answers and divides by their standard deviation (`group_normalised`): no units are left,
            and the anchor weighs the same whatever the reward is measured in.
        credit: what a decision is weighed by. "answer": the reward of the whole answer, less the baseline. The others
            take the reward's `credit` [rows, time]. "to-go": what this decision and those after it gained, if the
            credits sum to the reward, less the mean of that over the other answers. The rest are for decisions that
            are independent of each other. "difference": how much more the answer is worth than without the decision,
            less the mean of that over the other answers. "flip": how much more than with the other of two choices,
            times the probability of that other choice. "expected": the same times the probability of the choice that
            was made, which has the same expectation and no noise of the decision's own draw.
        anchor: weight of the KL to the model as it was at the start, in nats of a whole answer.
        anchored: "loss" adds that KL to the loss, whose gradient leaves out how the model changes what it comes to
            decide about; "reward" takes it off the answer's reward too, which adds that part.
        entropy: weight of the entropy, which is sought.
        epochs: updates on the answers of one batch; with more than one, give a `clip`.
        clip: of the importance ratio in later epochs (PPO).
        learning_rate: constant after the warm-up; with 0 nothing changes.
        warmup: steps over which it rises from 0.
        anneal: the learning rate falls evenly to 0 at the end of the phase, which leaves less noise in the weights.
        chunk: inputs to a backward pass, if a batch is too large for the memory; the gradient is the same.
        subset: share of the pieces of an answer's decisions (`Sampler.chunk`) that an update learns from, drawn anew
            for each and weighed up, so that the expectation is that of all. Of a denoising chain, whose steps share
            one advantage, a third of them is a cheaper update and hardly a noisier one.
        precision: "bf16" runs the model in mixed precision; rewards and losses stay in fp32.
        temperature: by which a sampler divides its scores while it draws answers and learns from them; None: its own.
            Answers drawn at 1 from a model of likelihood are often much worse than its likeliest ones, and learning to
            draw as well as these takes the time in which they could become better: below 1 it begins there. The
            sampler has an attribute `temperature`, as `foveate.models.encoder_decoder.EncoderDecoder`.
    """

    samples: int = 8
    baseline: Baseline = "leave-one-out"
    anchor: float = 0.0
    entropy: float = 0.0
    epochs: int = 1
    clip: float | None = None
    learning_rate: float = 1e-5
    warmup: int = 20
    anneal: bool = False
    credit: Credit = "answer"
    chunk: int | None = None
    precision: Precision = "fp32"
    anchored: Anchored = "loss"
    subset: float = 1.0
    temperature: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be learned from.

        Raises:
            InputError: another name than those of its type, a number out of its range, or settings that do not go
                together.
        """
        names = {"baseline": Baseline, "credit": Credit, "anchored": Anchored, "precision": Precision}
        for name, kind in names.items():
            if (found := getattr(self, name)) not in get_args(kind):
                raise InputError(f"{name}: found {found!r}, expected {', '.join(get_args(kind))}")
        for name in ("anchor", "entropy", "learning_rate", "warmup", "subset", "clip", "temperature"):
            left_out = (found := getattr(self, name)) is None and name in ("clip", "temperature")
            if not isinstance(found, (int, float)) and not left_out:
                raise InputError(f"{name}: found {found!r}, expected a number")
        for name in ("samples", "epochs"):
            if not isinstance(found := getattr(self, name), int) or found < 1:
                raise InputError(f"{name}: found {found}, expected a whole number, at least 1")
        if not 0 <= self.learning_rate < math.inf:
            raise InputError(f"learning_rate: found {self.learning_rate:g}, expected at least 0, e.g. 1e-5")
        if not 0 <= self.anchor < math.inf:
            raise InputError(f"anchor: found {self.anchor:g}, expected 0, which is none, or more")
        if not math.isfinite(self.entropy):
            raise InputError(f"entropy: found {self.entropy:g}, expected a finite number; 0 is none")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"clip: found {self.clip:g}, expected more than 0, e.g. 0.2; leave it out for none")
        if not self.warmup >= 0:
            raise InputError(f"warmup: found {self.warmup}, expected 0 steps, which is none, or more")
        if self.chunk is not None and (not isinstance(self.chunk, int) or self.chunk < 1):
            told = "expected a whole number of inputs, at least 1; leave it out for all at once"
            raise InputError(f"chunk: found {self.chunk!r}, {told}")
        compares = self.credit in ("to-go", "difference") or (
            self.credit == "answer" and self.baseline in ("leave-one-out", "normalised")
        )
        if compares and self.samples < 2:
            raise InputError(f"samples: found {self.samples}, but {self.baseline} compares at least 2; try 8")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise InputError(f"temperature: found {self.temperature:g}, expected more than 0; below 1 is near greedy")
        if not 0 < self.subset <= 1:
            raise InputError(f"subset: found {self.subset:g}, expected more than 0 and at most 1")
        if self.anchored == "reward" and self.credit != "answer":
            raise InputError(
                f"anchored: found 'reward', which is of whole answers, but credit {self.credit!r}; use 'loss'"
            )
        if self.epochs > 1 and self.clip is None:
            raise InputError(f"clip: not given, but {self.epochs} epochs go far from the answers' own policy; try 0.2")
