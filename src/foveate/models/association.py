"""Tracks from detections and from what says where a track goes: births, matches and deaths, frame by frame.

All sequences, and all sets of rules that are tried, go through their frames in lockstep, so that whoever proposes the
tracks' next boxes (a network, a motion model) is asked once a frame for all of them.

Bewley et al. 2016, "Simple online and realtime tracking": boxes are predicted, matched with detections by IoU with the
Hungarian method, and corrected by them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from foveate.geometry import Boxes, overlaps
from foveate.types import InputError


@dataclass(frozen=True)
class Rules:
    """How tracks are made of detections.

    Attributes:
        score: of a detection at least, to begin a track; to correct one, half of it is enough, or it itself below 0.
        match: IoU of a proposal and a detection at least.
        births: frames in which a track was detected before it is shown.
        patience: seconds without a detection after which a track ends.
        shown: seconds without a detection for which a track is shown still.
        trust: how far a track goes from its proposal to the detection, 0 to 1.
        sure: a track without a detection ends if its proposal is less sure than this.
        lead: 1: proposals count only while they have foretold the detections of their sequence better than constant
            velocity has, which needs no truth; until then, and whenever it is ahead, tracks go on as before. 0: always.
    """

    score: float = 0.5
    match: float = 0.3
    births: int = 2
    patience: float = 1.0
    shown: float = 0.5
    trust: float = 1.0
    sure: float = -1e9
    lead: float = 0.0


CHOICES: dict[str, tuple[float, ...]] = {
    "score": (0.3, 0.5, 0.7, 0.9),
    "births": (1, 2, 3),
    "shown": (0.0, 0.3, 1.0),
    "patience": (0.5, 1.0, 2.0),
    "match": (0.15, 0.3),
    "sure": (-1e9, 0.0),
    "trust": (1.0, 0.6),
}


def choices_for(detections: Boxes) -> dict[str, tuple[float, ...]]:
    """`CHOICES`; for detections whose scores are not all in [0, 1], with five of their quantiles as `score`."""
    scores = None if detections.scores is None else detections.scores[detections.mask].double()
    if scores is None or not len(scores) or bool(((scores >= 0) & (scores <= 1)).all()):
        return CHOICES
    levels = scores.quantile(scores.new_tensor([0.0, 0.2, 0.4, 0.6, 0.8]))
    return CHOICES | {"score": tuple(levels.tolist())}


ROUNDS = 3  # in which rules are chosen; what is best for one depends on the others


@dataclass(frozen=True)
class Asked:
    """Tracks of which the next box is asked: a tree of [tracks, ...].

    Attributes:
        before: the frame in which each was last detected.
        start: its box there.
        after: the frame in which it is looked for.
        box: its box in the frame before that.
        velocity: of its middle, in pixels a frame.
        groups: tracks of one group are in one frame together.
    """

    before: Int[Tensor, " tracks"]
    start: Float[Tensor, "tracks 4"]
    after: Int[Tensor, " tracks"]
    box: Float[Tensor, "tracks 4"]
    velocity: Float[Tensor, "tracks 2"]
    groups: Int[Tensor, " tracks"]


Propose: TypeAlias = Callable[[Asked], tuple[Tensor, Tensor]]  # boxes [tracks, 4], and how sure of each [tracks]


def still(asked: Asked) -> tuple[Float[Tensor, "tracks 4"], Float[Tensor, " tracks"]]:
    """Every track stays where it is."""
    return asked.box, torch.zeros(len(asked.box), device=asked.box.device)


def moving(asked: Asked) -> tuple[Float[Tensor, "tracks 4"], Float[Tensor, " tracks"]]:
    """Every track goes on as before: constant velocity."""
    return asked.box + asked.velocity.repeat(1, 2), torch.zeros(len(asked.box), device=asked.box.device)


@dataclass
class _Track:
    identity: int
    box: np.ndarray
    start: np.ndarray
    before: int
    velocity: np.ndarray = field(default_factory=lambda: np.zeros(2))
    hits: int = 1
    missed: int = 0


def follow(
    detections: Boxes,
    sequences: Int[Tensor, " frames"],
    rates: Sequence[float],
    rules: Sequence[Rules],
    propose: Propose,
    straight: Rules | None = None,
) -> list[Boxes]:
    """Follow what is detected through all sequences, once for each set of rules.

    Args:
        detections: of each frame, with scores.
        sequences: number of each frame's sequence, whose frames stand next to each other.
        rates: frames a second of each sequence.
        rules: sets of rules.
        propose: where tracks go.
        straight: the rules while a set's `lead` leaves it to constant velocity; what is best for proposals that are
            trusted need not be for these. None: the same.

    Returns:
        For each set of rules the shown tracks, one frame a row; `labels` are identities from 0, those of one sequence.

    Raises:
        InputError: detections without scores.
    """
    if detections.scores is None:
        raise InputError("detections: without scores, expected how sure the detector is of each box; give ones")
    device = sequences.device
    found = detections.boxes.detach().cpu().double().numpy(), detections.scores.detach().cpu().numpy()
    there, numbers = detections.mask.cpu().numpy(), sequences.cpu().numpy()
    spans = [np.flatnonzero(numbers == number) for number in np.unique(numbers)]
    runs = [(number, row, rule) for row, rule in enumerate(rules) for number in range(len(spans))]
    tracks: list[list[_Track]] = [[] for _ in runs]
    begun = [0] * len(runs)
    ahead = [0.0] * len(runs)  # by how much IoU proposals have foretold detections better than constant velocity
    shown: list[list[list[tuple[int, np.ndarray]]]] = [[[] for _ in numbers] for _ in rules]
    for time in range(max((len(span) for span in spans), default=0)):
        alive = [run for run, (number, *_) in enumerate(runs) if time < len(spans[number])]
        now = {run: int(spans[runs[run][0]][time]) for run in alive}
        asked = [(run, now[run], track) for run in alive for track in tracks[run]]
        foretold, plain, certain = _proposed(asked, propose, device)
        place = 0
        for run in alive:
            number, row, rule = runs[run]
            frame, mine = now[run], tracks[run]
            part = slice(place, place + len(mine))
            place += len(mine)
            if follows := rule.lead > 0 and ahead[run] <= 0:
                rule = straight or rule
            boxes = plain[part] if follows else foretold[part]
            usable = there[frame] & (found[1][frame] >= min(rule.score, rule.score / 2))
            corners, scores = found[0][frame][usable], found[1][frame][usable]
            matched = _matched(boxes, corners, rule.match)
            pairs = list(matched), list(matched.values())
            ahead[run] += _fit(foretold[part], corners, *pairs) - _fit(plain[part], corners, *pairs)
            kept = []
            for place_here, track in enumerate(mine):
                _go_on(
                    track,
                    boxes[place_here],
                    corners[matched[place_here]] if place_here in matched else None,
                    frame,
                    rule,
                )
                late = track.missed > max(1.0, rule.patience * rates[number])
                unsure = not follows and certain[part][place_here] < rule.sure
                if not (late or (track.missed and (unsure or track.hits < rule.births))):
                    kept.append(track)
            for other in sorted(set(range(len(corners))) - set(matched.values())):
                if scores[other] >= rule.score:
                    kept.append(_Track(begun[run], corners[other], corners[other], frame))
                    begun[run] += 1
            tracks[run] = kept
            limit = rule.shown * rates[number]
            shown[row][frame] = [
                (track.identity, track.box) for track in kept if track.hits >= rule.births and track.missed <= limit
            ]
    return [_padded(frames, device) for frames in shown]


def _proposed(
    tracks: list[tuple[int, int, _Track]], propose: Propose, device: torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is proposed, what constant velocity would, and how sure the proposals are."""
    if not tracks:
        return np.zeros((0, 4)), np.zeros((0, 4)), np.zeros(0)

    def numbers(values: list[int]) -> Tensor:
        return torch.tensor(values, device=device)

    def floats(values: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(values)).float().to(device)

    asked = Asked(
        numbers([track.before for _, _, track in tracks]),
        floats([track.start for _, _, track in tracks]),
        numbers([frame for _, frame, _ in tracks]),
        floats([track.box for _, _, track in tracks]),
        floats([track.velocity for _, _, track in tracks]),
        numbers([run for run, _, _ in tracks]),
    )
    (boxes, sure), (plain, _) = propose(asked), moving(asked)
    foretold, straight = (each.detach().cpu().double().numpy() for each in (boxes, plain))
    return foretold, straight, sure.detach().cpu().numpy()


def _matched(boxes: np.ndarray, others: np.ndarray, least: float) -> dict[int, int]:
    """Which detection belongs to which proposal."""
    if not len(boxes) or not len(others):
        return {}
    alike = overlaps(torch.from_numpy(boxes)[None].float(), torch.from_numpy(others)[None].float())[0].numpy()
    rows, columns = linear_sum_assignment(-np.where(alike >= least, alike, 0.0))
    return {int(row): int(column) for row, column in zip(rows, columns, strict=True) if alike[row, column] >= least}


def _fit(boxes: np.ndarray, others: np.ndarray, rows: list[int], columns: list[int]) -> float:
    """Sum of the IoU of boxes and their detections."""
    ours, theirs = (torch.from_numpy(each).float()[:, None] for each in (boxes[rows], others[columns]))
    return float(overlaps(ours, theirs).sum())


def _go_on(track: _Track, box: np.ndarray, detection: np.ndarray | None, frame: int, rule: Rules) -> None:
    """Take a track to its next frame; its velocity is the mean of the last displacements, the latest counting half."""
    if detection is None:
        track.box, track.missed = box, track.missed + 1
        return
    box = box + rule.trust * (detection - box)
    way = (box - track.start).reshape(2, 2).mean(0) / max(1, frame - track.before)
    track.velocity = way if track.hits == 1 else track.velocity + 0.5 * (way - track.velocity)
    track.box, track.start, track.before = box, box, frame
    track.hits, track.missed = track.hits + 1, 0


def _padded(frames: list[list[tuple[int, np.ndarray]]], device: torch.device) -> Boxes:
    most = max((len(each) for each in frames), default=0)
    boxes, labels = np.zeros((len(frames), most, 4)), np.zeros((len(frames), most), np.int64)
    for row, each in enumerate(frames):
        for place, (identity, box) in enumerate(each):
            boxes[row, place], labels[row, place] = box, identity
    mask = torch.arange(most) < torch.tensor([len(each) for each in frames])[:, None]
    return Boxes(torch.from_numpy(boxes).float().to(device), torch.from_numpy(labels).to(device), mask.to(device))


def best_rules(
    track: Callable[[list[Rules]], list[Boxes]],
    score: Callable[[Boxes], float],
    choices: dict[str, tuple[float, ...]] | None = None,
    first: Rules | None = None,
) -> tuple[Rules, float]:
    """The rules under which tracks score best: one field after another, all its values in lockstep, in some rounds.

    Args:
        track: sets of rules → the tracks of each.
        score: of tracks, the higher the better.
        choices: values of each field that is chosen; None: `CHOICES`.
        first: where to begin, and the values of fields that are not chosen.
    """
    best = first or Rules()
    worth = score(track([best])[0])
    for _ in range(ROUNDS):
        before = best
        for name, values in (CHOICES if choices is None else choices).items():
            tried = [rule for rule in (Rules(**(vars(best) | {name: value})) for value in values) if rule != best]
            for rule, found in zip(tried, track(tried), strict=True):
                if (now := score(found)) > worth:
                    best, worth = rule, now
        if best == before:
            break
    return best, float(worth)


def rules_tensor(rules: Rules) -> Float[Tensor, " fields"]:
    """Rules as numbers, so that a module can hold them."""
    return torch.tensor([float(getattr(rules, entry.name)) for entry in fields(Rules)])


def rules_of(numbers: Float[Tensor, " fields"]) -> Rules:
    """Rules that `rules_tensor` made numbers of."""
    values = dict(zip((entry.name for entry in fields(Rules)), numbers.tolist(), strict=True))
    return Rules(**(values | {"births": round(values["births"])}))
