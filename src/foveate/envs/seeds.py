"""Place seeds for a random walker (Song et al. 2018, "SeedNet: automatic seed generation with deep reinforcement
learning for robust interactive segmentation").

| | |
|---|---|
| state | the image, the seeds so far on a 20×20 grid, and what the random walker makes of them |
| observation | `image`; `probability` of the object, by the walker; `seeds` of the foreground and of the background |
| action | a seed: of the background or of the foreground, at one of the 400 cells |
| reward | of a seed well inside its side (exp(5 · IoU) - 1) / (exp(5) - 1), near the border 1 less, else -1; or 5 times
  what it gains of IoU |
| horizon | 10 seeds |

An episode begins with the user's seeds: one in the object and one beside it, well inside, drawn from the key. A seed
marks all pixels of its cell. On a cell that has a seed nothing can be placed: the reward is -1 and nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.data.salient import Salient, load_salient
from foveate.envs.single import SingleEnv
from foveate.envs.tensor_env import TensorEnv
from foveate.models.random_walker import random_walker
from foveate.types import InputError

CELLS = 20  # a side of the grid
ACTIONS = 2 * CELLS * CELLS
BACKGROUND, FOREGROUND = 1, 2  # on the grid, where 0 is no seed
GAIN = 5.0  # the reward of a seed that wins all there is
SHARPNESS = 5.0  # k: how much more the last points of IoU are worth than the first
COLOURS = ((30, 110, 255), (255, 60, 40))  # of seeds of the background and the foreground, in a picture
EDGE = (255, 220, 0)


@dataclass(frozen=True)
class SeedState:
    """An image's number, a grid and one byte a pixel: a tree of [batch, ...] that a replay can hold.

    The byte a pixel is the one exception to "never pixels" (`foveate.learn.replay`). It follows from image and seeds,
    but an update of 32 transitions of 40×40 pixels would let the random walker go 64 times, before and after: 42 ms on
    a core, a fifth more for a training step, of which the networks would then have two thirds instead of four fifths.
    What that would save is 20 of the 26 MB of the 12,800 transitions that are kept.

    Attributes:
        image: its number.
        seeds: 0, `BACKGROUND` or `FOREGROUND` at each cell.
        walker: probability of the object by the random walker, 0 to 255.
    """

    image: Int[Tensor, "*batch"]
    seeds: UInt8[Tensor, "*batch rows columns"]
    walker: UInt8[Tensor, "*batch side side"]

    @property
    def mask(self) -> Bool[Tensor, "*batch side side"]:
        """Where the object is more likely."""
        return self.walker >= 128


class SeedsEnv(TensorEnv):
    """`foveate/Seeds-v0`.

    Args:
        num_envs: copies in lockstep.
        salient: pictures and their masks; None loads `data` from `root`.
        data: name of a set (`foveate.data.salient.DATASETS`).
        root: its folder.
        split: "train", "val" or "test".
        image_size: side in pixels of the images, on which the random walker works.
        scenes: how many are rendered, for rendered data.
        border: how far from the object's outline a seed is well inside, in parts of the side. An object that is too
            small for that is well inside where it is deepest.
        beta: of the random walker.
        reward: "level" as published, which pays at each seed for the IoU that there is, and most for seeds that risk
            nothing; or "gain", 5 times the change of IoU, wherever the seed is.
        mirrored: each image is there a second time, left and right exchanged.
        **options: of `TensorEnv`; `horizon` is 10 if not given.

    Raises:
        InputError: as `load_salient`; a number out of its range; images smaller than the grid.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 2}  # noqa: RUF012
    chance = False

    def __init__(
        self,
        num_envs: int = 1,
        *,
        salient: Salient | None = None,
        data: str = "scenes",
        root: str | Path | None = None,
        split: Any = "train",
        image_size: int = 40,
        scenes: int = 100,
        border: float = 0.05,
        beta: float = 130.0,
        reward: str = "level",
        mirrored: bool = False,
        horizon: int | None = 10,
        **options: Any,
    ) -> None:
        if not 0 <= border < 0.5:
            raise InputError(f"border: found {border:g}, expected 0 to less than 0.5 of the image's side")
        if not beta > 0:
            raise InputError(f"beta: found {beta:g}, expected more than 0")
        if salient is None:
            place = None if root is None else Path(root)
            salient = load_salient(data, place, split, image_size, scenes=scenes)
        if reward not in ("level", "gain"):
            raise InputError(f"reward: no {reward!r}, expected level or gain")
        self.reward = reward
        self.side, self.beta = salient.masks.shape[-1], beta
        if self.side < CELLS:
            raise InputError(f"image_size: found {self.side}, expected at least {CELLS} pixels: one for each cell")
        count = len(salient) * (2 if mirrored else 1)
        super().__init__(
            num_envs,
            gymnasium.spaces.Dict(
                image=gymnasium.spaces.Box(0.0, 1.0, (3, self.side, self.side)),
                probability=gymnasium.spaces.Box(0.0, 1.0, (1, self.side, self.side)),
                seeds=gymnasium.spaces.Box(0.0, 1.0, (2, CELLS, CELLS)),
            ),
            gymnasium.spaces.Discrete(ACTIONS),
            examples=count,
            horizon=horizon,
            **options,
        )
        pixels, masks = salient.pixels, salient.masks
        if mirrored:
            pixels, masks = torch.cat((pixels, pixels.flip(-1))), torch.cat((masks, masks.flip(-1)))
        self.pixels, self.masks = pixels.to(self.device), masks.to(self.device)
        self.cell = cells_of(self.side, self.device)
        self.object, self.inside = regions(self.masks, border)

    def initial(self, ids: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]) -> SeedState:
        """The user's seeds."""
        seeds = self.user_seeds(ids, keys)
        return SeedState(ids, seeds, in_bytes(self.walked(ids, seeds)))

    def user_seeds(
        self, ids: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]
    ) -> UInt8[Tensor, "batch rows columns"]:
        """A seed well inside of each side, drawn from the keys."""
        dice = noise.uniform(noise.fold(keys, "user"), 2, CELLS, CELLS)
        sides = torch.stack((~self.object[ids], self.object[ids]), 1) & self.inside[ids, None]
        places = (dice + sides).flatten(2).argmax(2)
        seeds = torch.zeros(len(ids), CELLS * CELLS, dtype=torch.uint8, device=ids.device)
        kinds = torch.tensor([BACKGROUND, FOREGROUND], dtype=torch.uint8, device=ids.device)
        return seeds.scatter(1, places, kinds.expand(len(ids), 2)).view(-1, CELLS, CELLS)

    def transition(
        self, state: SeedState, actions: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]
    ) -> tuple[SeedState, Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """Place a seed, and let the random walker go anew."""
        kind, cell = actions // (CELLS * CELLS), actions % (CELLS * CELLS)
        grid = state.seeds.flatten(1)
        taken = grid.gather(1, cell[:, None]).squeeze(1) > 0
        label = torch.where(taken, grid.gather(1, cell[:, None]).squeeze(1), (kind + 1).to(torch.uint8))
        seeds = grid.scatter(1, cell[:, None], label[:, None]).view_as(state.seeds)
        after = replace(state, seeds=seeds, walker=in_bytes(self.walked(state.image, seeds)))
        if self.reward == "gain":
            gain = GAIN * (self.iou(after) - self.iou(state))
            return after, torch.where(taken, -1.0, gain), torch.zeros_like(taken)
        right = (self.object[state.image].flatten(1).gather(1, cell[:, None]).squeeze(1) == (kind == 1)) & ~taken
        well = self.inside[state.image].flatten(1).gather(1, cell[:, None]).squeeze(1)
        level = torch.expm1(SHARPNESS * self.iou(after)) / torch.expm1(torch.tensor(SHARPNESS)).item()
        reward = torch.where(right, torch.where(well, level, level - 1), -1.0)
        return after, reward, torch.zeros_like(taken)

    def observe(self, state: SeedState) -> dict[str, Tensor]:
        """The image, what the walker holds, and a map of the seeds of each side, those of the background first."""
        kinds = torch.tensor([BACKGROUND, FOREGROUND], dtype=torch.uint8, device=state.seeds.device)[:, None, None]
        return {
            "image": self.pixels[state.image].float() / 255,
            "probability": state.walker[:, None].float() / 255,
            "seeds": (state.seeds[:, None] == kinds).float(),
        }

    def walked(
        self, image: Int[Tensor, " batch"], seeds: UInt8[Tensor, "batch rows columns"]
    ) -> Float[Tensor, "batch side side"]:
        """Probability of the foreground, by the random walker from these seeds."""
        marked = seeds[:, self.cell][:, :, self.cell]
        shown = self.pixels[image].float() / 255
        return random_walker(shown, marked == FOREGROUND, marked == BACKGROUND, beta=self.beta)

    def iou(self, state: SeedState) -> Float[Tensor, " batch"]:
        """Of the present mask with the object."""
        truth = self.masks[state.image]
        return (state.mask & truth).sum((1, 2)) / (state.mask | truth).sum((1, 2))

    def rewarded(self, state: SeedState) -> Bool[Tensor, "batch actions"]:
        """Seeds of the right side, well inside, where none is: what guided exploration draws from."""
        return self.right(state.image) & (state.seeds == 0).flatten(1).repeat(1, 2)

    def right(self, image: Int[Tensor, " batch"]) -> Bool[Tensor, "batch actions"]:
        """Seeds of the right side, well inside."""
        inside, there = self.inside[image], self.object[image]
        return torch.stack((inside & ~there, inside & there), 1).flatten(1)

    def draw(self, state: SeedState) -> UInt8[Tensor, "batch height width 3"]:
        """The image with the outline of the mask, and the seeds."""
        shown = self.pixels[state.image].permute(0, 2, 3, 1)
        outline = state.mask & (F.max_pool2d(-state.mask[:, None].float(), 3, 1, 1)[:, 0] > -1)
        shown = torch.where(outline[..., None], shown.new_tensor(EDGE), shown)
        marked = state.seeds[:, self.cell][:, :, self.cell]
        for kind, colour in zip((BACKGROUND, FOREGROUND), COLOURS, strict=True):
            shown = torch.where((marked == kind)[..., None], shown.new_tensor(colour), shown)
        return shown


def in_bytes(probabilities: Float[Tensor, "batch side side"]) -> UInt8[Tensor, "batch side side"]:
    """Probabilities as numbers from 0 to 255, of which 128 is the first from 1/2 on."""
    return (probabilities * 255).round().byte()


def cells_of(side: int, device: torch.device | str = "cpu") -> Int[Tensor, " side"]:
    """The row (or column) of the grid in which each row (or column) of pixels lies."""
    return torch.arange(side, device=device) * CELLS // side


def regions(
    masks: Bool[Tensor, "batch side side"], border: float
) -> tuple[Bool[Tensor, "batch rows columns"], Bool[Tensor, "batch rows columns"]]:
    """For each cell, whether it is of the object, and whether it is well inside of its side.

    A cell is of the side of most of its pixels; if no cell is of the object, the one with most of it is. It is well
    inside if all its pixels are farther than `border` · side from the other side, or as far as any cell of its side.
    """
    side = masks.shape[-1]
    cell = cells_of(side, masks.device)
    member = F.one_hot(cell, CELLS).to(torch.float32)
    share = member.mT @ masks.float() @ member / (member.sum(0)[:, None] * member.sum(0))
    there = share >= share.flatten(1).amax(1).clamp(max=0.5)[:, None, None]
    depth = torch.zeros_like(masks, dtype=torch.float32)  # how often a pixel's side can lose its rim before it is gone
    left = torch.stack((~masks, masks), 1).float()
    for _ in range(round(border * side)):
        # beyond the image nothing takes from either
        left = -F.max_pool2d(F.pad(-left, (1, 1, 1, 1), value=-1.0), 3, 1)
        depth = depth + left.sum(1)
    # A pixel of the other side makes its cell one of the border.
    depth = torch.where(masks == there[:, cell][:, :, cell], depth + 1, 0.0)
    least = _least(_least(depth, member).mT, member).mT
    deepest = [torch.where(kind, least, 0.0).flatten(1).amax(1)[:, None, None] for kind in (~there, there)]
    return there, least >= torch.where(there, deepest[1], deepest[0]).clamp(max=round(border * side) + 1)


def _least(values: Tensor, member: Tensor) -> Tensor:
    """The least over the rows of each cell."""
    return torch.where(member.T[:, :, None] > 0, values[:, None], torch.inf).amin(2)


class SingleSeedsEnv(SingleEnv):
    """One copy of `SeedsEnv`."""

    lockstep = SeedsEnv
