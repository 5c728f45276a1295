"""Denoisers by name: a small one, or a pipeline of diffusers in a folder or repository; and prompts in a file."""

from __future__ import annotations

from pathlib import Path

from foveate.models.diffusion import ClassDenoiser, Denoiser, diffusers, small_unet
from foveate.models.low_rank import ATTENTION, CONVOLUTIONS, add_low_rank
from foveate.types import InputError

SMALL = "small"


def named_denoiser(
    model: str,
    denoising: int,
    eta: float,
    guidance: float,
    piece: int,
    scheduler: str,
    lora: int,
    widths: tuple[int, ...],
    channels: int | None,
    classes: tuple[str, ...] | None,
    prompts: Path | None,
    image_size: int | None,
) -> Denoiser:
    """A denoiser by its name; the fields are those of `foveate train diffusion`.

    Raises:
        InputError: no such model, files that are missing or of something else, or fields that do not fit it.
    """
    if model == SMALL:
        package = diffusers()
        kind = package.DDPMScheduler if scheduler == "ddpm" else package.DDIMScheduler
        # the cosine of Nichol and Dhariwal 2021, from pure noise on, so that few steps do
        schedule = kind(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing")
        assert image_size is not None
        assert channels is not None
        network = small_unet(image_size, channels, len(classes or ()), widths)
        policy: Denoiser = ClassDenoiser(
            network, schedule, denoising, (channels, image_size, image_size), eta, guidance, piece
        )
        targets: tuple[str, ...] = (*ATTENTION, *CONVOLUTIONS)
    else:
        raise InputError(f"model: no {model!r}")
    if lora:
        add_low_rank(policy.network, lora, targets)
    return policy


def read_prompts(path: Path) -> tuple[str, ...]:
    """A prompt a line, as UTF-8; an empty last line is none.

    Raises:
        InputError: the file is missing, is no text, is empty, or has an empty line.
    """
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompts: {path} cannot be read as UTF-8 text ({error}): correct --prompts") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            what = "is empty" if len(lines) == 1 else f"line {number} is empty"
            raise InputError(f"prompts: {path}: {what}, expected a prompt a line: fill it or delete it")
    return tuple(line.strip() for line in lines)
