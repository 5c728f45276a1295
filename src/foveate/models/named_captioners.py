"""Captioners by name: small ones of Hugging Face's classes, a folder or repository of theirs, and the user's own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from foveate.models.hf_captioner import TOKENS, TextCaptioner, adapted
from foveate.models.users import made_by
from foveate.types import InputError

SMALL = ("small", "small-blip")
EXPECTED = "small, small-blip, hf:FOLDER_OR_REPOSITORY or package.module:function"
FILES = {
    "config.json": ("config.json",),
    "a tokenizer": ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model"),
    "an image processor": ("preprocessor_config.json", "processor_config.json"),
}


def named_captioner(name: str, length: int | None = None, prompt: str = "", **sizes: int) -> TextCaptioner:
    """A captioner by its name.

    Args:
        name: one of `SMALL`, from nothing; "hf:NAME" with a folder or, if there is none, a repository of Hugging Face,
            from which transformers fetches what it does not have; or "package.module:function", a function without
            arguments that gives a `TextCaptioner`: it is imported, so its module's code runs.
        length: tokens of a caption at most; None: 20 for hf:NAME, what the function says.
        prompt: what every caption begins with, for hf:NAME.
        **sizes: of the small ones: side, patch, vocabulary, width, depth, heads.

    Raises:
        InputError: no such captioner, files that are missing or of something else, weights that are not safetensors.
    """
    where, _, which = name.partition(":")
    if where == "hf" and which:
        return _read(which, length, prompt)
    if prompt:
        raise InputError(f"prompt: found {prompt!r}, but model {name} takes none; leave it out")
    if name in SMALL:
        return small_captioner(name, length or TOKENS, **sizes)
    made = made_by(name, EXPECTED)
    if not isinstance(made, TextCaptioner):
        raise InputError(f"model: {name} gave {type(made).__name__}, expected a TextCaptioner; derive it from that")
    made.length = length or made.length
    return made


def small_captioner(
    name: str, length: int, side: int, patch: int, vocabulary: int, width: int, depth: int, heads: int
) -> TextCaptioner:
    """A ViT with a GPT-2 ("small") or a BLIP ("small-blip"), untrained, that writes a word a token.

    Args:
        name: which.
        length: words of a caption at most, with the end.
        side: of the images, in pixels.
        patch: side in pixels of what is read as one vector.
        vocabulary: words, with the end and the unknown one.
        width: of the vectors.
        depth: blocks of the encoder, and of the decoder.
        heads: of the attention.

    Raises:
        InputError: sizes that do not go into each other.
    """
    transformers = _transformers()
    if side % patch:
        raise InputError(f"image_size: {side}x{side} pixels cannot be cut into patches of {patch}")
    if width % heads:
        raise InputError(f"width: {width} is no multiple of the {heads} heads")
    marks = {"bos_token_id": vocabulary, "eos_token_id": 0}
    eye: dict[str, Any] = {
        "image_size": side,
        "patch_size": patch,
        "hidden_size": width,
        "intermediate_size": 4 * width,
    }
    eye |= {"num_hidden_layers": depth, "num_attention_heads": heads, "initializer_range": 0.02}  # BLIP's own is 1e-10
    if name == "small":
        sizes = {
            "vocab_size": vocabulary + 1,
            "n_positions": length,
            "n_embd": width,
            "n_layer": depth,
            "n_head": heads,
        }
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        decoder = transformers.GPT2Config(**sizes, **still, **marks, add_cross_attention=True, is_decoder=True)
        kind = transformers.VisionEncoderDecoderConfig
        encoder = transformers.ViTConfig(**eye, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        config = kind.from_encoder_decoder_configs(encoder, decoder, decoder_start_token_id=vocabulary, **marks)
        model = transformers.VisionEncoderDecoderModel(config)
    else:
        sizes = {"vocab_size": vocabulary + 1, "max_position_embeddings": length, "hidden_size": width}
        sizes |= {"encoder_hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
        sizes |= {"num_hidden_layers": depth, "num_attention_heads": heads, "sep_token_id": 0}
        model = transformers.BlipForConditionalGeneration(
            transformers.BlipConfig(text_config={**sizes, **marks}, vision_config=eye, projection_dim=width)
        )
    return adapted(model, None, side, length)


def _read(name: str, length: int | None, prompt: str) -> TextCaptioner:
    """A captioner from a folder, without the network, or else from a repository."""
    transformers = _transformers()
    folder = Path(name).expanduser()
    here = folder.is_dir()
    if here:
        _check_folder(folder)
    elif name.count("/") != 1 or name[0] in "./~":
        raise InputError(f"model: {name} is no folder, and no repository OWNER/NAME; correct hf:{name}")
    else:
        print(f"{name} is no folder: asking Hugging Face for a repository of that name", file=sys.stderr)
    place = str(folder) if here else name
    how = {"local_files_only": here, "trust_remote_code": False}
    kinds = {
        "vision-encoder-decoder": transformers.VisionEncoderDecoderModel,
        "blip": transformers.BlipForConditionalGeneration,
    }
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    try:
        bars.disable_progress_bar()  # a run reads it several times
        config = transformers.AutoConfig.from_pretrained(place, **how)
        if config.model_type not in kinds:
            raise InputError(f"model: {name} is a {config.model_type!r}, expected a captioner: {' or '.join(kinds)}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **how)
        processor = transformers.AutoImageProcessor.from_pretrained(place, **how)
        model, found = kinds[config.model_type].from_pretrained(
            place, **how, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        what = "cannot be read" if here else "is no folder, and cannot be had from Hugging Face"
        raise InputError(f"model: {name} {what}: {_line(error)}") from error
    finally:
        if shown:
            bars.enable_progress_bar()
    missing = sorted(key for key in found["missing_keys"] if "pooler" not in key)  # what is pooled is not read here
    if missing:
        raise InputError(f"model: {name} lacks the weights {missing[0]!r}: it is no captioner, or cut; save it anew")
    side = _side(name, processor, model)
    colors = {"mean": processor.image_mean, "std": processor.image_std}
    if not processor.do_normalize:
        colors = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    return adapted(model, tokenizer, side, length, prompt, **colors)


def _check_folder(folder: Path) -> None:
    for what, names in FILES.items():
        if not any((folder / each).is_file() for each in names):
            raise InputError(
                f"model: {folder} has no {' or '.join(names)}, expected {what}: put there what save_pretrained writes"
            )
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt")))
        raise InputError(
            f"model: {folder} has {', '.join(pickled) or 'no weights'}, expected model.safetensors, as nothing is "
            "unpickled: save it anew with save_pretrained"
        )


def _side(name: str, processor: Any, model: Any) -> int:
    """Of the square pictures that a model takes."""
    size = dict(getattr(processor, "crop_size", None) or processor.size)
    height, width = (size.get(key) or size.get("shortest_edge") for key in ("height", "width"))
    eye = model.config.vision_config if hasattr(model.config, "vision_config") else model.config.encoder
    read = getattr(eye, "image_size", height)
    read = list(read) if isinstance(read, list | tuple) else [read, read]
    if height is None or height != width or [height, width] != read:
        raise InputError(
            f"model: the image processor of {name} makes pictures of {width}x{height} pixels, the model reads "
            f"{read[1]}x{read[0]}, expected the same square: correct size in preprocessor_config.json"
        )
    return int(height)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(
            f"model: Hugging Face's captioners need transformers ({error}); pip install 'foveate[captioners]'"
        ) from error


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
