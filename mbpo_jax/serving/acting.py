"""A policy that takes messages, here or behind a server, as what acts for simulator workers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from mbpo_jax.envs import suites
from mbpo_jax.envs.requests import Query
from mbpo_jax.envs.sim import libero
from mbpo_jax.envs.workers.pool import PoolAct
from mbpo_jax.serving.inference import INSTRUCTION, OPENPI_IMAGES, STATE
from mbpo_jax.stages.simulation import episode_number

# openpi's own evaluation on LIBERO, for a server that says nothing of its policy.
_IMAGE_SIZE, _STEPS = 224, 5


class MessagePolicy(Protocol):
    """`ServedPolicy` or `RemotePolicy`."""

    metadata: Mapping[str, Any]

    def answer(self, messages: Sequence[Mapping]) -> Sequence[np.ndarray]:
        """A chunk [k, A] for each message."""


class Senses(NamedTuple):
    """What a policy wants to see, how much of a chunk is executed, and whether its noise can be
    named. `image_keys`: camera -> key of its image in a message."""

    image_keys: dict[str, str]
    image_size: int
    steps: int
    names_noise: bool


def senses(
    metadata: Mapping[str, Any], steps: int | None = None, image_size: int | None = None
) -> Senses:
    """Of a policy with this metadata; `steps` and `image_size` take precedence. A server that says
    nothing is treated as openpi's client treats it on LIBERO.

    Raises:
        ValueError: steps that the policy's chunks do not have, or no pixels.
    """
    ours = "image_keys" in metadata
    keys = metadata.get("image_keys", dict(zip(libero.CAMERAS, ([k] for k in OPENPI_IMAGES))))
    horizon = metadata.get("action_horizon")
    steps = (horizon or _STEPS) if steps is None else steps
    if image_size is None:
        image_size = metadata.get("image_size") or _IMAGE_SIZE
    if steps < 1 or (horizon and steps > horizon):
        raise ValueError(
            f"{steps} steps of each chunk cannot be executed: it has {horizon or '1 or more'}"
        )
    if image_size < 1:
        raise ValueError(f"images of {image_size} pixels cannot be drawn")
    return Senses({c: k[0] for c, k in keys.items()}, int(image_size), int(steps), ours)


def check_robot(metadata: Mapping[str, Any], suite: str) -> None:
    """Raises ValueError where the policy says that its robot is another than that of the suite."""
    for name, needed in zip(("action_dim", "state_dim"), suites.dimensions(suite)):
        found = metadata.get(name, needed)
        if found != needed:
            raise ValueError(
                f"the policy is of another robot: its {name} is {found}, that of {suite} {needed}"
            )


def pool_act(policy: MessagePolicy, wants: Senses, suite: str, tasks: Sequence[int]) -> PoolAct:
    """The policy acting on tasks of a suite: chunks [q, wants.steps, A].

    It raises ValueError where an answer is no chunk for that robot, and what `policy.answer`
    raises.
    """
    instructions = {task: suites.task_info(suite, task).instruction for task in tasks}
    width, _ = suites.dimensions(suite)

    def act(queries: list[Query]) -> np.ndarray:
        answers = policy.answer([_message(q, wants, instructions) for q in queries])
        for actions in answers:
            if actions.ndim != 2 or actions.shape[1] != width or len(actions) < wants.steps:
                raise ValueError(
                    f"the policy answers with actions {list(actions.shape)}; {suite} needs "
                    f"{wants.steps} steps or more of {width} numbers"
                )
            if not np.isfinite(actions).all():
                raise ValueError("the policy answers with actions that are not finite")
        return np.stack([actions[: wants.steps] for actions in answers])

    return act


def _message(query: Query, wants: Senses, instructions: Mapping[int, str]) -> dict:
    message = {key: query.images[camera] for camera, key in wants.image_keys.items()}
    message[STATE] = query.proprio
    message[INSTRUCTION] = instructions[query.request.task_id]
    if wants.names_noise:
        message |= {
            "episode": episode_number(query.request),
            "chunk_index": query.chunk_index,
        }
    return message
