"""Find objects by changing a box step by step, and say when it fits.

| | |
|---|---|
| state | the image, the box, the last ten actions, the boxes that were triggered |
| action | move the box right, left, up, down, make it bigger, smaller, fatter, taller; or trigger |
| reward | of a move: the sign of the change in IoU with the best object left; of the trigger: 3 if it is 0.6, else -3 |
| horizon | 40 steps for each of `triggers` triggers |
| learner | Q-learning with a replay: double, dueling, guided exploration |
| corner | value |

Caicedo and Lazebnik 2015, "Active object localization with deep reinforcement learning" (ICCV; arXiv 1511.06015). Here:
one map an image, one network for all classes, a belief beside the values, searches given up; why, and the rest:
docs/systems/localization.md.

    foveate train localization --minutes 20
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate import noise, pictures
from foveate.data import sought
from foveate.data.classification import check_rgb
from foveate.data.detection import Detections, chosen, first_shown, load_detections, several_views, showing, subset
from foveate.data.picture_folders import check_memory, read_pictures
from foveate.data.sought import Searches
from foveate.envs.box_search import ACTIONS, TRIGGER, BoxSearchEnv
from foveate.geometry import Boxes
from foveate.learn.q_learning import Believing
from foveate.learn.replay import Replay
from foveate.learn.schedule import one_cycle, set_learning_rate
from foveate.models.box_slots import BoxSlots, slot_loss
from foveate.models.region_q import RegionQ, seen_maps
from foveate.parts import restored, tracked
from foveate.pictures.searches import search_frames, search_grid
from foveate.rewards import regions as judged
from foveate.rewards.regions import Searched, ap50
from foveate.run import Run
from foveate.types import Evaluation, InputError, check_least, concatenate, map_tree
from foveate.value_learning import Acting, learn_by_acting, walk, with_belief

Pictures: TypeAlias = Float[Tensor, "batch channels height width"]


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train localization`. What defaults to None is chosen by the data and printed."""

    data: str = "scenes"
    """scenes (rendered objects), digits (scenes of embedded ones), voc, or coco"""
    root: Path | None = None
    """folder of the data; not needed for scenes"""
    target: str = "any"
    """what is searched for: objects of any class, those of each class in turn, or those of the class of this name"""
    image_size: int = 48
    """side in pixels to which pictures are stretched"""
    skip_bad: bool = False
    """leave out pictures whose boxes are wrong, and count them, instead of stopping"""
    scenes: int = 4000
    """how many scenes are rendered to train on"""
    objects: int = 2
    """in a scene at most"""
    views: int | None = None
    """of each picture to train on, made once: itself, its mirror image, then windows of it; 1 for scenes, else 8"""
    seed: int = 0
    """of the weights, the order of the data and every draw"""
    steps: int | None = None
    """updates of both phases together"""
    minutes: float | None = None
    """wall-clock budget of both phases together, half for the agent, half for the regressor"""
    backbone: str = "convolutions"
    """what sees the image: convolutions learned from nothing; or frozen efficientnet-lite0, or another name of timm"""
    stride: int | None = None
    """pixels to a cell of the feature map: 4 for convolutions, else 16"""
    width: int = 32
    """of a cell's vector"""
    hidden: int = 128
    """width of the layers"""
    bins: int = 7
    """cells a side in which a region is seen"""
    triggers: int | None = None
    """regions that are reported, then the search is over; as many as a training picture has objects, 5 at most"""
    patience: int = 40
    """steps without a trigger after which a search begins again at a corner"""
    alpha: float = 0.2
    """part of the box's sides by which a move changes it"""
    history: int = 10
    """actions that are remembered"""
    threshold: float = 0.6
    """IoU from which on a trigger is rewarded"""
    trigger_reward: float = 3.0
    """of a right trigger; a wrong one costs as much"""
    economy: float = 0.1
    """part of the AP on val that may be lost by giving searches up where little seems to be left"""
    spare: int = 8
    """steps in training that a search for nothing goes on, when every object is found"""
    copies: int = 64
    """searches that go on side by side"""
    batch: int = 128
    """transitions in an update"""
    ahead: int = 1
    """steps over which rewards are summed before a value is bootstrapped"""
    discount: float = 0.3
    """of what comes later, a step"""
    learning_rate: float = 3e-3
    """of Adam at its peak"""
    replay: int = 100_000
    """transitions that are kept"""
    classes: tuple[str, ...] | None = None
    """what the objects are called in pictures; taken from the target, or for each from the data"""


PART = "policy"  # the tracked part that holds the policy
SHARE = 0.5  # of the budget for the agent; the rest is the regressor's
AT_ONCE = 250  # searches made together where nothing is learned
HELD_OUT = 100  # images of val that are searched in training
SHAPED = 500  # training pictures of whose objects the baselines take their shapes
_load = lru_cache(maxsize=6)(load_detections)


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what the data decides; raises `InputError` for fields and data that are wrong."""
    check_least(
        config, 1, "copies", "replay", "patience", "triggers", "bins", "hidden", "scenes", "objects", "views", "spare"
    )
    if config.width < 8 or config.width % 8:
        raise InputError(f"width: found {config.width}, expected a multiple of 8")
    if config.replay < 4 * config.copies * config.ahead:
        raise InputError(f"replay: found {config.replay}, expected at least 4 · ahead · copies")
    if not 0 <= config.economy < 1:
        raise InputError(f"economy: found {config.economy:g}, expected at least 0 and less than 1")
    _acting(config)
    train = _data(replace(config, classes=None), "train")
    sought.check_classes(train, config.root or config.data)
    config = replace(config, classes=train.classes)
    for part in ("val", "test"):  # now, not after hours
        data = _data(config, part)
    counts = sought.of_searches(train.boxes, sought.searches_to_learn(train)).wanted.sum(1)
    stride = config.stride or (4 if config.backbone == "convolutions" else 16)
    views = config.views or (1 if config.data in ("scenes", "digits") else 8)
    triggers = config.triggers or min(5, int(counts.max()))
    ready = replace(config, stride=stride, views=views, triggers=triggers)
    build(ready)
    BoxSearchEnv(1, detections=data, **_task(ready))
    return ready


def _data(config: Config, part: Literal["train", "val", "test"]) -> Detections:
    """A part of the data, its objects those that are searched for; of the classes that the agent knows, if it does."""
    whole = _load(config.data, config.root, part, config.image_size, config.skip_bad, config.scenes, config.objects)
    return sought.of_target(whole, config.target, config.root or config.data, config.classes)


def _task(config: Config) -> dict[str, Any]:
    names = ("alpha", "history", "threshold", "trigger_reward", "triggers", "patience")
    return {name: getattr(config, name) for name in names} | {"horizon": config.patience * (config.triggers or 1)}


def _acting(config: Config) -> Acting:
    return Acting(config.batch, 1, config.ahead, config.discount, config.learning_rate)


def build(config: Config) -> RegionQ:
    """The policy of a resolved config, untrained."""
    values = Believing(config.hidden, ACTIONS, config.hidden)
    sizes = ACTIONS, config.history, config.bins, config.width, config.hidden, len(config.classes or ("object",))
    return RegionQ(values, config.image_size, config.backbone, config.stride or 4, *sizes)


def _regressor(config: Config) -> BoxSlots:
    """Of the same map and layers; it sees the image once, in twice as many cells a side."""
    sizes = config.stride or 4, 2 * config.bins, config.width, config.hidden, len(config.classes or ("object",))
    return BoxSlots(config.triggers or 1, config.image_size, config.backbone, *sizes)


def train(config: Config, run: Run) -> None:
    """Learn to search; then, for as long, the regressor that sees as much and is told where the boxes are."""
    data, val = several_views(showing(_data(config, "train")), config.views or 1), _data(config, "val")
    val = first_shown(val, HELD_OUT)
    searches, held = sought.searches_to_learn(data), sought.searches_to_learn(val)
    torch.manual_seed(config.seed)
    policy, optimizer, keeper = tracked(run, PART, build(config), by="held_out_ap50")
    torch.manual_seed(config.seed)
    slots, slots_optimizer, slots_keeper = tracked(run, "regressor", _regressor(config), by="held_out_ap50")
    maps, pixels = None, data.pixels.to(run.device)
    if policy.eye is None:  # it stands still: every picture is seen once, for both
        side = config.image_size // policy.stride
        check_memory(config.backbone, (len(data), policy.channels, side, side), 4)
        maps = seen_maps(policy, data.pixels)
    task = _task(config) | {"device": run.device, "spare": config.spare}
    env = BoxSearchEnv(config.copies, detections=data, searches=searches, **task)
    env.reset(seed=config.seed + run.rank * config.copies)
    target, env, replay = run.track(
        target=build(config), env=env, replay=Replay(env.state, -(-config.replay // config.copies))
    )
    how: dict[str, Any] = {"look": partial(env.regions, maps=maps), "good": env.rewarded}
    how["beside"] = partial(with_belief, policy.both, env.rewarded)
    how |= {"keeper": keeper, "validate": partial(_held_out, config, policy, val, held)}
    learn_by_acting(run, PART, SHARE, env, policy, target, optimizer, replay, _acting(config), **how)
    policy.eval()
    wanted = sought.of_searches(val.boxes, held)
    policy.level.fill_(judged.giving_up(_search(config, policy, val, held), wanted, config.economy))
    for step in run.steps("regressor", 1 - SHARE):
        if step == 0:
            slots_keeper.begin()
        here = run.rows(config.batch)
        some = searches[noise.examples(config.seed, step, config.batch, len(searches))[here]]
        boxes = map_tree(lambda leaf: leaf.to(run.device), sought.of_searches(data.boxes, some))
        rows, label = some.to(run.device).unbind(1)
        placed, logits = slots(slots.see(pixels[rows].float() / 255) if maps is None else maps[rows], label)
        losses = slot_loss(placed, logits, boxes, config.image_size)
        set_learning_rate(slots_optimizer, one_cycle(run.progress, config.learning_rate))
        run.optimise(torch.stack(list(losses.values())).sum(), slots_optimizer, clip=1.0)
        run.log(**{name: loss.detach() for name, loss in losses.items()})
        if (step + 1) % 500 == 0:
            slots_keeper.offer(slots, found := ap50(_slots_found(slots, val, held), wanted))
            run.log(held_out_ap50=found)
    slots_keeper.finish(slots, ap50(_slots_found(slots, val, held), wanted))
    run.save()


def _search(config: Config, policy: RegionQ, data: Detections, searches: Searches) -> Searched:
    """Make these searches greedily, to the end."""
    device, found = policy.level.device, []
    task = _task(config) | {"device": device, "autoreset": "disabled"}
    for shown, some in sought.in_pieces(data, searches, AT_ONCE):
        env = BoxSearchEnv(len(some), detections=shown, searches=some, **task)
        look = partial(env.regions, maps=seen_maps(policy, shown.pixels))
        made = walk(env, policy, torch.arange(len(some), device=device), look)
        fired, rest = made.taken & (made.actions == TRIGGER), task["horizon"] - made.taken.shape[1]
        values, looked, fired = (F.pad(part, (0, rest)) for part in (made.values, made.taken, fired))
        regions = F.pad(made.states.box[:, :-1], (0, 0, 0, rest))
        found.append(Searched(regions, values, looked, fired, some[:, 1].to(device)))
    return map_tree(lambda leaf: leaf.cpu(), concatenate(found, 0))


def _held_out(config: Config, policy: RegionQ, val: Detections, searches: Searches) -> dict[str, float]:
    policy.eval()
    found, targets = _search(config, policy, val, searches), sought.of_searches(val.boxes, searches)
    recall = judged.recall_so_far(found.regions, found.looked, targets)[-1]
    return {"held_out_ap50": ap50(found.boxes(), targets), "held_out_recall": float(recall)}


def _slots_found(slots: BoxSlots, data: Detections, searches: Searches) -> Boxes:
    slots.eval()
    found = []
    for shown, some in sought.in_pieces(data, searches, AT_ONCE):
        maps = seen_maps(slots, shown.pixels)
        number, label = some.to(maps.device).unbind(1)
        found.append(slots.found(maps[number], label))
    return map_tree(lambda leaf: leaf.cpu(), concatenate(found, 0))


def evaluate(config: Config, policy: RegionQ, run: Run, elsewhere: bool = False) -> Evaluation:
    """Of greedy searches on the test split, in [0, 1]: `ap50`, and `recall` at an IoU of 0.5 of all regions looked at.

    `ap50` (the mean over classes) and `f1` are those of the triggered regions, each scored by the trigger's value;
    `regions` were looked at for each object found. With `target` each, every picture is searched for every class.
    Baselines: `patient`, the agent that gives no search up; `untrained`, the network before it learned; `regressor`;
    `centre`, one box in the middle; `random` boxes of the sizes of training objects, and `sliding` windows, as many as
    the agent looked at. `centre` and `sliding` have the shapes best in training.
    """
    data, shown, side = _data(config, "test"), showing(_data(config, "train")), config.image_size
    every = sought.every_search(data)
    targets = sought.of_searches(data.boxes, every)
    seen = subset(shown, torch.arange(min(SHAPED, len(shown)))).boxes
    whole = _search(config, policy, data, every)
    found = whole.until(float(policy.level))
    torch.manual_seed(config.seed)
    before = _search(config, build(config).to(run.device).eval(), data, every)
    series, baselines = {}, {}
    metrics, series["agent"] = judged.search_scores(found, targets)
    baselines["patient"], series["patient"] = judged.search_scores(whole, targets)
    baselines["untrained"], series["untrained"] = judged.search_scores(before, targets)
    for name, slots in restored(run, {"regressor": "regressor"}, partial(_regressor, config)).items():
        baselines[name] = judged.box_scores(_slots_found(slots, data, every), targets)
    middle = judged.sliding_boxes(1, seen, len(every), side)
    baselines["centre"] = judged.box_scores(replace(middle, labels=every[:, 1:]), targets)
    keys = noise.key(config.seed, "random", torch.arange(len(every)))
    for name, (recall, points) in judged.other_regions(keys, found.looked, seen, targets, side).items():
        baselines[name], series[name] = {"recall": recall}, points
    return Evaluation(metrics, baselines, {"recall against regions looked at": series})


def predict(config: Config, policy: RegionQ, images: Pictures) -> dict[str, Tensor]:
    """Search in images in [0, 1] for all classes, one after the other.

    Returns `boxes` [batch, classes · triggers, 4] in pixels of the images, `labels`, `scores` (the trigger's value) and
    `mask`; and of every step `regions` [batch, classes · time, 4], `looked`, `fired` and `values`.

    Raises:
        InputError: the images break the convention, or are not RGB.
    """
    check_rgb(images, "images")
    height, width = images.shape[2:]
    shown = sought.unmarked(images, config.image_size, config.classes or ("object",))
    found = _search(config, policy, shown, sought.every_search(shown)).until(float(policy.level))
    found = replace(found, regions=found.regions * (torch.tensor([width, height] * 2) / config.image_size))
    told = {name: getattr(found.boxes(config.triggers), name) for name in ("boxes", "labels", "scores", "mask")}
    told |= {name: getattr(found, name) for name in ("regions", "looked", "fired", "values")}
    return {name: leaf.unflatten(0, (len(images), -1)).flatten(1, 2).to(images.device) for name, leaf in told.items()}


def picture(config: Config, policy: RegionQ, run: Run, images: Pictures | None = None) -> dict[str, Any]:
    """Searches in test pictures beside the true boxes, or in pictures of the user; the first one as an animation.

    Of the searches for several classes, that with the surest trigger is drawn, beside what all of them found.
    """
    truth, classes = None, config.classes or ("object",)
    if images is None:
        test = _data(config, "test")
        images, truth = chosen(test, torch.arange(min(8, len(test))))
    images = images.cpu()
    way = predict(config, policy, images)
    steps = [way[name].unflatten(1, (len(classes), -1)) for name in ("regions", "looked", "fired", "values")]
    surest = steps[3].masked_fill(~steps[2], judged.NEVER).amax(2).argmax(1)
    regions, looked, fired, values = (leaf[torch.arange(len(images)), surest] for leaf in steps)
    names = found = None
    if len(classes) > 1:
        names = [classes[number] for number in surest.tolist()]
        found = Boxes(*(way[name] for name in ("boxes", "labels", "mask", "scores")))
    searches = search_grid(images, regions, looked, fired, values, truth, classes, names, found)
    seen = looked[0]
    first = search_frames(images[0], regions[0][seen], fired[0][seen], values[0][seen], names[0] if names else None)
    return {"searches": searches, "first search": first}


def read(config: Config, path: Path) -> Pictures:
    """The user's picture, or the pictures of a folder."""
    return read_pictures(path, 3, None if path.is_file() else 4 * config.image_size)


def check(config: Config) -> dict[str, Any]:
    """The first training pictures with their boxes, and further views of them."""
    data = showing(_data(config, "train"))
    data = several_views(subset(data, torch.arange(min(8, len(data)))), min(config.views or 1, 2))
    images, boxes = chosen(data, torch.arange(len(data)))
    return {"data": pictures.box_grid(images, {"truth": boxes}, data.classes, columns=4)}
