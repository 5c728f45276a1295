"""Whether a reward of the user's own tells answers apart: from one that does not, nothing can be learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from foveate.types import InputError, RewardOutput, Tree, map_tree, rows_of, split

FEW, AT_ONCE = 300, 50  # inputs that are asked about at most, and together


def check_tells_apart(
    reward: Callable[[Any, Any], RewardOutput], name: str, drawn: Tensor, right: Tree, none: Tree, targets: Tree
) -> None:
    """Refuse a reward that is the same for all answers.

    One that is to be learned from may be the same for everything that an untrained policy says, and for right answers
    to most inputs: so it is asked on, and no further than to two totals that differ.

    Args:
        reward: of answers and targets. If it fails on these answers, nothing is said against it: no policy gave them.
        name: of the reward, for the message.
        drawn: totals of what an untrained policy answered.
        right: the right answers, [inputs, ...]; those of the next input are asked about as wrong ones.
        none: the emptiest answers, [inputs, ...].
        targets: of the inputs.

    Raises:
        InputError: all totals are the same.
    """
    if bool((drawn != drawn[0]).any()):
        return
    first, count = float(drawn[0]), len(drawn)
    few = map_tree(lambda leaf: leaf[:FEW], (right, none, targets))
    for true, empty, wanted in zip(*(split(each, AT_ONCE) for each in few), strict=True):
        for answers in (true, map_tree(lambda leaf: leaf.roll(-1, 0), true), empty):
            try:
                total = reward(answers, wanted).total
            except Exception:  # whatever the user's function raises
                return
            if bool((total != first).any()):
                return
            count += rows_of(answers)
    raise InputError(
        f"reward {name}: is {first:g} for all {count} answers, right, wrong and empty ones among them: nothing can "
        "be learned from it; do predictions and targets share one convention?"
    )
