"""Let a policy act in an environment and write down what happened."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from foveate import noise
from foveate.types import Decisions, InputError, Trajectory, Tree, concatenate, map_tree

HASHED = 16  # steps whose keys are made at once: a hash of so many costs as much as one of a single step


def rollout(
    env: Any,
    policy: nn.Module,
    keys: Int[Tensor, " batch"],
    *,
    ids: Int[Tensor, " batch"] | None = None,
    grad: bool = False,
    greedy: bool = False,
    group: Int[Tensor, " batch"] | None = None,
) -> tuple[Trajectory, Decisions | None]:
    """Run one episode in every copy of a lockstep environment without autoreset (`foveate.envs.TensorEnv`).

    Args:
        env: stepped until every copy has ended; a copy that ended earlier stands still, with reward 0, and is padding
            from there on.
        policy: a `Policy`, or one wrapped for several processes.
        keys: one key a copy. The environment's own chance and the policy's both follow from it.
        ids: which example each copy shows; drawn by the environment if not given.
        grad: keep the graph, and return the decisions of all steps joined along time, so that a loss can go through
            the steps just taken. Without it (for learners that pass over the trajectory again) they are None.
        greedy: take the most likely action instead of drawing one.
        group: which rows are samples of the same input.

    Returns:
        What happened, and the decisions of every step if `grad`. `last_value` is the critic's value of what was seen
        after a row's last step, remembering all of the row, where a limit cut it, and 0 where the task ended by itself.

    Raises:
        InputError: the environment resets copies by itself, or gives arrays.
    """
    if env.autoreset.name != "DISABLED" or env.output != "torch":
        raise InputError(
            f"env: found autoreset {env.autoreset.name.lower()!r} and output {env.output!r}, "
            "expected 'disabled' and 'torch': make it with autoreset='disabled'"
        )
    observation, _ = env.reset(options={"keys": keys} if ids is None else {"keys": keys, "ids": ids})
    ended = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
    state = None
    cut = torch.zeros_like(ended)
    starts = torch.ones_like(ended)
    steps: list[dict[str, Tree]] = []
    made: list[Decisions] = []
    while True:
        with torch.set_grad_enabled(grad):
            seen = map_tree(lambda leaf: leaf[:, None], observation)
            decisions, state = policy(seen, state, starts[:, None])
        with torch.no_grad():
            if greedy:
                action = decisions.distribution.mode()
            else:
                place = len(steps) % HASHED
                if place == 0:
                    numbers = torch.arange(len(steps), len(steps) + HASHED, device=keys.device)
                    draws = noise.fold(keys[:, None], "action", numbers)
                action = decisions.distribution.sample(draws[:, place : place + 1])
            mask = ~ended
            reward, terminated, truncated, _ = env.advance(map_tree(lambda leaf: leaf[:, 0], action))
            cut = cut | truncated
            ended = ended | terminated | truncated
            done = bool(ended.all())
            # Looking may cost more than stepping, and the end of a task is looked at by nobody.
            if not done or (decisions.values is not None and bool(cut.any())):
                observation = env.observe(env.state)
        steps.append(
            {
                "observations": seen,
                "actions": action,
                "rewards": reward[:, None],
                "mask": mask[:, None],
                "terminated": terminated[:, None],
                "truncated": truncated[:, None],
                "values": None if decisions.values is None else decisions.values.detach(),
            }
        )
        made.append(decisions)
        starts = torch.zeros_like(starts)
        if done:
            break
    joined, decided = concatenate(steps, 1), concatenate(made, 1)
    last_value = None
    if joined["values"] is not None:
        last_value = torch.zeros_like(joined["values"][:, 0])
        if bool(cut.any()):
            with torch.no_grad():
                after, _ = policy(map_tree(lambda leaf: leaf[:, None], observation), state, starts[:, None])
            # A copy that ended keeps showing its last observation, so the value that belongs after its last step is
            # the one of the step that follows.
            values = torch.cat((joined["values"], after.values.detach()), 1)
            lengths = joined["mask"].sum(1, keepdim=True)
            last_value = values.gather(1, lengths).squeeze(1) * cut
    log_probs = decided.distribution.log_prob(joined["actions"]).detach()
    trajectory = Trajectory(**joined, log_probs=log_probs, last_value=last_value, group=group)
    return trajectory, decided if grad else None
