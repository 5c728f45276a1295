"""Classification by glimpses (Mnih et al. 2014, section 3): the image is never seen whole.

| | |
|---|---|
| state | the image, the place looked at, the number of glimpses taken |
| observation | `what`: the retina's view there; `where`: its location (x, y) |
| action | where to look next (x, y), then a score for every class |
| reward | at the last glimpse: 1 if the highest score is the right class, else 0 |
| horizon | the number of glimpses |
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import gymnasium
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.data.classification import Images, load_images
from foveate.data.variants import canvas_size, render
from foveate.envs.single import SingleEnv
from foveate.envs.tensor_env import TensorEnv, check_choice
from foveate.geometry import to_pixels
from foveate.models.retina import Pyramid, build_pyramid, look
from foveate.types import InputError

First = Literal["random", "centre"]
Reward = Literal["right", "likelihood"]
FRAME = (255, 160, 0)  # colour of the squares in a picture
SCORE_RANGE = 10.0  # of the action space; libraries of others want finite bounds, the environment itself sets none


@dataclass(frozen=True)
class GlimpseState:
    """The image as a pyramid, its class, the place looked at, and how many glimpses were taken."""

    pyramid: Pyramid
    labels: Int[Tensor, " batch"]
    locations: Float[Tensor, "batch 2"]
    taken: Int[Tensor, " batch"]


class GlimpseEnv(TensorEnv):
    """`foveate/Glimpse-v0`.

    Args:
        num_envs: copies in lockstep.
        images: what is shown; None loads `data` from `root`.
        data: name of a set (`foveate.data.classification.DATASETS`).
        root: its folder.
        split: "train", "val", "test" or "all".
        variant: how the image is placed ("plain", "translated60", "cluttered60", "cluttered100").
        glimpses: how many glimpses there are; the last is followed by the answer.
        patch: side of a glimpse in pixels.
        scales: patches of growing width in a glimpse.
        factor: how much wider each is than the one before.
        first: the first location, "random" (not the agent's choice) or "centre".
        reward: "right" (1 or 0), or "likelihood": the softmax of the scores at the right class, which is minus the
            cross-entropy mapped into [0, 1] by exp.
        **options: of `TensorEnv`.

    Raises:
        InputError: as `load_images` and `canvas_size`; a number below 1, a patch larger than the image.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 2}  # noqa: RUF012
    chance = False

    def __init__(
        self,
        num_envs: int = 1,
        *,
        images: Images | None = None,
        data: str = "digits",
        root: str | Path | None = None,
        split: Literal["train", "val", "test", "all"] = "train",
        variant: str = "plain",
        glimpses: int = 6,
        patch: int = 8,
        scales: int = 1,
        factor: int = 2,
        first: First = "random",
        reward: Reward = "right",
        **options: Any,
    ) -> None:
        check_choice("first", first, get_args(First))
        check_choice("reward", reward, get_args(Reward))
        for name, number in ("glimpses", glimpses), ("patch", patch), ("scales", scales), ("factor", factor):
            if number < 1:
                raise InputError(f"{name}: found {number}, expected at least 1")
        if images is None:
            images = load_images(data, None if root is None else Path(root), split)
        channels, *size = images.pixels.shape[1:]
        height, width = canvas_size(variant, (size[0], size[1]))
        if patch > min(height, width):
            raise InputError(
                f"patch: {patch} pixels are more than the image's {height}x{width}; choose a smaller patch"
            )
        self.variant, self.glimpses, self.patch, self.scales = variant, glimpses, patch, scales
        self.factor, self.first, self.reward = factor, first, reward
        self.classes = len(images.classes)
        what = (scales * channels, patch, patch)
        bounds = torch.tensor([1.0, 1.0] + [SCORE_RANGE] * self.classes).numpy()
        super().__init__(
            num_envs,
            gymnasium.spaces.Dict(
                what=gymnasium.spaces.Box(0.0, 1.0, what), where=gymnasium.spaces.Box(-1.0, 1.0, (2,))
            ),
            gymnasium.spaces.Box(-bounds, bounds),
            examples=len(images),
            **options,
        )
        self.images = images.to(self.device)

    def initial(self, ids: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]) -> GlimpseState:
        """Place the images and choose where the first glimpse falls."""
        canvas = render(self.images.pixels, ids, noise.fold(keys, "canvas"), self.variant)
        if self.first == "random":
            locations = noise.uniform(noise.fold(keys, "first"), 2) * 2 - 1
        else:
            locations = torch.zeros(len(ids), 2, device=ids.device)
        pyramid = build_pyramid(canvas, self.scales, self.factor)
        return GlimpseState(pyramid, self.images.labels[ids], locations, torch.ones_like(ids))

    def transition(
        self, state: GlimpseState, actions: Float[Tensor, "batch action"], keys: Int[Tensor, " batch"]
    ) -> tuple[GlimpseState, Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """Move the eye to the clamped location, or, after the last glimpse, judge the scores."""
        terminated = state.taken >= self.glimpses
        scores = actions[:, 2:]
        if self.reward == "right":
            good = (scores.argmax(-1) == state.labels).float()
        else:
            good = scores.softmax(-1).gather(-1, state.labels[:, None]).squeeze(-1)
        moved = GlimpseState(state.pyramid, state.labels, actions[:, :2].clamp(-1, 1), state.taken + 1)
        return moved, good * terminated, terminated

    def observe(self, state: GlimpseState) -> dict[str, Tensor]:
        """What the retina sees, and where it is."""
        return {
            "what": look(state.pyramid, state.locations, self.patch, self.factor).clamp(0, 1),
            "where": state.locations,
        }

    def draw(self, state: GlimpseState) -> UInt8[Tensor, "batch height width 3"]:
        """The image, and a square around what each scale of the retina sees of it."""
        image = state.pyramid[0]
        height, width = image.shape[-2:]
        centres = to_pixels(state.locations, (height, width))[..., None, None]
        rows = torch.arange(height, device=image.device)[:, None] + 0.5
        columns = torch.arange(width, device=image.device) + 0.5
        distance = torch.maximum((columns - centres[:, 0]).abs(), (rows - centres[:, 1]).abs())
        picture = (image * 255).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
        colour = torch.tensor(FRAME, dtype=torch.uint8, device=image.device)
        for scale in range(self.scales):
            reach = self.patch * self.factor**scale / 2
            edge = (distance <= reach) & (distance > reach - 1)
            picture = torch.where(edge[..., None], colour, picture)
        return picture


class SingleGlimpseEnv(SingleEnv):
    """One copy of `GlimpseEnv`."""

    lockstep = GlimpseEnv
