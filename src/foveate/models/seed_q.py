"""Where the next seed is worth most, and which pixels are of the object: fully convolutional networks on a grid.

The values are those of Song et al. 2018, "SeedNet" (CVPR), with the dueling heads of Wang et al. 2016. `SeedMask` has
the same trunk and sees the same, but for what an agent does: it is the supervised control.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveate.models.backbones import Pretrained
from foveate.types import Tree

FINE = 3  # pixels of the trunk's input in a cell's side
FROZEN_SIDE = 8  # pixels in a cell's side of the images that a pretrained network sees


class SeedTrunk(nn.Module):
    """Features of each cell, from the image, maps at the image's size and maps of cells.

    Args:
        maps: channels beside the image.
        cells: side of the grid.
        width: features of a cell, a multiple of 8.
        depth: residual blocks, whose dilation grows 1, 2, 4, 1, ...
        frozen: channels of features of a pretrained network that come with the input; 0: none.
    """

    def __init__(self, maps: int, cells: int, width: int, depth: int, frozen: int) -> None:
        super().__init__()
        self.cells = cells
        self.pixels = nn.Sequential(
            nn.Conv2d(3 + maps, width, 5, stride=FINE, padding=1), nn.GroupNorm(8, width), nn.ReLU()
        )
        self.frozen = nn.Conv2d(frozen, width, 1) if frozen else None
        self.blocks = nn.ModuleList(_Block(width, (1, 2, 4)[place % 3]) for place in range(depth))

    def forward(
        self,
        image: Float[Tensor, "batch 3 height width"],
        maps: list[Tensor],
        frozen: Float[Tensor, "batch channels rows columns"] | None,
    ) -> Float[Tensor, "batch features rows columns"]:
        """Features. Maps of any size are brought to that of the grid's pixels."""
        side = FINE * self.cells
        shown = [F.interpolate(image - 0.5, (side, side), mode="bilinear", antialias=True)]
        for each in maps:
            fine = each.shape[-1] >= side
            kind = {"mode": "bilinear", "antialias": True} if fine else {"mode": "nearest"}
            shown.append(F.interpolate(each, (side, side), **kind))
        state = self.pixels(torch.cat(shown, 1))
        if self.frozen is not None and frozen is not None:
            state = state + self.frozen(frozen.to(state))
        for block in self.blocks:
            state = block(state)
        return state


class _Block(nn.Module):
    """Adds to each cell what its surroundings, and the whole, say."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.near = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.norm = nn.GroupNorm(8, width)
        self.whole = nn.Linear(width, width)
        self.last = nn.Conv2d(width, width, 1)

    def forward(self, state: Tensor) -> Tensor:
        near = self.near(state) + self.whole(state.mean((2, 3)))[:, :, None, None]
        return state + self.last(F.relu(self.norm(near)))


class SeedQ(nn.Module):
    """Values of the seeds, those of the background first: Q(s, a) = V(s) + A(s, a) - mean A(s, ·).

    Beside them, from the same features, a belief about each seed: whether it is of the right side, well inside. The
    values are told it and do not teach it.

    Args:
        cells: side of the grid.
        width: features of a cell.
        depth: residual blocks.
        frozen: channels of pretrained features; 0: none.
    """

    def __init__(self, cells: int = 20, width: int = 32, depth: int = 5, frozen: int = 0) -> None:
        super().__init__()
        self.trunk = SeedTrunk(3, cells, width, depth, frozen)
        self.worth = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.belief = nn.Conv2d(width, 2, 1)
        self.gain = nn.Conv2d(width + 2, 2, 1)

    def forward(self, seen: Tree) -> Float[Tensor, "batch actions"]:
        """Values of what `SeedsEnv.observe` shows, with "frozen" beside it if there are pretrained features."""
        return self.both(seen)[0]

    def both(self, seen: Tree) -> tuple[Float[Tensor, "batch actions"], Float[Tensor, "batch actions"]]:
        """Values, and the belief as log-odds."""
        state = self.trunk(seen["image"], [seen["probability"], seen["seeds"]], seen.get("frozen"))
        belief = self.belief(state)
        gain = self.gain(torch.cat((state, 2 * belief.detach().sigmoid() - 1), 1)).flatten(1)
        values = self.worth(state.mean((2, 3))) + gain - gain.mean(1, keepdim=True)
        taken = seen["seeds"].amax(1).flatten(1).repeat(1, 2) > 0
        # A seed on a seed changes nothing: it is the worst, and nothing is learned of it.
        return torch.where(taken, values.detach().amin(1, keepdim=True) - 1, values), belief.flatten(1)


class SeedMask(nn.Module):
    """A score for each pixel: of the object or not. The agent's trunk, then layers at the image's size.

    Args:
        seeds: whether it sees the seeds of the user.
        cells: side of the grid.
        width: features of a cell.
        depth: residual blocks.
        frozen: channels of pretrained features; 0: none.
    """

    def __init__(self, seeds: bool, cells: int = 20, width: int = 32, depth: int = 5, frozen: int = 0) -> None:
        super().__init__()
        self.seeds = seeds
        self.trunk = SeedTrunk(2 if seeds else 0, cells, width, depth, frozen)
        self.fine = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
        self.join = nn.Conv2d(width, 16, 1)
        self.score = nn.Sequential(
            nn.Conv2d(32, 16, 3, padding=1), nn.GroupNorm(8, 16), nn.ReLU(), nn.Conv2d(16, 1, 3, padding=1)
        )

    def forward(self, seen: Tree) -> Float[Tensor, "batch height width"]:
        """Scores, above 0 for the object, of what `SeedsEnv.observe` shows."""
        image = seen["image"]
        state = self.trunk(image, [seen["seeds"]] if self.seeds else [], seen.get("frozen"))
        coarse = F.interpolate(self.join(state), image.shape[-2:], mode="bilinear", align_corners=False)
        return self.score(torch.cat((self.fine(image - 0.5), coarse), 1))[:, 0]


@torch.no_grad()
def frozen_features(
    backbone: Pretrained, images: Float[Tensor, "batch 3 height width"], cells: int
) -> Float[Tensor, "batch features rows columns"]:
    """Features of each cell by a pretrained network that does not learn: its last two maps, at the grid's size."""
    side = FROZEN_SIDE * cells
    found = []
    for some in images.split(16):
        seen = F.interpolate(some, (side, side), mode="bilinear", antialias=True)
        maps = backbone.maps(seen)[-2:]
        found.append(torch.cat([F.interpolate(each, (cells, cells), mode="bilinear") for each in maps], 1))
    return torch.cat(found).half()
