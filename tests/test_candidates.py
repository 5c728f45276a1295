"""Detectors as policies: candidates, sets, adapters, the credit of single boxes."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import foveate
from foveate import noise
from foveate.cli import main
from foveate.data.zoom import LEFT, zoomed
from foveate.geometry import Boxes, overlaps
from foveate.learn.answers import repeat, reward_loss, score
from foveate.learn.baselines import MovingAverage
from foveate.learn.settings import Tuning
from foveate.models.adapters import Adapter, adapted, load_weights, named, take_coco
from foveate.models.candidates import Candidates, ClassAndBox, Detector, Proposals, likeliest, to_boxes, to_numbers
from foveate.models.cells import Cells, taught
from foveate.rewards.boxes import DetectionReward, average_precision, class_weights
from foveate.rewards.sets import above, box_by_box, placing_loss, set_scores, without_each
from foveate.run import Run
from foveate.systems import tune_detector
from foveate.types import InputError, RewardOutput, map_tree

CLASSES = 2


class _Eye(nn.Sequential):
    out_channels = 8

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))


def _retina() -> nn.Module:
    anchors = AnchorGenerator(((12, 24),), ((1.0,),))
    return RetinaNet(_Eye(), CLASSES + 1, min_size=32, max_size=32, anchor_generator=anchors)


def _faster() -> nn.Module:
    return FasterRCNN(
        _Eye(),
        CLASSES + 1,
        min_size=48,
        max_size=48,
        rpn_anchor_generator=AnchorGenerator(((12, 24),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
    )


class Detr(nn.Module):
    """The interface of Hugging Face's DETR: pixel_values and labels in, logits, pred_boxes and loss out."""

    def __init__(self, none: int = 1) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_labels=CLASSES)
        self.backbone = nn.Conv2d(3, 8, 8, 8)
        self.queries, self.place = nn.Linear(8, 6 * (CLASSES + none)), nn.Linear(8, 6 * 4)

    def forward(self, pixel_values: Tensor, labels: list[dict[str, Tensor]] | None = None) -> Any:
        seen = self.backbone(pixel_values).mean((2, 3))
        logits = self.queries(seen).unflatten(-1, (6, -1))
        boxes = self.place(seen).unflatten(-1, (6, 4)).sigmoid()
        loss = None
        if labels is not None:
            assert all(((one["boxes"] >= 0) & (one["boxes"] <= 1)).all() for one in labels)
            loss = logits.square().mean() + sum(one["boxes"].sum() * boxes.mean() for one in labels)
        return SimpleNamespace(logits=logits, pred_boxes=boxes, loss=loss)


MODELS = {
    "cells": lambda: Cells(CLASSES, width=16),
    "ssd": lambda: ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES + 1),
    "retina": _retina,
    "faster": _faster,
    "detr": Detr,
    "sigmoid detr": lambda: Detr(0),
}


def _detector(name: str, least: float = 0.0, count: int = 12) -> Detector:
    torch.manual_seed(0)
    detector = adapted(MODELS[name]())
    detector.count, detector.least = count, least
    return detector


def _targets(rows: int = 2) -> Boxes:
    boxes = torch.tensor([[4.0, 4.0, 20.0, 24.0], [10.0, 12.0, 30.0, 30.0], [0.0, 0.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    return Boxes(boxes.expand(rows, 3, 4), torch.tensor([[0, 1, 0]]).expand(rows, 3), mask[torch.arange(rows) % 2])


def _sets(seed: int, rows: int = 6, count: int = 9) -> tuple[Boxes, Boxes]:
    """Targets, and boxes near them, several at one, and elsewhere."""
    made = torch.Generator().manual_seed(seed)
    targets = torch.rand(rows, 4, 2, generator=made) * 40
    targets = torch.cat((targets, targets + 8 + torch.rand(rows, 4, 2, generator=made) * 8), -1)
    near = targets.gather(1, torch.randint(4, (rows, count), generator=made)[..., None].expand(-1, -1, 4))
    boxes = near + torch.randn(rows, count, 4, generator=made) * torch.tensor([0.5, 3.0]).repeat(count)[:count, None]

    def some(places: int) -> tuple[Tensor, Tensor]:
        return torch.randint(2, (rows, places), generator=made), torch.rand(rows, places, generator=made) < 0.8

    scores = torch.rand(rows, count, generator=made)
    crowd = torch.rand(rows, 4, generator=made) < 0.2
    return Boxes(boxes, *some(count), scores), Boxes(targets, *some(4), crowd=crowd)


@pytest.mark.parametrize("jitter", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_a_set_is_scored_as_it_was_drawn_and_learned_from(name: str, jitter: float) -> None:
    images, keys = torch.rand(2, 3, 32, 32), torch.arange(2)
    policy = Candidates(_detector(name), CLASSES, jitter).eval()
    drawn = policy.sample(images, 3, False, keys)
    sets = policy.decode(drawn)
    assert sets.mask.any()
    assert bool((sets.labels < CLASSES).all())
    assert torch.equal(drawn.mask[0], drawn.mask[2])
    decisions = policy(images, drawn)
    assert decisions.log_probs is not None
    one = policy(images[1:], _rows(drawn, slice(3, 6)))
    torch.testing.assert_close(one.log_probs, decisions.log_probs[3:], rtol=1e-4, atol=1e-4)
    (decisions.log_probs * decisions.mask).sum().backward()
    touched = [weight for weight in policy.parameters() if weight.grad is not None and weight.grad.abs().sum() > 0]
    assert touched
    assert any(weight.grad is not None for weight in policy.detector.backbone())
    if not jitter:
        chances = decisions.log_probs.detach().exp()[drawn.mask]
        torch.testing.assert_close(chances, drawn.scores[drawn.mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_other_weights_score_the_candidates_of_the_answer(name: str) -> None:
    images = torch.rand(2, 3, 32, 32)
    policy = Candidates(_detector(name), CLASSES).eval()
    drawn = policy.sample(images, 2, False, torch.arange(2))
    before = policy(images, drawn)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.001 * torch.randn_like(weight)
    after = policy(images, drawn)
    assert torch.equal(after.mask, before.mask)
    assert not torch.equal(after.log_probs, before.log_probs)
    difference = (after.log_probs - before.log_probs)[drawn.mask].abs().median()
    assert difference < 0.5  # those of other candidates would be far away


@pytest.mark.parametrize("name", MODELS)
def test_the_supervised_losses_are_finite_and_answering_stays_in_evaluation_mode(name: str) -> None:
    detector = _detector(name).train()
    if name != "cells":
        assert isinstance(detector, Adapter)
        assert not detector.model.training
    crowd = torch.tensor([[False, True, False], [False, False, False]])
    losses = detector.loss(torch.rand(2, 3, 32, 32), replace(_targets(), crowd=crowd))
    total = torch.stack(list(losses.values())).sum()
    assert total.isfinite()
    total.backward()
    empty = detector.loss(torch.rand(1, 3, 32, 32), _rows(_targets(), slice(1, 2)))
    assert torch.stack(list(empty.values())).sum().isfinite()
    policy = Candidates(detector, CLASSES).train()
    assert policy.ranked(torch.rand(1, 3, 32, 32)).mask.any()


def test_batch_statistics_stand_still_unless_they_are_to_be_learned() -> None:
    for still in (True, False):
        detector = adapted(_retina(), still)
        before = detector.model.backbone[1].running_mean.clone()
        detector.loss(torch.rand(2, 3, 32, 32), _targets())
        assert torch.equal(before, detector.model.backbone[1].running_mean) == still


@pytest.mark.parametrize("name", MODELS)
def test_no_candidates_give_an_empty_set_and_a_finite_loss(name: str) -> None:
    images = torch.rand(2, 3, 32, 32)
    policy = Candidates(_detector(name, least=1.1), CLASSES)
    reward = DetectionReward(credited="difference")
    tuning = Tuning(3, credit="difference", entropy=0.1)
    scored = score(policy, reward, images, _targets(), torch.arange(2), tuning, MovingAverage())
    assert not policy.decode(scored.actions).mask.any()
    assert torch.equal(scored.output.total, torch.zeros(6))
    decisions = policy(images, scored.actions)
    loss, told = reward_loss(decisions, scored, decisions.distribution, tuning)
    assert loss.isfinite()
    assert told["length"] == 0
    loss.backward()
    assert average_precision(policy.decode(scored.actions), _rows(_targets(6), slice(0, 6))).total.isfinite().all()


@pytest.mark.parametrize("classes", [1, 3, 90])
@pytest.mark.parametrize("name", MODELS)
def test_a_detector_of_another_number_of_classes_is_refused(name: str, classes: int) -> None:
    """Its last logit would be taken for none, whatever it is of."""
    policy, images = Candidates(_detector(name), classes), torch.rand(1, 3, 32, 32)
    message = f"^model: its detector has 3 logits a candidate, expected {classes + 1}, of {classes} classes and none"
    for ask in (lambda: policy.ranked(images), lambda: policy.sample(images, 2, False, torch.arange(1))):
        with pytest.raises(InputError, match=message):
            ask()


def test_no_place_for_candidates_is_no_trouble_either() -> None:
    chosen, mask = likeliest(torch.zeros(2, 0, 4), torch.zeros(2, 0, 3), 5, 0.5, 0.01)
    assert chosen.shape == mask.shape == (2, 0)
    output = without_each(DetectionReward())(_rows(_sets(0)[0], slice(0, 2), 0), _targets())
    assert output.credit is not None
    assert output.credit.shape == (2, 0)


def test_the_likeliest_do_not_overlap_and_come_first() -> None:
    boxes = torch.rand(3, 200, 2) * 40
    boxes = torch.cat((boxes, boxes + 6 + torch.rand(3, 200, 2) * 20), -1)
    boxes[0, :100, 2:] = boxes[0, :100, :2]  # no area
    logits = torch.randn(3, 200, 3) * 3
    chosen, mask = likeliest(boxes, logits, 20, 0.4, 0.5)
    sure = 1 - logits.softmax(-1)[..., -1]
    for row in range(3):
        found = chosen[row][mask[row]]
        assert len(found) > 3
        assert (sure[row, found] >= 0.5).all()
        assert (sure[row, found].diff() <= 0).all()
        ious = overlaps(boxes[row : row + 1, found], boxes[row : row + 1, found])[0]
        assert (ious - torch.eye(len(found))).max() <= 0.4 + 1e-6
        assert row > 0 or (found >= 100).all()
    assert int(chosen[1, 0]) == int(sure[1].argmax())


def test_boxes_as_numbers_come_back() -> None:
    boxes = torch.tensor([[1.0, 2.0, 11.0, 7.0], [0.0, 0.0, 0.5, 100.0]])
    torch.testing.assert_close(to_boxes(to_numbers(boxes)), boxes)


def test_the_distribution_of_class_and_box() -> None:
    logits, mean, std = torch.randn(1, 1, 3), torch.randn(1, 1, 4), torch.full((1, 1, 4), 0.3)
    own, other = ClassAndBox(logits, mean, std), ClassAndBox(logits + torch.randn(1, 1, 3), mean + 0.2, std)
    wide, other = (map_tree(lambda leaf: leaf.expand(200_000, -1, -1), one) for one in (own, other))
    drawn = wide.sample(noise.key(0, torch.arange(200_000))[:, None])
    logs, others = wide.log_prob(drawn), other.log_prob(drawn)
    torch.testing.assert_close(-logs.mean(), own.entropy().squeeze(), rtol=0.02, atol=0.01)
    torch.testing.assert_close((logs - others).mean(), wide.kl(other)[0, 0], rtol=0.03, atol=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_the_difference_in_closed_form_is_that_of_leaving_each_box_out(seed: int) -> None:
    boxes, targets = _sets(seed)
    weights = class_weights(torch.tensor([10, 3]))
    reward = DetectionReward(false_positive=0.2, class_weights=weights, credited="difference")
    closed, counted = reward(boxes, targets), without_each(reward, at_once=7)(boxes, targets)
    assert closed.credit is not None
    assert counted.credit is not None
    torch.testing.assert_close(closed.credit, counted.credit)
    plain = DetectionReward(false_positive=0.2, class_weights=weights)(boxes, targets)
    torch.testing.assert_close(closed.total, plain.total)
    assert (closed.credit < 0).any()
    assert (closed.credit > 0).any()


def test_any_reward_is_told_box_by_box() -> None:
    boxes, targets = _sets(1, rows=3)
    credit = without_each(average_precision)(boxes, targets).credit
    assert credit is not None
    whole = average_precision(boxes, targets).total
    for row in range(3):
        for place in range(boxes.mask.shape[1]):
            mask = boxes.mask.clone()
            mask[row, place] = False
            less = whole[row] - average_precision(replace(boxes, mask=mask), targets).total[row]
            torch.testing.assert_close(credit[row, place], less if boxes.mask[row, place] else torch.tensor(0.0))


@pytest.mark.parametrize("seed", range(4))
def test_what_each_box_adds_is_that_of_the_sets_up_to_it(seed: int) -> None:
    boxes, targets = _sets(seed)
    reward = DetectionReward(false_positive=0.2, class_weights=class_weights(torch.tensor([10, 3])))
    closed, counted = reward(boxes, targets), box_by_box(reward)(boxes, targets)
    torch.testing.assert_close(counted.credit, closed.credit)
    torch.testing.assert_close(counted.total, closed.total)
    torch.testing.assert_close(counted.parts, closed.parts)
    precise = box_by_box(average_precision)(boxes, targets)
    for count in range(boxes.mask.shape[1]):
        place = torch.arange(boxes.mask.shape[1])
        first, more = (replace(boxes, mask=boxes.mask & (place < end)) for end in (count, count + 1))
        adds = average_precision(more, targets).total - average_precision(first, targets).total
        assert precise.credit is not None
        torch.testing.assert_close(precise.credit[:, count], adds)


def _gradients(credit: str, draws: int, samples: int = 4) -> Tensor:
    """Gradients in the logits of one image's candidates, by so many independent draws: [draws, candidates, classes]."""
    targets, boxes = (
        _targets(1),
        torch.tensor([[4.0, 5.0, 20.0, 24.0], [5.0, 4.0, 22.0, 24.0], [11.0, 12.0, 30.0, 29.0]]),
    )
    boxes = torch.cat((boxes, torch.rand(9, 2).mul(20).repeat(1, 2) + torch.tensor([0.0, 0.0, 6.0, 6.0])))
    logits = torch.randn(12, 3).mul(0.5).requires_grad_()
    policy = Candidates(_Fixed(boxes, logits), CLASSES)
    reward = DetectionReward(false_positive=0.3, credited="difference")
    tuning, found = Tuning(samples, credit=credit), []  # type: ignore[arg-type]
    for draw in range(draws):
        images = torch.zeros(1, 3, 32, 32)
        scored = score(policy, reward, images, targets, noise.key(draw, torch.arange(1)), tuning, MovingAverage())
        loss, _ = reward_loss(policy(images, scored.actions), scored, None, tuning)
        found.append(torch.autograd.grad(loss, logits)[0])
    return torch.stack(found)


class _Fixed(Detector):
    def __init__(self, boxes: Tensor, logits: Tensor) -> None:
        super().__init__()
        self.boxes, self.logits = boxes, logits
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor, places: Any = None) -> Any:
        rows, there = len(images), torch.ones(len(images), len(self.boxes), dtype=torch.bool)
        return Proposals(self.boxes.expand(rows, -1, -1), self.logits.expand(rows, -1, -1), there, there.long())

    def loss(self, images: Tensor, targets: Boxes) -> dict[str, Tensor]:
        return {}

    def backbone(self) -> Any:
        return iter(())


def test_credit_by_difference_has_the_same_gradient_and_a_tenth_of_the_variance() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    own = _gradients("difference", 150)
    torch.set_rng_state(state)
    whole = _gradients("answer", 150)
    error = (own.var(0) + whole.var(0)).div(150).sqrt()
    assert ((own.mean(0) - whole.mean(0)).abs() < 4.5 * error).all()
    assert own.var(0).sum() < whole.var(0).sum() / 10


def test_cells_are_taught_the_object_in_whose_middle_they_lie() -> None:
    middles = torch.stack(torch.meshgrid(torch.arange(4) * 8 + 4.0, torch.arange(4) * 8 + 4.0, indexing="xy"), -1)
    boxes = torch.tensor([[[0.0, 0.0, 32.0, 32.0], [9.0, 9.0, 11.0, 11.0], [24.0, 24.0, 32.0, 32.0]]])
    targets = Boxes(
        boxes, torch.tensor([[0, 1, 1]]), torch.ones(1, 3).bool(), crowd=torch.tensor([[False, False, True]])
    )
    owner, is_object, counted = taught(middles.flatten(0, 1), targets, 8)
    grid = torch.where(is_object, owner, -1).view(4, 4)
    assert grid.tolist() == [[-1, -1, -1, -1], [-1, 1, 0, -1], [-1, 0, 0, -1], [-1, -1, -1, -1]]
    assert counted.view(4, 4).logical_not().nonzero().tolist() == [[3, 3]]


def _squares(step: int) -> tuple[Tensor, Boxes]:
    """A white square in each image, and a grey one that is nothing."""
    corners = noise.integers(noise.key("squares", step, torch.arange(16)).view(8, 2), 32, 2).float()
    place = torch.arange(48).float()
    inside = (place >= corners[..., None]) & (place < corners[..., None] + 16)
    squares = (inside[:, :, 1, :, None] & inside[:, :, 0, None]).float()
    images = torch.maximum(squares[:, 0], 0.7 * squares[:, 1])[:, None].expand(-1, 3, -1, -1)
    boxes = torch.cat((corners[:, :1], corners[:, :1] + 16), -1)
    return images, Boxes(boxes, torch.zeros(8, 1).long(), torch.ones(8, 1).bool())


def _learned(backbone: str, steps: int) -> Candidates:
    policy = Candidates(Cells(1, backbone, width=32), 1)
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    for step in range(steps):
        loss = torch.stack(list(policy.detector.loss(*_squares(step)).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy.eval()


@pytest.mark.parametrize("backbone", ["convolutions", "efficientnet-lite0"])
def test_cells_learn_to_find_a_square(backbone: str) -> None:
    pytest.importorskip("timm")
    images, targets = _squares(-1)
    best = _learned(backbone, 30).ranked(images)
    assert best.scores is not None
    first = torch.take_along_dim(best.boxes, best.scores.argmax(1)[:, None, None], 1)
    assert overlaps(first, targets.boxes).mean() > 0.5


@pytest.mark.parametrize("credit", ["difference", "answer"])
def test_a_detector_is_tuned_on_its_reward(credit: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    policy, reward = _learned("convolutions", 20), DetectionReward(false_positive=0.3, credited="difference")
    for weight in policy.detector.backbone():  # what boxes share with decisions stays, or the boxes drift
        weight.requires_grad_(False)
    images, targets = _squares(-1)

    def drawn() -> float:
        sets = policy.decode(policy.sample(images, 50, False, torch.arange(8)))
        return float(reward(sets, repeat(targets, 50)).total.mean())

    before = drawn()
    settings = {"credit": credit, "learning_rate": 1e-2, "warmup": 5, "samples": 4}
    foveate.tune(policy, reward, _squares, out=tmp_path / "run", steps=40, device="cpu", **settings)
    assert drawn() > before + 0.05


def test_set_scores() -> None:
    targets = _targets(1)
    boxes = replace(targets, mask=torch.tensor([[True, False, True]]), scores=torch.tensor([[0.9, 0.1, 0.2]]))
    assert set_scores(boxes, targets) == {"f1": 0.5, "precision": 0.5, "recall": 0.5}
    assert set_scores(above(boxes, 0.5), targets) == pytest.approx({"f1": 2 / 3, "precision": 1.0, "recall": 0.5})
    nothing = replace(targets, mask=torch.zeros(1, 3).bool())
    assert set_scores(nothing, nothing) == {"f1": 1.0, "precision": 1.0, "recall": 1.0}


def test_zooming_moves_the_boxes_with_the_picture() -> None:
    images = torch.zeros(40, 1, 64, 64)
    images[:, :, 20:44, 12:40] = 1.0
    boxes = Boxes(
        torch.tensor([[[12.0, 20.0, 40.0, 44.0]]]).expand(40, 1, 4), torch.zeros(40, 1).long(), torch.ones(40, 1).bool()
    )
    shown, moved = zoomed(images, boxes, noise.key(0, torch.arange(40)))
    assert moved.crowd is not None
    assert (moved.boxes >= 0).all()
    assert (moved.boxes <= 64).all()
    for image, box in zip(shown[:, 0], moved.boxes[:, 0], strict=True):
        rows, columns = (image > 0.75).nonzero().T
        seen = torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)).float()
        assert (seen - box).abs().max() < 1.5
    sizes = (moved.boxes[:, 0, 2:] - moved.boxes[:, 0, :2]).prod(-1)
    assert sizes.std() > 100
    assert LEFT < 1


def test_a_detector_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    eye = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"])
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 6, "num_labels": CLASSES}
    config = transformers.DetrConfig(use_timm_backbone=False, backbone=None, backbone_config=eye, **sizes, **heads)
    detector = adapted(transformers.DetrForObjectDetection(config))
    detector.least = 0.0
    policy, images = Candidates(detector, CLASSES), torch.rand(2, 3, 32, 32)
    drawn = policy.sample(images, 3, False, torch.arange(2))
    assert int(drawn.mask.sum()) == 6 * 6
    log_probs = policy(images, drawn).log_probs
    assert log_probs is not None
    (log_probs.sum() + detector.loss(images, _targets())["loss"]).backward()
    assert all(weight.grad is not None for weight in detector.backbone() if weight.requires_grad)


def test_what_is_no_detector_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model: found Linear, expected torchvision's SSD"):
        adapted(nn.Linear(1, 1))
    with pytest.raises(InputError, match="torchvision has no detector 'ssd'; it has fasterrcnn"):
        named("torchvision:ssd", 2)
    with pytest.raises(InputError, match="model: 'nowhere:none' is not found"):
        named("nowhere:none", 2)
    with pytest.raises(InputError, match="model: 'yolo' is not found"):
        named("yolo", 2)
    with pytest.raises(InputError, match="stride: found 5"):
        named("cells", 2, backbone="efficientnet-lite0", stride=5)
    with pytest.raises(InputError, match="pretrained: found model 'cells'"):
        take_coco(Cells(1), "cells")


def test_weights_of_the_users_own(tmp_path: Path) -> None:
    detector, other = adapted(_retina()), adapted(_retina())
    save_file(detector.model.state_dict(), tmp_path / "retina.safetensors")
    load_weights(other, tmp_path / "retina.safetensors")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in detector.state_dict().items())
    with pytest.raises(InputError, match="not its weights"):
        load_weights(Cells(1), tmp_path / "retina.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="is not a readable safetensors file"):
        load_weights(other, tmp_path / "broken.safetensors")
    with pytest.raises(InputError, match="is not a readable safetensors file"):
        load_weights(other, tmp_path / "missing.safetensors")


def test_what_was_learned_on_coco_is_taken_but_for_the_layers_of_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ssdlite320_mobilenet_v3_large"
    learned = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=91)
    file = SimpleNamespace(DEFAULT=SimpleNamespace(get_state_dict=lambda progress: learned.state_dict()))
    monkeypatch.setattr(torchvision.models, "get_model_weights", {name: file}.__getitem__)
    detector = named(f"torchvision:{name}", 2, still=True)
    before = {key: value.clone() for key, value in detector.model.state_dict().items()}
    take_coco(detector, f"torchvision:{name}")
    taken, there = detector.model.state_dict(), learned.state_dict()
    kept = {key for key, value in taken.items() if value.shape != there[key].shape}
    assert kept
    assert all("classification_head" in key for key in kept)
    assert all(torch.equal(value, before[key] if key in kept else there[key]) for key, value in taken.items())

    def offline(progress: bool) -> None:
        raise OSError("no route")

    monkeypatch.setattr(file.DEFAULT, "get_state_dict", offline)
    with pytest.raises(InputError, match=rf"^pretrained: the weights of torchvision:{name} cannot be had \(no route\)"):
        take_coco(detector, f"torchvision:{name}")


def _rows(tree: Any, rows: slice, places: int | None = None) -> Any:
    return map_tree(lambda leaf: leaf[rows] if places is None else leaf[rows, :places], tree)


def test_a_constant_reward_has_no_credit() -> None:
    boxes, targets = _sets(2)
    output = without_each(lambda predictions, _: RewardOutput(torch.ones(len(predictions.mask))))(boxes, targets)
    assert output.credit is not None
    assert not output.credit.any()


def test_tuning_begins_with_another_run(shared_data: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {"data": "voc", "root": shared_data / "raccoon", "image_size": 32, "width": 16, "batch": 4}
    config = tune_detector.resolve(tune_detector.Config(samples=2, candidates=4, steps=4, **small))
    shares = {"first": 0.5, "second": 0.0}
    starts = []
    for name, share in shares.items():
        source = tmp_path / "first" if name == "second" else None
        run = Run(tmp_path / name, system="tune-detector", config={}, steps=2, device="cpu", source=source, quiet=True)
        tune_detector.train(replace(config, likelihood_share=share), run)
        policy = tune_detector.build(config)
        assert run.restore("likelihood", policy)
        starts.append(policy.state_dict())
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())
    found = tune_detector.predict(config, policy, torch.rand(2, 3, 50, 40))
    assert found["boxes"].shape == (2, found["mask"].shape[1], 4)
    assert (found["boxes"][..., 2] <= 40 + 1e-3).all()
    with pytest.raises(InputError, match="data: its classes are raccoon; the agent knows"):
        tune_detector.evaluate(replace(config, classes=("cat",)), policy, run, elsewhere=True)


def test_a_killed_run_ends_with_the_same_weights(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small: dict[str, Any] = {"data": "voc", "root": shared_data / "raccoon", "image_size": 32, "width": 16, "batch": 4}
    config = tune_detector.resolve(tune_detector.Config(samples=2, candidates=4, every=1, **small))
    batch = tune_detector._batch

    def ended(name: str, resume: bool = False) -> dict[str, Tensor]:
        settings: dict[str, Any] = {"steps": 8, "checkpoint_steps": 1, "device": "cpu", "quiet": True}
        run = Run(tmp_path / name, system="tune-detector", config={}, resume=resume, **settings)
        tune_detector.train(config, run)
        found = {}
        for part in ("likelihood", "policy", "control"):
            policy = tune_detector.build(config)
            assert run.restore(part, policy)
            found |= {f"{part}.{key}": value for key, value in policy.state_dict().items()}
        return found

    def killed(*where: Any) -> tuple[Tensor, Boxes]:
        if where[-2:] == ("reward", 1):
            raise InterruptedError
        return batch(*where)

    whole = ended("whole")
    monkeypatch.setattr(tune_detector, "_batch", killed)
    with pytest.raises(InterruptedError):
        ended("killed")
    monkeypatch.setattr(tune_detector, "_batch", batch)
    resumed = ended("killed", resume=True)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_settings_that_cannot_be_trained_are_refused() -> None:
    for field, value in (("likelihood_share", 1.0), ("candidates", 0), ("data", "nothing"), ("image_size", 4)):
        with pytest.raises(InputError, match=f"{field}: found"):
            tune_detector.resolve(replace(tune_detector.Config(scenes=8, image_size=16), **{field: value}))


def counted(predictions: Boxes, targets: Boxes) -> Tensor:
    """Of the user's own: a tensor, not a `RewardOutput`."""
    return -(predictions.mask.sum(1) - targets.mask.sum(1)).abs().float()


def broken(predictions: Boxes, targets: Boxes) -> Tensor:
    """The same, but NaN for the eighth set."""
    found = counted(predictions, targets)
    return torch.where(torch.arange(len(found)) == 7, float("nan"), found)


def test_chosen_boxes_are_moved_to_what_they_match_and_others_stay() -> None:
    targets = Boxes(torch.tensor([[[8.0, 8.0, 24.0, 24.0]]]), torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.bool))
    boxes = torch.tensor([[[10.0, 8.0, 26.0, 24.0], [40.0, 40.0, 56.0, 56.0], [10.0, 8.0, 26.0, 24.0]]])
    chosen = Boxes(boxes, torch.tensor([[1, 1, 0]]), torch.ones(1, 3, dtype=torch.bool))
    placed = boxes.clone().requires_grad_()
    loss = placing_loss(chosen, placed, targets)
    assert loss.item() == pytest.approx(-2 * 14 / 18)
    (slope,) = torch.autograd.grad(loss, placed)
    assert (slope[0, 0, [0, 2]] > 0).all(), "to the left"
    assert (slope[0, 1:] == 0).all(), "a box at nothing, and one of another class"
    own = replace(tune_detector.Config(scenes=8, image_size=16), reward="test_candidates:counted")
    assert tune_detector.resolve(own).placing == 0
    assert tune_detector.resolve(replace(own, placing=0.5)).placing == 0.5
    assert tune_detector.resolve(replace(own, reward="map")).placing == 1


@pytest.mark.parametrize("credit", ["difference", "answer"])
def test_a_reward_of_the_users_own_may_give_a_tensor_and_is_watched(credit: str, tmp_path: Path) -> None:
    how: dict[str, Any] = {"steps": 3, "device": "cpu", "batch": 2, "scenes": 8, "image_size": 32, "width": 16}
    how |= {"samples": 4, "candidates": 3, "credit": credit}
    foveate.train("tune-detector", out=tmp_path / "a", reward="test_candidates:counted", **how)
    evaluation = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    rows = [evaluation["metrics"], *evaluation["baselines"].values()]
    assert len(rows) == 5
    assert all(-10 < row["reward"] <= 0 for row in rows), "what was tuned on is told of everything beside it"
    how |= {"reward": "test_candidates:broken"}
    with pytest.raises(InputError, match=r"^reward test_candidates:broken: is nan for example 7"):
        foveate.train("tune-detector", out=tmp_path / "b", **how)
    assert not (tmp_path / "b").exists(), "told before the first phase"
    foveate.train("tune-detector", out=tmp_path / "c", skip_bad=True, **how)
    rows = [json.loads(line) for line in (tmp_path / "c" / "metrics.jsonl").open()]
    assert any(row.get("part skipped") == pytest.approx(1 / 8) for row in rows)


def test_the_command_tunes_a_detector_of_torchvision(tmp_path: Path) -> None:
    """From nothing and at a small size: all three phases, and what is scored and drawn after them."""
    words = ["--model", "torchvision:ssdlite320_mobilenet_v3_large", "--image-size", "64", "--scenes", "4"]
    words += ["--batch", "2", "--candidates", "4", "--samples", "2", "--steps", "3", "--device", "cpu"]
    assert main(["train", "tune-detector", *words, "--out", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert {"likelihood", "reward", "control"} == {row["phase"] for row in rows}
    assert all(row["ratio"] == pytest.approx(1, abs=1e-5) for row in rows if row.get("ratio") is not None)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert {"mle", "control"} <= found["baselines"].keys()
