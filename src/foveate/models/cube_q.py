"""Networks that look into volumes: values of steps from a cube of voxels, and a regressor of landmarks from the whole.

The layers that look are shared by all landmarks and scales; each landmark has its own head at each scale (Ghesu et al.
2019 train a network for each of both, Vlontzos et al. 2019, "Multiple landmark detection using multi-agent
reinforcement learning", share the layers below the heads).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from foveate.types import InputError


class CubeQ(nn.Module):
    """Values of the six steps, by dueling heads (Wang et al. 2016, equation 9).

    Beside them, from the same features, a belief where the landmark lies. The values are told it and do not teach it.

    Args:
        cube: voxels on the side of what is seen.
        landmarks: how many.
        scales: how many.
        width: channels of the first layer.
        hidden: width of the layer below the heads.
        actions: how many.

    Attributes:
        mean: landmarks in parts of their volume's size, over those trained on: where walks begin.
    """

    mean: Tensor

    def __init__(
        self, cube: int, landmarks: int, scales: int, width: int = 24, hidden: int = 128, actions: int = 6
    ) -> None:
        super().__init__()
        if cube < 7:
            raise InputError(f"cube: found {cube}, expected at least 7 voxels for the network's layers")
        self.landmarks, self.scales, self.actions = landmarks, scales, actions
        side = (cube - 3) // 2  # where things lie in the cube is kept: it says where to go
        self.look = nn.Sequential(
            nn.Conv3d(2, width, 3, stride=2),
            nn.ReLU(),
            nn.Conv3d(width, 2 * width, 2),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.tell = nn.Linear(2 * width * side**3, hidden)
        self.kind = nn.Linear(landmarks + scales, 2 * hidden, bias=False)
        self.join = nn.Linear(hidden + 6, hidden)
        self.belief = nn.Linear(hidden, landmarks * scales * 3)
        self.heads = nn.Linear(hidden + 3, landmarks * scales * (1 + actions))
        self.register_buffer("mean", torch.full((landmarks, 3), 0.5))

    def forward(self, seen: dict[str, Tensor]) -> Float[Tensor, "batch actions"]:
        """Values of what `LandmarkWalkEnv.observe` shows."""
        return self.both(seen)[0]

    def both(self, seen: dict[str, Tensor]) -> tuple[Float[Tensor, "batch actions"], Float[Tensor, "batch 3"]]:
        """Values, and how many steps of the scale the landmark is believed to be away along x, y, z."""
        cube = seen["cube"]
        # contrast differs between scanners: what is seen is told by its differences
        mean = cube.mean((2, 3, 4), keepdim=True)
        spread = (cube.square().mean((2, 3, 4), keepdim=True) - mean.square()).clamp(min=0).sqrt()  # faster than `std`
        cube = (cube - mean) / (spread + 0.1)
        kind = torch.cat((seen["landmark"], seen["scale"]), 1)
        factor, shift = self.kind(kind).chunk(2, 1)  # what is looked for decides what of it matters
        features = F.relu(self.tell(self.look(cube)) * (1 + factor) + shift)
        features = F.relu(self.join(torch.cat((features, self._off(seen)), 1)))
        belief = self._mine(self.belief(features), seen)
        told = (belief.detach() / 2).tanh()  # near the landmark it matters
        mine = self._mine(self.heads(torch.cat((features, told), 1)), seen)
        worth, gain = mine[:, :1], mine[:, 1:]
        return worth + gain - gain.mean(1, keepdim=True), belief

    def _mine(self, every: Float[Tensor, "batch heads"], seen: dict[str, Tensor]) -> Float[Tensor, "batch numbers"]:
        """What the heads of the landmark that is looked for say at its scale."""
        every = every.view(len(every), self.landmarks, self.scales, -1)
        return torch.einsum("blsa,bl,bs->ba", every, seen["landmark"], seen["scale"])

    def _off(self, seen: dict[str, Tensor]) -> Float[Tensor, "batch 6"]:
        """How far the place is from the landmark's mean, in eighths of what is shown and in about as many steps."""
        off = 8 * (seen["place"] - seen["landmark"] @ self.mean)
        steps = 2.0 ** -torch.arange(self.scales, device=off.device)
        return torch.cat((off, (8 * off * (seen["scale"] @ steps)[:, None]).clamp(-8, 8)), 1)


class VolumeRegressor(nn.Module):
    """Landmarks straight from the whole volume: three convolutions with stride 2 and a layer, of about `CubeQ`'s size.

    Args:
        side: of the cube to which volumes are stretched.
        landmarks: how many.
        width: channels of the first layer.
        hidden: width of the last.
    """

    def __init__(self, side: int, landmarks: int, width: int = 16, hidden: int = 128) -> None:
        super().__init__()
        self.side, self.landmarks = side, landmarks
        layers: list[nn.Module] = []
        channels = 1
        for level in range(3):
            layers += [nn.Conv3d(channels, width << level, 3, 2, 1), nn.GroupNorm(4, width << level), nn.ReLU()]
            channels = width << level
            side = (side + 1) // 2
        self.look = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side**3, hidden), nn.ReLU())
        self.point = nn.Linear(hidden, landmarks * 3)
        nn.init.zeros_(self.point.weight)
        nn.init.constant_(self.point.bias, 0.5)

    def forward(self, volumes: UInt8[Tensor, "batch 1 side side side"]) -> Float[Tensor, "batch landmarks 3"]:
        """Landmarks x, y, z in parts of the volume's size; volumes are those of `stretched`."""
        return self.point(self.look(volumes.float() / 255)).view(-1, self.landmarks, 3)

    @torch.no_grad()
    def points(
        self, volumes: UInt8[Tensor, "batch 1 side side side"], sizes: Int[Tensor, "batch 3"]
    ) -> Float[Tensor, "batch landmarks 3"]:
        """Landmarks in voxels of volumes of these sizes."""
        self.eval()
        found = torch.cat([self(some) for some in volumes.split(32)])
        return found * (sizes[:, None] - 1)


@torch.no_grad()
def stretched(
    volumes: UInt8[Tensor, "batch depth height width"], sizes: Int[Tensor, "batch 3"], side: int, at_once: int = 16
) -> UInt8[Tensor, "batch 1 side side side"]:
    """Volumes (x, y, z voxels `sizes` of each; the rest is padding) stretched to cubes, smoothed if that is coarser."""
    pairs = zip(volumes.split(at_once), sizes.split(at_once), strict=True)
    return torch.cat([_stretched(some[:, None].float(), mine, side) for some, mine in pairs]).round().to(torch.uint8)


def _stretched(volumes: Tensor, sizes: Tensor, side: int) -> Tensor:
    while min(volumes.shape[2:]) > 1.5 * side:
        volumes = F.avg_pool3d(volumes, 3, 1, 1, count_include_pad=False)[:, :, ::2, ::2, ::2]
        sizes = (sizes + 1) // 2
    line = torch.linspace(0, 1, side, device=volumes.device)
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    ends = (sizes - 1) / (torch.tensor(volumes.shape[:1:-1], device=volumes.device) - 1).clamp(min=1)
    where = torch.stack((x, y, z), -1) * ends[:, None, None, None] * 2 - 1
    return F.grid_sample(volumes, where, align_corners=True)
