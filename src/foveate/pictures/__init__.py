"""Drawings: where an agent looked, what it saw on the way, and what was found. Everything is a Pillow image.

Images are [batch, channels, height, width] in [0, 1], grey or RGB.
"""

from foveate.pictures.canvas import MARGIN, image_grid, save_gif, sentence_grid
from foveate.pictures.glimpses import UNSEEN, box_walks, glimpse_frames, glimpse_paths
from foveate.pictures.objects import box_grid, painted, segment_grid
from foveate.pictures.tracks import track_frames, track_grid
from foveate.pictures.videos import mask_tiles, spread, step_frames, tile_grid

__all__ = [
    "MARGIN",
    "UNSEEN",
    "box_grid",
    "box_walks",
    "glimpse_frames",
    "glimpse_paths",
    "image_grid",
    "mask_tiles",
    "painted",
    "save_gif",
    "segment_grid",
    "sentence_grid",
    "spread",
    "step_frames",
    "tile_grid",
    "track_frames",
    "track_grid",
]
