"""Rewards of images by their names, one or several with weights."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from foveate import noise
from foveate.rewards.colors import colorfulness, vivid_and_varied
from foveate.rewards.combine import Reward, guarded, load_reward, weighted_sum
from foveate.rewards.images import Aesthetic, ClassMatch, ClipMatch, compressibility, incompressibility, sharpness
from foveate.types import InputError

PLAIN: Mapping[str, Reward] = {
    "compressibility": compressibility,
    "incompressibility": incompressibility,
    "sharpness": sharpness,
}
COLOURED: Mapping[str, Reward] = {"colorfulness": colorfulness, "vivid": vivid_and_varied}  # of RGB
NAMES = (*PLAIN, *COLOURED, "class", "clip", "aesthetic")


def picture_score(name: str) -> Reward:
    """A score of RGB pictures by its name: of `PLAIN` or `COLOURED`, or what `load_reward` takes. No targets are used.

    Raises:
        InputError: there is none of this name.
    """
    return {**PLAIN, **COLOURED}.get(name) or load_reward(name)


def image_reward(
    names: Sequence[str],
    weights: Sequence[float],
    classifier: Callable[[Tensor], Tensor] | None,
    texts: Sequence[str],
    clip: Path | None = None,
    aesthetic: Path | None = None,
    skip_bad: bool = False,
    device: torch.device | str = "cpu",
) -> Reward:
    """A reward of images, or the weighted sum of several, whose weighted totals are then its `parts`.

    It names the image on which it fails, or skips it (`combine.guarded`).

    Args:
        names: of `NAMES`, or package.module:function, which is imported: its module's code runs.
        weights: one each, or none for 1 each.
        classifier: of "class": images → scores.
        texts: of the inputs by number, for "clip".
        clip: folder of a CLIPModel.
        aesthetic: safetensors of a head on its embeddings.
        skip_bad: skip images on which a reward fails.
        device: where CLIP computes.

    Raises:
        InputError: no such reward, no weight for each, or a file that a reward needs is not given.
    """
    if not names or (weights and len(weights) != len(names)) or len(set(names)) < len(names):
        raise InputError(
            f"reward, weights: found {', '.join(names) or 'none'} with {len(weights)} weights, expected different "
            "names and a weight for each, or none"
        )
    seeing = ClipMatch(_given(clip, "clip", names), texts, device) if {"clip", "aesthetic"} & set(names) else None

    def one(name: str) -> Reward:
        if name in PLAIN:
            return PLAIN[name]
        if name in COLOURED:
            return lambda predictions, targets: COLOURED[name](predictions.expand(-1, 3, -1, -1), targets)
        if name == "class":
            return ClassMatch(classifier or _unknown)
        if name == "clip" and seeing is not None:
            return seeing
        if name == "aesthetic" and seeing is not None:
            return Aesthetic(seeing, _given(aesthetic, "aesthetic", names))
        if ":" in name:
            return load_reward(name)
        nearest = difflib.get_close_matches(name, NAMES, 1, cutoff=0.0)[0]
        raise InputError(f"reward: no {name!r}, expected {', '.join(NAMES)} or package.module:function; {nearest!r}?")

    found = {name: guarded(one(name), skip_bad, name) for name in names}
    if len(found) == 1:
        return next(iter(found.values()))
    return weighted_sum(found, dict(zip(names, weights or [1.0] * len(names), strict=True)))


def onlooker(
    names: Sequence[str], texts: Sequence[str], clip: Path | None, device: torch.device | str = "cpu"
) -> ClipMatch | None:
    """CLIP, to watch what rewards do to images: None if it is not given, or is what one of these rewards sees by."""
    return None if clip is None or {"clip", "aesthetic"} & set(names) else ClipMatch(clip, texts, device)


def try_reward(reward: Reward, image: tuple[int, int, int], targets: int) -> None:
    """Ask a reward once, of two images of noise, before anything is trained for it.

    Args:
        reward: of images and the numbers of what they show.
        image: channels, rows and columns of what it will be asked of.
        targets: how many things there are to show.

    Raises:
        InputError: what the reward says against such images.
    """
    reward(noise.uniform(noise.key("tried", torch.arange(2)), *image), torch.arange(2) % targets)


def _unknown(images: Tensor) -> Tensor:
    raise InputError("reward: 'class' needs classes: train with data that has them, without prompts")


def _given(path: Path | None, field: str, names: Sequence[str]) -> Path:
    if path is None:
        raise InputError(f"{field}: not given, but reward {' '.join(names)} needs it: add --{field} PATH")
    return path
