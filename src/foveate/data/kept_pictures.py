"""Pictures kept in a folder as PNG: each once, named by its content."""

from __future__ import annotations

import hashlib
import io
import os
import re
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from foveate.types import InputError


def keep(folder: Path, picture: UInt8[Tensor, "3 height width"]) -> str:
    """Write a picture, if it is not there; the name of its file."""
    from PIL import Image

    name = hashlib.sha256(str(tuple(picture.shape)).encode() + picture.numpy().tobytes()).hexdigest()[:32] + ".png"
    path = file_of(folder, name)
    if not path.exists():
        folder.mkdir(exist_ok=True)
        encoded = io.BytesIO()
        Image.fromarray(picture.movedim(0, 2).contiguous().numpy()).save(encoded, "PNG")
        partial = path.with_name(f".{name}.{os.getpid()}")
        partial.write_bytes(encoded.getvalue())
        partial.replace(path)
    return name


def file_of(folder: Path, name: str) -> Path:
    """Where a picture of this name lies.

    Raises:
        InputError: `keep` gives no such name, so that it may lead elsewhere.
    """
    if not re.fullmatch(r"[0-9a-f]{32}\.png", name):
        raise InputError(f"{folder}: found a picture {name!r}, expected a hash; what names it was tampered with")
    return folder / name


def read_kept(folder: Path, name: str, size: str | None) -> UInt8[Tensor, "3 height width"]:
    """A picture that was kept; `size` is that of all, as `size_of` tells it.

    Raises:
        InputError: the file is missing, no PNG, or of another size.
    """
    from PIL import Image

    path = file_of(folder, name)
    try:
        with Image.open(path, formats=("PNG",)) as picture:  # reads the header alone
            found = f"{picture.width}x{picture.height}"
            if found != size:
                raise InputError(f"{path}: found {found} pixels, expected {size} as the others; compare anew")
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be read ({error}); copy the folder again, or compare anew") from error
    return torch.from_numpy(pixels.copy()).movedim(2, 0).contiguous()


def size_of(picture: UInt8[Tensor, "3 height width"]) -> str:
    """Width and height, as in 32x24."""
    return f"{picture.shape[2]}x{picture.shape[1]}"
