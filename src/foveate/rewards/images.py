"""Rewards of pictures that were made: how they compress, how sharp they are, what they show, how much they are liked.

All take `predictions`, images in [0, 1]; `targets` are what the image was to show (class numbers, texts), where that
matters. Colourfulness is in `foveate.rewards.colors`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from foveate.types import InputError, RewardOutput

QUALITY = 95  # of JPEG, as in DDPO
FEW = 64  # images that are not worth threads


def jpeg_bytes(images: Float[Tensor, "batch channels height width"], quality: int = QUALITY) -> Float[Tensor, " batch"]:
    """Bytes of each image as Pillow writes it as JPEG, grey or RGB; in memory, a thread a core for large batches."""
    pixels = (255 * images.detach()).round().clamp(0, 255).byte().cpu()
    rows = pixels.permute(0, 2, 3, 1).squeeze(3).numpy()
    one: Callable[[Any], int] = partial(_size, quality=quality)
    if pixels[0].numel() * len(rows) < FEW * 64**2:
        sizes = list(map(one, rows))
    else:
        with ThreadPoolExecutor() as pool:  # the encoder does not hold the interpreter
            sizes = list(pool.map(one, rows))
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)


def compressibility(
    predictions: Float[Tensor, "batch channels height width"], targets: Any = None, quality: int = QUALITY
) -> RewardOutput:
    """Minus the bytes of the image as JPEG above those of a blank one of its size; 0 is a blank image.

    Black et al. 2023, section 5.1, who count kilobytes from 0. `parts` "blank" and "file", which sum to the total.

    Args:
        predictions: in [0, 1].
        targets: not used.
        quality: of JPEG.
    """
    blank = torch.full(
        (len(predictions),), float(_blank(tuple(predictions.shape[1:]), quality)), device=predictions.device
    )
    file = -jpeg_bytes(predictions, quality)
    return RewardOutput(blank + file, {"blank": blank, "file": file})


def incompressibility(
    predictions: Float[Tensor, "batch channels height width"], targets: Any = None, quality: int = QUALITY
) -> RewardOutput:
    """The bytes above a blank image's: `compressibility` with its sign turned, `parts` as well."""
    found = compressibility(predictions, targets, quality)
    return RewardOutput(-found.total, {name: -part for name, part in found.parts.items()})


def sharpness(predictions: Float[Tensor, "batch channels height width"], targets: Any = None) -> RewardOutput:
    """Variance of the Laplacian of the grey image, for pixels of 0 to 255, over 1,000.

    Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy". Borders are mirrored, as OpenCV's are.

    Args:
        predictions: in [0, 1]; of RGB the luminance is taken (Rec. 601).
        targets: not used.
    """
    weights = predictions.new_tensor([0.299, 0.587, 0.114]) if predictions.shape[1] == 3 else predictions.new_ones(1)
    grey = 255 * torch.einsum("bchw,c->bhw", predictions, weights)[:, None]
    kernel = predictions.new_tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    edges = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="reflect"), kernel)
    return RewardOutput(edges.flatten(1).var(1, correction=0) / 1000)


class ClassMatch:
    """Log-probability that a classifier gives to the class an image was to show, in nats; 0 is certainty.

    Args:
        classifier: images in [0, 1] → scores [batch, classes]; it is not trained by this.
    """

    def __init__(self, classifier: Callable[[Tensor], Tensor]) -> None:
        self.classifier = classifier

    @torch.no_grad()
    def __call__(
        self, predictions: Float[Tensor, "batch channels height width"], targets: Int[Tensor, " batch"]
    ) -> RewardOutput:
        """`targets`: the classes."""
        return RewardOutput(self.classifier(predictions).log_softmax(1).gather(1, targets[:, None]).squeeze(1))


class ClipMatch:
    """Similarity of an image and its text in CLIP: the cosine of their embeddings times 100.

    Radford et al. 2021, "Learning transferable visual models from natural language supervision"; the score is that of
    Hessel et al. 2021, "CLIPScore", without its floor and its 2.5. A CLIP that was trained on preferences (PickScore,
    Kirstain et al. 2023) makes it a learned preference.

    Args:
        folder: a CLIPModel with tokenizer and image processor, as `save_pretrained` writes them, in safetensors.
        texts: of the inputs, by number.
        device: where it computes.

    Raises:
        InputError: files are missing, or are of something else.
    """

    def __init__(self, folder: Path, texts: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.model, self.mean, self.std, self.side, tokenizer = read_clip(folder, device)
        tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(device)
        with torch.no_grad():
            self.texts = F.normalize(_pooled(self.model.get_text_features(**tokens)), dim=1)

    @torch.no_grad()
    def embed(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """Images in [0, 1] as CLIP sees them, of length 1."""
        shown = F.interpolate(images.expand(-1, 3, -1, -1), (self.side, self.side), mode="bicubic", antialias=True)
        seen = self.model.get_image_features(pixel_values=(shown.clamp(0, 1) - self.mean) / self.std)
        return F.normalize(_pooled(seen), dim=1)

    features = embed  # for `foveate.judging.Watch`

    def __call__(
        self, predictions: Float[Tensor, "batch channels height width"], targets: Int[Tensor, " batch"]
    ) -> RewardOutput:
        """`targets`: numbers of the texts."""
        return RewardOutput(100 * (self.embed(predictions) * self.texts[targets]).sum(1))


class Aesthetic:
    """A head on CLIP's embeddings of images that was trained on people's ratings, as LAION's aesthetic predictor.

    Args:
        clip: whose embeddings the head was trained on.
        weights: safetensors of linear layers one after the other, as "layers.0.weight", "layers.0.bias", "layers.2..."
            in the order of their numbers, the last with one output; nothing but dropout lies between LAION's.

    Raises:
        InputError: the file is missing, is no safetensors, or its layers do not follow on each other.
    """

    def __init__(self, clip: ClipMatch, weights: Path) -> None:
        self.clip, self.layers = clip, _linear_layers(weights)
        width = int(clip.texts.shape[1])
        if self.layers[0][0].shape[1] != width:
            raise InputError(
                f"{weights}: takes {self.layers[0][0].shape[1]} numbers, but CLIP gives {width}: use its CLIP"
            )

    @torch.no_grad()
    def __call__(self, predictions: Float[Tensor, "batch channels height width"], targets: Any = None) -> RewardOutput:
        """`targets` are not used."""
        seen = self.clip.embed(predictions)
        for weight, bias in self.layers:
            seen = F.linear(seen, weight.to(seen), bias.to(seen))
        return RewardOutput(seen.squeeze(1))


def read_clip(folder: Path, device: torch.device | str) -> tuple[Any, Tensor, Tensor, int, Any]:
    """CLIP from a folder: the model, mean and deviation of its images, their side, the tokenizer. Nothing is fetched.

    Raises:
        InputError: transformers is missing, or files are missing or of something else.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"clip: needs transformers ({error}); pip install 'foveate[diffusion]'") from error
    if not folder.is_dir() or not any(folder.glob("*.safetensors")):
        found = "no *.safetensors, and nothing is unpickled" if folder.is_dir() else "does not exist"
        raise InputError(
            f"clip: {folder}: {found}; expected what save_pretrained of a CLIPModel and its processor writes"
        )
    transformers.utils.logging.disable_progress_bar()  # a run reads it several times
    try:
        model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"clip: {folder} cannot be read: {str(error).strip().splitlines()[0]}") from error
    mean, std = (
        torch.tensor(values, device=device)[:, None, None] for values in (processor.image_mean, processor.image_std)
    )
    model = model.eval().requires_grad_(False).to(device)
    return model, mean, std, model.config.vision_config.image_size, tokenizer


def _pooled(found: Any) -> Tensor:
    """Versions of transformers give the embedding, or what has it."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _linear_layers(path: Path) -> list[tuple[Tensor, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be read as safetensors ({error}); nothing is unpickled: save it as such"
        ) from error
    names = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    names.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    layers = [(weights[f"{name}.weight"], weights.get(f"{name}.bias", torch.zeros(1))) for name in names]
    sizes = [tuple(weight.shape) for weight, _ in layers]
    fits = layers and sizes[-1][0] == 1 and all(len(size) == 2 for size in sizes)
    if not fits or any(second[1] != first[0] for first, second in pairwise(sizes)):
        raise InputError(
            f"{path}: its layers are {sizes}, expected linear ones that follow on each other, the last to 1"
        )
    return layers


def _size(pixels: Any, quality: int) -> int:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.tell()


@lru_cache(maxsize=16)
def _blank(shape: tuple[int, int, int], quality: int) -> int:
    return int(jpeg_bytes(torch.zeros(1, *shape), quality))
