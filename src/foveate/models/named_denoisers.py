"""Denoisers by name: a small one, or a pipeline of diffusers in a folder or repository; and prompts in a file."""

from __future__ import annotations

from pathlib import Path

from foveate.models.diffusion import ClassDenoiser, Denoiser, diffusers, small_unet
from foveate.models.low_rank import ATTENTION, CONVOLUTIONS, add_low_rank
from foveate.models.pipelines import read_pipeline
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
    at_once: int | None,
) -> Denoiser:
    """A denoiser by its name; the fields are those of `foveate train diffusion`.

    Raises:
        InputError: no such model, files that are missing or of something else, or fields that do not fit it.
    """
    where, _, which = model.partition(":")
    if model == SMALL:
        package = diffusers()
        kind = package.DDPMScheduler if scheduler == "ddpm" else package.DDIMScheduler
        # the cosine of Nichol and Dhariwal 2021, from pure noise on, so that few steps do
        schedule = kind(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing")
        assert image_size is not None
        assert channels is not None
        shape = (channels, image_size, image_size)
        network = small_unet(image_size, channels, len(classes or ()), widths)
        policy: Denoiser = ClassDenoiser(network, schedule, denoising, shape, eta, guidance, piece)
    elif where == "hf" and which:
        texts = None if prompts is None else read_prompts(prompts)
        policy = read_pipeline(which, texts, denoising, scheduler, eta=eta, guidance=guidance, chunk=piece)
        if isinstance(policy, ClassDenoiser) and classes is not None:
            check_classes(policy, model, classes)
    else:
        raise InputError(f"model: no {model!r}, expected {SMALL} or hf:FOLDER_OR_REPOSITORY; correct --model")
    policy.at_once = at_once
    if lora:
        add_low_rank(
            policy.network, lora, (*ATTENTION, *CONVOLUTIONS) if isinstance(policy, ClassDenoiser) else ATTENTION
        )
        policy.light = model != SMALL
    return policy


def check_classes(policy: ClassDenoiser, model: str, classes: tuple[str, ...]) -> None:
    """A network that is told classes must know those of the data, and maybe one more that means none.

    Raises:
        InputError: it knows more or fewer.
    """
    if policy.classes not in (None, len(classes), len(classes) - 1):
        known = (policy.classes or 0) + 1
        raise InputError(
            f"model: {model} is told {known} classes, expected {len(classes)}, or one more that means none"
        )


def check_drawn(policy: Denoiser, model: str, data: tuple[int | None, int | None, int | None]) -> None:
    """Data of another shape (channels, rows, columns; None: any) than what is drawn teaches nothing.

    Raises:
        InputError: they differ.
    """
    wanted = tuple(drawn if size is None else size for size, drawn in zip(data, policy.image, strict=True))
    if wanted != policy.image:
        raise InputError(
            f"data: {wanted} (channels, rows, columns), but {model} draws {policy.image}: leave --image-size out, and "
            "convert grey pictures or coloured ones"
        )


def read_prompts(path: Path) -> tuple[str, ...]:
    """A prompt a line, as UTF-8.

    Raises:
        InputError: the file is missing, is no text, is empty, or has an empty line.
    """
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompts: {path} cannot be read as UTF-8 text ({error}): correct --prompts") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            what = "is empty" if len(lines) == 1 else f"line {number} is empty"
            raise InputError(f"prompts: {path}: {what}, expected a prompt a line: fill it or delete it")
    return tuple(line.strip() for line in lines)
