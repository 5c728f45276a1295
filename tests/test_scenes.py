"""Scenes: what is drawn, boxed, segmented and said is one and the same."""

from dataclasses import fields, replace

import torch

from foveate import noise
from foveate.data import scenes
from foveate.data.scenes import COLORS, GROUNDS, SHAPES, STUFF, VISIBLE, at, captions, describe, draw
from foveate.geometry import check_boxes
from foveate.types import map_tree


def some(batch=16, seed=0, **options):
    return describe(noise.key(seed, "scenes", torch.arange(batch)), **options)


def test_a_scene_follows_from_its_key_alone():
    whole, part = some(), describe(noise.key(0, "scenes", torch.arange(5, 9)))
    map_tree(lambda one, other: torch.testing.assert_close(one, other[5:9]) or one, part, whole)
    one, other = draw(part, 32), draw(whole, 32)
    torch.testing.assert_close(one.images, other.images[5:9], rtol=0, atol=1e-5)
    assert torch.equal(one.ids, other.ids[5:9])
    assert not torch.equal(draw(some(seed=1), 32).images, other.images)


def test_every_kind_occurs_about_as_often():
    found = some(3000)
    for name, kinds in ("shapes", len(SHAPES)), ("colors", len(COLORS)), ("grounds", len(GROUNDS)):
        counts = getattr(found, name).flatten().bincount(minlength=kinds).double()
        assert len(counts) == kinds
        assert (counts / counts.mean() - 1).abs().max() < 0.15
    assert found.mask.sum(1).bincount().nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 6]
    assert some(500, least=3, most=4).mask.sum(1).unique().tolist() == [3, 4]


def test_images_are_in_range_and_boxes_keep_the_convention():
    found = draw(some(64), 48)
    assert found.images.shape == (64, 3, 48, 48)
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    check_boxes(found.boxes, "scenes", (48, 48))


def test_boxes_are_tight_around_what_is_seen():
    found = draw(some(32), 64)
    checked = 0
    for row in range(32):
        for place in range(found.boxes.mask.shape[1]):
            rows, columns = found.masks[row, place].nonzero(as_tuple=True)
            assert bool(found.boxes.mask[row, place]) == (len(rows) >= VISIBLE)
            if len(rows) < VISIBLE:
                continue
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert found.boxes.boxes[row, place].tolist() == [float(value) for value in expected]
            checked += 1
    assert checked > 50


def test_every_pixel_belongs_to_one_segment_and_labels_are_theirs():
    description = some(32)
    found = draw(description, 64)
    count = description.mask.shape[1]
    assert found.ids.min() >= 1
    assert found.ids.max() <= count + 2
    assert found.labels.shape == (32, count + 2)
    assert torch.equal(found.labels[:, :count], description.shapes)
    kinds = [*SHAPES, *STUFF]
    assert {kinds[label] for label in found.labels[:, count].tolist()} == {"sky"}
    grounds = [list(GROUNDS)[place] for place in description.grounds.tolist()]
    assert [kinds[label] for label in found.labels[:, count + 1].tolist()] == grounds
    sky, ground = found.ids == count + 1, found.ids == count + 2
    assert sky[:, 0].sum() > ground[:, 0].sum()
    assert ground[:, -1].sum() > sky[:, -1].sum()


def test_objects_have_their_color_where_they_are_seen():
    description = some(64)
    plain = replace(description, textures=torch.zeros_like(description.textures))
    found = draw(plain, 64)
    palette = torch.tensor(list(COLORS.values()))
    for row, place in found.boxes.mask.nonzero().tolist():
        inside = found.images[row][:, found.masks[row, place]].mean(1)
        nearest = (palette / palette.norm(dim=1, keepdim=True)) @ (inside / inside.norm())
        assert nearest.argmax() == description.colors[row, place]


def test_later_objects_stand_in_front():
    description = some(8, least=2, most=2)
    centre = torch.full_like(description.centres, 0.5)
    same = replace(description, centres=centre, radii=torch.full_like(description.radii, 0.2))
    disks = replace(same, shapes=torch.zeros_like(same.shapes))
    found = draw(disks, 32)
    assert found.boxes.mask.tolist() == [[False, True]] * 8


def test_shapes_differ_and_fit_their_circle():
    description = some(len(SHAPES), least=1, most=1)
    one_each = replace(
        description,
        shapes=torch.arange(len(SHAPES))[:, None],
        centres=torch.full_like(description.centres, 0.5),
        radii=torch.full_like(description.radii, 0.3),
    )
    masks = draw(one_each, 64).masks[:, 0]
    assert len(masks.flatten(1).unique(dim=0)) == len(SHAPES)
    grid = (torch.arange(64) + 0.5) / 64 - 0.5
    assert torch.hypot(grid, grid[:, None])[masks.any(0)].max() < 0.3 + 1.5 / 64
    areas = masks.sum((1, 2)) / 64**2
    assert areas[0] > areas[1] > areas[2] > 0.05, "disk, square, triangle"


def test_objects_overlap_little():
    found = some(200, least=4)
    away = (found.centres[:, :, None] - found.centres[:, None]).norm(dim=-1)
    both = found.mask[:, :, None] & found.mask[:, None] & torch.ones(6, 6, dtype=torch.bool).tril(-1)
    near = (away < 0.7 * (found.radii[:, :, None] + found.radii[:, None])) & both
    assert near.sum() / both.sum() < 0.03
    assert (
        (found.centres >= found.radii[..., None] - 1e-6) & (found.centres <= 1 - found.radii[..., None] + 1e-6)
    ).all()


def test_time_moves_objects_by_their_velocity_and_edges_throw_them_back():
    description = some(64)
    soon = at(description, 1.0)
    straight = description.centres + description.velocities
    low, high = description.radii[..., None], 1 - description.radii[..., None]
    inside = (straight > low) & (straight < high)
    torch.testing.assert_close(soon.centres[inside], straight[inside], rtol=0, atol=1e-5)
    assert inside.float().mean() > 0.8
    for frame in (0.0, 7.5, 200.0):
        later = at(description, frame).centres
        assert ((later >= low - 1e-5) & (later <= high + 1e-5)).all()
    torch.testing.assert_close(at(description, 0.0).centres, description.centres, rtol=0, atol=1e-5)
    for entry in fields(description):
        if entry.name != "centres":
            assert torch.equal(getattr(soon, entry.name), getattr(description, entry.name))


def test_captions_say_what_is_there():
    description = some(64)
    told = captions(description)
    for row, sentences in enumerate(told):
        assert len(sentences) == 5
        places = description.mask[row].nonzero().flatten()
        largest = places[description.radii[row, places].argmax()]
        color = list(COLORS)[description.colors[row, largest]]
        name = f"{color} {SHAPES[description.shapes[row, largest]]}"
        assert all(f"{color} " in sentence for sentence in sentences)
        assert all(name in sentence for sentence in sentences[1:])
        ground = list(GROUNDS)[description.grounds[row]]
        assert ground in sentences[2]
        assert ground in sentences[3]
        number = scenes._NUMBERS[len(places)]
        assert sentences[2].startswith(f"{number} object")
    words = {word for sentences in told for sentence in sentences for word in sentence.split()}
    assert words.isdisjoint({"None", "plain"})
    assert len({sentence for sentences in told for sentence in sentences}) > 150


def test_relations_are_those_of_the_picture():
    description = some(4, least=2, most=2)
    moved = torch.tensor(
        [[[0.2, 0.5], [0.8, 0.5]], [[0.8, 0.5], [0.2, 0.5]], [[0.5, 0.2], [0.5, 0.8]], [[0.5, 0.8], [0.5, 0.2]]]
    )
    sized = replace(description, centres=moved, radii=torch.tensor([[0.2, 0.1]] * 4))
    said = [sentences[0] for sentences in captions(sized)]
    for sentence, relation in zip(said, ("left of", "right of", "above", "below"), strict=True):
        assert relation in sentence
