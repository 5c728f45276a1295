"""Detectors of others as `foveate.models.candidates.Detector`: torchvision's SSD, RetinaNet and Faster R-CNN, and the
DETR family of Hugging Face.

    policy = Candidates(adapted(ssdlite320_mobilenet_v3_large(num_classes=21), 20), 20)

They keep their own way of preparing images, and get them as they get all: in [0, 1]. While answering they are in
evaluation mode whatever the module around them; only their supervised losses need the other one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD

from foveate.geometry import Boxes
from foveate.models.candidates import Detector, Proposals, at, clipped, likeliest, proposed
from foveate.models.cells import Cells
from foveate.models.users import made_by
from foveate.types import InputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the DETR family takes images
FAMILIES = "torchvision's SSD, RetinaNet or Faster R-CNN, or one of Hugging Face with logits and pred_boxes"


class Adapter(Detector):
    """A detector of others, within.

    Args:
        model: the detector.
        still: whether its batch statistics stand still in the supervised losses too, as those of pretrained weights do.
    """

    def __init__(self, model: nn.Module, still: bool = True) -> None:
        super().__init__()
        self.model: Any = model.eval()
        self.still = still

    def train(self, mode: bool = True) -> Adapter:
        """The detector stays in evaluation mode: in the other one torchvision's give losses instead of boxes."""
        super().train(mode)
        self.model.eval()
        return self

    def backbone(self) -> Iterator[nn.Parameter]:
        """What stands under a name with "backbone" in it."""
        return (weight for name, weight in self.model.named_parameters() if "backbone" in name)

    def loss(self, images: Float[Tensor, "batch 3 height width"], targets: Boxes) -> dict[str, Float[Tensor, ""]]:
        """The model's own losses, without crowds."""
        targets = replace(targets, mask=targets.wanted)
        self.model.train()
        for module in self.model.modules():
            if self.still and isinstance(module, _BatchNorm):
                module.eval()
        try:
            return self._loss(images, targets)
        finally:
            self.model.eval()

    def _loss(self, images: Tensor, targets: Boxes) -> dict[str, Tensor]:
        # torchvision takes a list of images, each with the boxes it has
        sets = zip(targets.boxes, targets.labels, targets.mask, strict=True)
        wanted = [{"boxes": boxes[mask], "labels": labels[mask] + 1} for boxes, labels, mask in sets]
        return dict(self.model(list(images), wanted))

    def _features(self, images: Tensor) -> tuple[ImageList, dict[str, Tensor], Tensor]:
        """Images as torchvision prepares them, their maps, and by how much to multiply boxes to have them back."""
        ready, _ = self.model.transform(list(images))
        features = self.model.backbone(ready.tensors)
        features = {"0": features} if isinstance(features, Tensor) else features
        height, width = ready.image_sizes[0]
        back = images.new_tensor([images.shape[-1] / width, images.shape[-2] / height] * 2)
        return ready, features, back


class Anchors(Adapter):
    """torchvision's SSD and RetinaNet: a candidate is an anchor."""

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], places: tuple[Tensor, Bool[Tensor, "batch count"]] | None
    ) -> Proposals:
        """The likeliest anchors, or those of given places."""
        ready, features, back = self._features(images)
        maps = list(features.values())
        found = self.model.head(maps)
        anchors = torch.stack(self.model.anchor_generator(ready, maps))
        scores, deltas = found["cls_logits"].float(), found["bbox_regression"].float()
        boxes = self.model.box_coder.decode_single(deltas.flatten(0, 1), anchors.flatten(0, 1)).view_as(deltas)
        if isinstance(self.model, SSD):
            logits = scores.roll(-1, -1)  # being nothing stands first there
        else:
            logits = torch.cat((scores[..., 1:], torch.zeros_like(scores[..., :1])), -1)
        return proposed(clipped(boxes * back, images), logits, places, self)


class Regions(Adapter):
    """torchvision's Faster R-CNN: a candidate is a proposal of the first stage, with the box of its likeliest class."""

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], places: tuple[Any, Bool[Tensor, "batch count"]] | None
    ) -> Proposals:
        """The likeliest proposals; or those of given places, which are their boxes and the class whose box it is."""
        ready, features, back = self._features(images)
        if places is None:
            several = self.model.rpn(ready, features)[0]
            regions = nn.utils.rnn.pad_sequence(several, batch_first=True)
            there = nn.utils.rnn.pad_sequence([torch.ones_like(one[:, 0]) for one in several], batch_first=True) > 0
        else:
            regions, there = places[0]["regions"], places[1]
        pooled = self.model.roi_heads.box_roi_pool(features, list(regions), ready.image_sizes)
        scores, deltas = self.model.roi_heads.box_predictor(self.model.roi_heads.box_head(pooled))
        boxes = self.model.roi_heads.box_coder.decode(deltas.float(), list(regions))
        logits = scores.float().roll(-1, -1).unflatten(0, regions.shape[:2])
        of_class = boxes.unflatten(0, regions.shape[:2])[:, :, 1:] if boxes.ndim == 3 else boxes.unsqueeze(2)
        kind = logits[..., :-1].argmax(-1) if places is None else places[0]["kind"]
        boxes = clipped(of_class.gather(2, kind[..., None, None].expand(-1, -1, -1, 4)).squeeze(2) * back, images)
        if places is not None:
            return Proposals(boxes, logits, places[1], places[0])
        chosen, mask = likeliest(
            boxes.masked_fill(~there[..., None], 0.0), logits, self.count, self.overlap, self.least
        )
        named = {"regions": at(chosen, regions), "kind": kind.gather(1, chosen)}
        return Proposals(at(chosen, boxes), at(chosen, logits), mask, named)


class Queries(Adapter):
    """Hugging Face's object detectors (DETR and those after it): a candidate is a query, whatever it overlaps."""

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], places: tuple[Tensor, Bool[Tensor, "batch count"]] | None
    ) -> Proposals:
        """The likeliest queries, or those of given places."""
        found = self.model(pixel_values=_normalised(images))
        logits = found.logits.float()
        if logits.shape[-1] == self.model.config.num_labels:  # a sigmoid for each class
            logits = torch.cat((logits, torch.zeros_like(logits[..., :1])), -1)
        centre, sides = found.pred_boxes.float().split(2, -1)
        scale = images.new_tensor([images.shape[-1], images.shape[-2]] * 2)
        boxes = clipped(torch.cat((centre - sides / 2, centre + sides / 2), -1) * scale, images)
        chosen, mask = places or likeliest(boxes, logits, self.count, 1.0, self.least)
        return Proposals(at(chosen, boxes), at(chosen, logits), mask, chosen)

    def _loss(self, images: Tensor, targets: Boxes) -> dict[str, Tensor]:
        scale = images.new_tensor([images.shape[-1], images.shape[-2]])
        low, high = targets.boxes[..., :2] / scale, targets.boxes[..., 2:] / scale
        parts = torch.cat(((low + high) / 2, high - low), -1)
        sets = zip(parts, targets.labels, targets.mask, strict=True)
        wanted = [{"boxes": boxes[mask], "class_labels": labels[mask]} for boxes, labels, mask in sets]
        return {"loss": self.model(pixel_values=_normalised(images), labels=wanted).loss}


def adapted(model: nn.Module, still: bool = True) -> Detector:
    """A detector of a known family as one of ours; one of ours as it is.

    Raises:
        InputError: it is of no known family.
    """
    if isinstance(model, Detector):
        return model
    if hasattr(model, "roi_heads"):
        return Regions(model, still)
    if isinstance(model, SSD | RetinaNet):
        return Anchors(model, still)
    if hasattr(getattr(model, "config", None), "num_labels"):
        return Queries(model, still)
    raise InputError(f"model: found {type(model).__name__}, expected {FAMILIES}; or derive it from Detector")


def named(name: str, classes: int, still: bool = False, **cells: Any) -> Detector:
    """A detector by its name, untrained.

    Args:
        name: "cells", "torchvision:NAME" of `torchvision.models.detection`, or "package.module:function", which is
            called with the number of classes and gives a detector of a known family.
        classes: how many, none not counted.
        still: the batch statistics of a detector of torchvision stand still, for weights that are trained already.
        **cells: further settings of `models.cells.Cells`.

    Raises:
        InputError: no such model or function, or what it gives is of no known family.
    """
    if name == "cells":
        return Cells(classes, **cells)
    module, _, function = name.partition(":")
    if module == "torchvision":
        every = torchvision.models.list_models(torchvision.models.detection)
        known = [one for one in every if one.startswith(("fasterrcnn", "retinanet", "ssd"))]
        if function not in known:
            raise InputError(f"model: torchvision has no detector {function!r}; it has {', '.join(known)}")
        model = torchvision.models.get_model(function, weights=None, weights_backbone=None, num_classes=classes + 1)
        return adapted(model, still)
    return adapted(made_by(name, "cells, torchvision:NAME or package.module:function", classes))


def load_weights(detector: Detector, path: Path) -> None:
    """Give a detector the weights of a safetensors file, under the names that the model itself has for them.

    Raises:
        InputError: the file is missing or damaged, or its tensors are not those of the model.
    """
    inner: nn.Module = detector.model if isinstance(detector, Adapter) else detector
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"weights: {path} is not a readable safetensors file ({error})") from error
    own = inner.state_dict()
    wrong = sorted(set(own) ^ set(found)) or [key for key in own if own[key].shape != found[key].shape]
    if wrong:
        shapes = [list(state[wrong[0]].shape) if wrong[0] in state else "nothing" for state in (found, own)]
        raise InputError(f"weights: {path} has {shapes[0]} under {wrong[0]!r}, the model {shapes[1]}: not its weights")
    inner.load_state_dict(found)


def take_coco(detector: Detector, name: str) -> None:
    """Give a detector of torchvision what it has learned on COCO, but for layers that depend on the classes.

    torchvision downloads the weights if it does not have them.

    Raises:
        InputError: another kind of detector, or the weights cannot be had.
    """
    if not (isinstance(detector, Adapter) and name.startswith("torchvision:")):
        raise InputError(f"pretrained: found model {name!r}, expected torchvision:NAME; give --weights FILE instead")
    try:
        weights = torchvision.models.get_model_weights(name.partition(":")[2])
        found = weights.DEFAULT.get_state_dict(progress=False)
    except OSError as error:
        raise InputError(f"pretrained: the weights of {name} cannot be had ({error})") from error
    own = detector.model.state_dict()
    fitting = {key: value for key, value in found.items() if key in own and own[key].shape == value.shape}
    detector.model.load_state_dict(fitting, strict=False)


def _normalised(images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std
