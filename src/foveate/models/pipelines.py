"""Pipelines of diffusers as samplers: what stands in a folder, a part after the other, or in a repository.

    policy = read_pipeline("models/stable-diffusion", prompts=("a red square", "a blue disk"), steps=20, guidance=5)

Two kinds are known: a `UNet2DModel` with its scheduler (DDPMPipeline, DDIMPipeline), and a `UNet2DConditionModel` with
text encoder, tokenizer and, if it works in latents, a VAE (StableDiffusionPipeline). Weights are read from
safetensors alone; nothing is unpickled, and no code of a repository is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.models.diffusion import ClassDenoiser, Denoiser, diffusers
from foveate.types import InputError, Tree

INDEX = "model_index.json"
NEEDED = {
    "UNet2DModel": ("unet", "scheduler"),
    "UNet2DConditionModel": ("unet", "scheduler", "text_encoder", "tokenizer"),
}
OPTIONAL: dict[str, tuple[str, ...]] = {"UNet2DModel": (), "UNet2DConditionModel": ("vae",)}
KNOWN = {  # part → what it may be; schedulers say themselves what they are not
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "vae": ("AutoencoderKL",),
}
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
COPIES = ("*.fp16*", "*.non_ema*")  # of weights that are there as well


class TextDenoiser(Denoiser):
    """A `UNet2DConditionModel` that is told a prompt: `inputs` are their numbers, the last is the empty one.

    The text encoder has done its work before: what it made of the prompts is all that stays of it. Other arguments are
    those of `Denoiser`.

    Args:
        network: what takes off noise.
        scheduler: whose steps are drawn.
        prompts: encoded, the empty one last.
        vae: between latents and images; None: it works on pixels.
    """

    prompts: Tensor

    def __init__(
        self,
        network: Any,
        scheduler: Any,
        prompts: Float[Tensor, "prompts tokens features"],
        vae: Any | None,
        *arguments: Any,
        **how: Any,
    ) -> None:
        super().__init__(network, scheduler, *arguments, **how)
        self.register_buffer("prompts", prompts, persistent=False)
        self.classes = len(prompts) - 1
        self._vae = [vae]  # in a list: it never learns, and belongs to no checkpoint
        if vae is not None:
            vae.eval().requires_grad_(False)
            factor = 2 ** (len(vae.config.block_out_channels) - 1)
            self.image = (vae.config.out_channels, self.shape[1] * factor, self.shape[2] * factor)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """The VAE goes where the network goes."""
        if self._vae[0] is not None:
            self._vae[0]._apply(function)
        return super()._apply(function, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> Denoiser:
        """A copy, which shares the VAE."""
        memo[id(self._vae[0])] = self._vae[0]
        return super().__deepcopy__(memo)

    def conditions(self, inputs: Int[Tensor, " batch"]) -> Tree:
        """What the text encoder made of the prompts."""
        return self.prompts[inputs]

    def without(self, conditions: Tree) -> Tree:
        """What it made of the empty one."""
        return self.prompts[-1].expand_as(conditions)

    def output(
        self, x: Float[Tensor, "rows channels height width"], times: Int[Tensor, " rows"], conditions: Tree
    ) -> Float[Tensor, "rows channels height width"]:
        """What the network makes of x."""
        return self.network(x, times, encoder_hidden_states=conditions, return_dict=False)[0]

    def encode(self, images: Float[Tensor, "rows channels height width"]) -> Tensor:
        """Images in [0, 1] as latents: the mean of the VAE's."""
        vae, pixels = self._vae[0], super().encode(images)
        if vae is None:
            return pixels
        with torch.no_grad():
            means = [vae.encode(some).latent_dist.mean for some in pixels.split(self.together())]
            return (torch.cat(means) - _shift(vae)) * vae.config.scaling_factor

    def finish(self, x: Float[Tensor, "rows channels height width"]) -> Float[Tensor, "rows colors tall wide"]:
        """Images in [0, 1] of latents."""
        vae = self._vae[0]
        if vae is None:
            return super().finish(x)
        ready = (x / vae.config.scaling_factor + _shift(vae)).split(self.together())
        return super().finish(torch.cat([vae.decode(some, return_dict=False)[0].float() for some in ready]))


def read_pipeline(
    name: str, prompts: Sequence[str] | None, steps: int, scheduler: str = "own", **how: Any
) -> ClassDenoiser | TextDenoiser:
    """A denoiser from a folder, without the network, or else from a repository of Hugging Face, which is downloaded.

    Args:
        name: of the folder or repository.
        prompts: for a pipeline with a text encoder.
        steps: from noise to image.
        scheduler: "own", or "ddim" or "ddpm" with the noise of its own.
        **how: eta, guidance and chunk of `Denoiser`.

    Raises:
        InputError: parts are missing, unknown or of other kinds, weights that are no safetensors, latents without what
            makes images of them, prompts for a pipeline that reads none or the other way round.
    """
    package, folder = diffusers(), Path(name).expanduser()
    here = folder.is_dir()
    folder = folder if here else _fetched(name, [INDEX])
    parts = _parts(_json(folder / INDEX, name), name)
    kind = parts["unet"]
    if (prompts is None) != (kind == "UNet2DModel"):
        remedy = "reads prompts: add --prompts FILE" if prompts is None else "reads none: leave prompts out"
        raise InputError(f"prompts: {name} with its {kind} {remedy}")
    folder = folder if here else _fetched(name, [f"{part}/{files}" for part in parts for files in FILES])
    for part in parts:
        if not (folder / part).is_dir():
            raise InputError(f"model: {name} has no {part!r}, expected {', '.join(parts)}: save the whole pipeline")
    network = _part(getattr(package, kind), folder / "unet", name)
    drawn = _scheduler(package, folder / "scheduler", name, scheduler)
    side = network.config.sample_size
    sides = (side, side) if isinstance(side, int) else tuple(side or ())
    if len(sides) != 2:
        raise InputError(f"model: {name} says no sample_size; set it in unet/config.json")
    shape = (network.config.in_channels, *sides)
    if "vae" not in parts and shape[0] not in (1, 3):
        raise InputError(
            f"model: {name} denoises {shape[0]} channels and has no 'vae' that makes images of them, expected 1 or 3: "
            "save the whole pipeline"
        )
    if prompts is None:
        return ClassDenoiser(network, drawn, steps, shape, **how)
    vae = _part(package.AutoencoderKL, folder / "vae", name) if "vae" in parts else None
    return TextDenoiser(network, drawn, encoded(folder, name, prompts), vae, steps, shape, **how)


@torch.no_grad()
def encoded(folder: Path, name: str, prompts: Sequence[str]) -> Float[Tensor, "prompts tokens features"]:
    """The prompts of a pipeline's text encoder, and the empty one."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # a run reads it several times
    encoder = _part(transformers.CLIPTextModel, folder / "text_encoder", name)
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"model: {name}: its tokenizer cannot be read: {_line(error)}") from error
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    ids = tokenizer([*prompts, ""], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return torch.cat([encoder.eval()(some)[0] for some in ids["input_ids"].split(50)])


def _fetched(name: str, files: Sequence[str]) -> Path:
    """The folder to which files of a repository are downloaded, if they are not there yet."""
    if name.count("/") != 1 or name[0] in "./~":
        raise InputError(f"model: {name} is no folder, and no repository OWNER/NAME; correct hf:{name}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=list(COPIES)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(f"model: {name} is no folder, and cannot be fetched: {_line(error)}") from error


def _parts(index: dict[str, Any], name: str) -> dict[str, str]:
    """Part → its class, of what draws; an index that lists anything else would draw other images than without it."""
    listed = {part: kind for part, kind in index.items() if isinstance(kind, list) and len(kind) == 2 and kind[1]}
    found = {part: str(kind[1]) for part, kind in listed.items() if part not in UNUSED}
    kind = found.get("unet", "none")
    if kind not in NEEDED:
        raise InputError(f"model: {name} has the denoiser {kind!r}, expected one of {', '.join(NEEDED)}")
    needed = NEEDED[kind]
    for part in needed:
        if part not in found:
            raise InputError(f"model: {name} has no {part!r}, expected {', '.join(needed)}: save the whole pipeline")
    for part, of in found.items():
        if part not in (*needed, *OPTIONAL[kind]):
            raise InputError(
                f"model: {name} draws by {part!r} too, a {of}, expected {', '.join((*needed, *OPTIONAL[kind]))} alone"
            )
        if of not in KNOWN.get(part, (of,)):
            raise InputError(f"model: the {part} of {name} is a {of}, expected {' or '.join(KNOWN[part])}")
    return {part: found[part] for part in (*needed, *found)}


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise InputError(
            f"model: {name} has no readable {path.name} ({error}): put there what save_pretrained of a pipeline writes"
        ) from error


def _part(kind: Any, folder: Path, name: str) -> Any:
    from safetensors import SafetensorError

    if not any(folder.glob("*.safetensors")):
        pickled = ", ".join(sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.ckpt"))))
        raise InputError(
            f"model: {name}: {folder.name} has {pickled or 'no weights'}, expected safetensors, as nothing is "
            "unpickled: save it anew with save_pretrained"
        )
    try:
        return kind.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model: {name}: its {folder.name} cannot be read: {_line(error)}") from error


def _scheduler(package: Any, folder: Path, name: str, asked: str) -> Any:
    config = _json(folder / "scheduler_config.json", name)
    kind = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}.get(asked, str(config.get("_class_name")))
    if not hasattr(package, kind):
        raise InputError(f"model: {name}: no scheduler {kind!r} in diffusers; add --scheduler ddim")
    return getattr(package, kind).from_config(config)


def _shift(vae: Any) -> float:
    return float(getattr(vae.config, "shift_factor", None) or 0.0)


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
