"""Boxes written as tokens and read again."""

from dataclasses import replace

import pytest
import torch

from foveate import noise
from foveate.data.scenes import SHAPES, describe, draw
from foveate.geometry import Boxes, check_boxes, overlaps
from foveate.models.box_tokens import EACH, END, RIGHT, WRONG, BoxTokens, BoxWriter, by_token
from foveate.models.encoder_decoder import EncoderDecoder, Tokens
from foveate.rewards.boxes import DetectionReward
from foveate.types import InputError

CODE = BoxTokens((48, 64), classes=len(SHAPES), most=6, bins=100)


def boxes(batch: int = 8) -> Boxes:
    found = draw(describe(noise.key(0, "scenes", torch.arange(batch))), 48).boxes
    return replace(found, boxes=found.boxes * torch.tensor([64 / 48, 1, 64 / 48, 1]))


def keys(batch: int = 8) -> torch.Tensor:
    return noise.key(1, torch.arange(batch))


@pytest.mark.parametrize("shuffled", [False, True])
def test_what_is_written_is_read_again_to_half_a_bin(shuffled: bool) -> None:
    there = boxes()
    tokens = CODE.encode(there, keys() if shuffled else None)
    assert tokens.ids.shape == (8, EACH * there.mask.sum(1).max() + 1)
    assert torch.equal(tokens.mask.sum(1), EACH * there.mask.sum(1) + 1)
    found = CODE.decode(tokens)
    assert torch.equal(found.mask.sum(1), there.mask.sum(1))
    alike = overlaps(found.boxes, there.boxes) * (found.labels[..., None] == there.labels[:, None])
    alike = alike * (found.mask[..., None] & there.mask[:, None])
    best, place = alike.max(2)
    assert best[found.mask].min() > 0.8
    for row in range(8):
        assert len(set(place[row][found.mask[row]].tolist())) == int(there.mask[row].sum()), "each is read once"
        mine = there.boxes[row][place[row]][found.mask[row]]
        away = (found.boxes[row][found.mask[row]] - mine).abs() / torch.tensor([64, 48, 64, 48])
        assert away.max() <= 0.5 / 100 + 1e-5
    check_boxes(found, "read", (48, 64))


def test_the_order_is_by_rows_or_drawn() -> None:
    there = boxes()
    tops = CODE.decode(CODE.encode(there)).boxes[..., 1]
    inside = CODE.decode(CODE.encode(there)).mask
    assert ((tops.diff(dim=1) >= 0) | ~inside[:, 1:]).all()
    one, other = CODE.encode(there, keys()), CODE.encode(there, keys() + 1)
    assert not torch.equal(one.ids, other.ids)
    assert torch.equal(one.ids.sort(1).values, other.ids.sort(1).values)


def test_texts_keep_to_what_is_allowed() -> None:
    allowed = CODE.allowed()
    assert allowed.shape == (CODE.length, CODE.vocabulary)
    tokens = CODE.encode(boxes(64), keys(64))
    assert allowed[torch.arange(CODE.length).expand(64, -1), tokens.ids][tokens.mask].all()
    assert allowed[:, END].nonzero().flatten().tolist() == list(range(0, CODE.length, EACH))
    assert allowed[5].nonzero().flatten().tolist() == [WRONG, RIGHT]
    assert allowed[4].sum() == len(SHAPES)
    assert allowed[1].sum() == 100


def test_a_model_that_knows_nothing_writes_boxes_all_the_same() -> None:
    torch.manual_seed(0)
    model = EncoderDecoder(
        (3, 16, 16), 8, CODE.vocabulary, CODE.length, END, CODE.allowed(), width=16, depth=1, heads=2
    )
    images = noise.uniform(keys(4), 3, 16, 16)
    drawn = model.sample(images, 8, False, keys(4))
    assert CODE.allowed()[torch.arange(CODE.length).expand(32, -1), drawn.ids][drawn.mask].all()
    read = model(images, drawn)
    assert read.log_probs[read.mask].isfinite().all()
    found = CODE.decode(drawn)
    assert torch.equal(EACH * found.mask.sum(1) + 1, drawn.mask.sum(1))
    sides = (found.boxes[..., 2:] - found.boxes[..., :2])[found.mask]
    assert ((sides >= 0) & (sides < torch.tensor([64.0, 48.0]))).all(), "it may well write boxes of one row or column"
    (-read.log_probs * read.mask).sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)
    sure = CODE.confidences(read.distribution.logits)
    assert sure.shape == (32, 6)
    assert ((sure > 0) & (sure < 1)).all()


def test_nonsense_is_read_as_the_nearest_sense() -> None:
    ids = torch.full((1, CODE.length), CODE.vocabulary - 1)
    ids[0, :6] = torch.tensor([90, 80, 10, 20, 3, 0])  # ends before it begins, a coordinate as class
    found = CODE.decode(Tokens(ids, torch.arange(CODE.length)[None] < 8))
    assert found.mask.tolist() == [[True] + [False] * 5], "the second is not whole"
    check_boxes(found, "read", (48, 64))
    assert found.labels[0, 0] == 0


def test_too_many_boxes_and_unknown_classes_are_named() -> None:
    there = boxes(64)
    row = int(there.mask.sum(1).argmax())
    with pytest.raises(InputError, match=rf"^boxes: image {row} has 6, expected at most 2"):
        replace(CODE, most=2).encode(there)
    with pytest.raises(InputError, match=r"^boxes: classes from 0 to 5, expected 0 to 1"):
        replace(CODE, classes=2).encode(there)


def test_confidences_learn_the_iou_to_expect() -> None:
    """Where a box is right in three draws of four, its confidence ends at the mean IoU; padding says nothing."""
    there = boxes(4)
    tokens = CODE.encode(there)
    read = CODE.decode(tokens)
    logits = torch.zeros(1, CODE.length, CODE.vocabulary, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.1)
    draws = torch.tensor([0.8, 0.8, 0.0, 0.8])[:, None].expand(4, 6)
    same = replace(read, mask=read.mask[:1].expand(4, -1))
    for _ in range(200):
        loss = CODE.confidence_loss(logits.expand(4, -1, -1), same, draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sure = CODE.confidences(logits.detach())[0]
    torch.testing.assert_close(sure[read.mask[0]], torch.full((int(read.mask[0].sum()),), 0.6), rtol=0, atol=0.02)
    torch.testing.assert_close(sure[~read.mask[0]], torch.full((int((~read.mask[0]).sum()),), 0.5))
    nothing = replace(same, mask=torch.zeros_like(same.mask))
    assert CODE.confidence_loss(logits.expand(4, -1, -1), nothing, draws) == 0


def test_gains_stand_where_the_classes_are_written() -> None:
    there = boxes()
    tokens = CODE.encode(there)
    told = by_token(DetectionReward(duplicate=0.0))(CODE.decode(tokens), there)
    assert told.credit is not None
    assert told.credit.shape == tokens.ids.shape
    is_class = tokens.mask & (tokens.ids >= 3 + CODE.bins)
    assert torch.equal(told.credit > 0, is_class), "every box is near enough to its own target to gain"
    torch.testing.assert_close(told.credit.sum(1), told.total)


def test_a_box_beyond_the_image_is_not_moved_but_refused() -> None:
    code = BoxTokens((16, 16), 2, 3, 16)
    beyond = Boxes(torch.tensor([[[4.0, 4, 20, 12]]]), torch.zeros(1, 1).long(), torch.ones(1, 1).bool())
    with pytest.raises(
        InputError, match=r"^boxes: box 0 of image 0 \(4, 4, 20, 12\) reaches beyond the image of 16x16"
    ):
        code.encode(beyond)


def test_texts_agree_on_what_most_of_them_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four texts three say a box, once a little elsewhere; the other one there of another class, and a third."""
    writer = BoxWriter(CODE, 8, width=16, depth=1, heads=2)
    said = torch.zeros(4, 2, 4)
    said[:, 0] = torch.tensor([8.0, 6.0, 24.0, 30.0])
    said[2, 0, 2] = 25.0
    said[3, 1] = torch.tensor([40.0, 12.0, 56.0, 36.0])
    labels = torch.tensor([[1, 0], [1, 0], [1, 0], [2, 3]])
    mask = torch.tensor([[True, False], [True, False], [True, False], [True, True]])
    texts = CODE.encode(Boxes(said, labels, mask))
    monkeypatch.setattr(writer, "sample", lambda *_: texts)
    found = writer.agreed(torch.zeros(1, 3, 48, 64), keys(1), 4)
    count = int(found.mask.sum())
    assert found.mask[0].tolist() == [True] * count + [False] * (len(found.mask[0]) - count)
    read = CODE.decode(texts)
    near = overlaps(read.boxes[:3, :1], read.boxes[:3, :1].transpose(0, 1).expand(3, -1, -1)).squeeze(1)
    assert found.labels[0, :count].tolist() == [1, 2, 3]
    torch.testing.assert_close(found.scores[0, :count], torch.tensor([near.sum(1).max() / 4, 0.25, 0.25]))
    assert torch.equal(found.boxes[0, 0], read.boxes[int(near.sum(1).argmax()), 0])


def test_texts_of_nothing_agree_on_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = BoxWriter(CODE, 8, width=16, depth=1, heads=2)
    for length in (1, 7):
        texts = Tokens(torch.full((6, length), END), torch.ones(6, length, dtype=torch.bool))
        monkeypatch.setattr(writer, "sample", lambda *_, texts=texts: texts)
        found = writer.agreed(torch.zeros(2, 3, 48, 64), keys(2), 3)
        assert found.boxes.shape[0] == len(found.scores) == 2
        assert not found.mask.any()


def test_what_texts_agree_on_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    writer = BoxWriter(CODE, 8, width=16, depth=1, heads=2)
    images = noise.uniform(keys(3), 3, 48, 64)
    found, alone = writer.agreed(images, keys(3), 3), writer.agreed(images[1:2], keys(3)[1:2], 3)
    there = alone.mask[0]
    assert 0 < int(there.sum()) <= CODE.most
    assert found.mask[1].sum() == there.sum()
    torch.testing.assert_close(found.boxes[1][found.mask[1]], alone.boxes[0][there])
    torch.testing.assert_close(found.scores[1][found.mask[1]], alone.scores[0][there])
    kept = overlaps(alone.boxes, alone.boxes)[0][there][:, there] * (
        alone.labels[0][there][:, None] == alone.labels[0][there]
    )
    assert (kept.triu(1) <= 0.4).all()
