"""A scripted expert for LIBERO that sees the simulator's state.

It reads the goal's predicates and works through them: `in` and `on` by picking and placing from
above, `turnon` and `turnoff` by turning a knob, `open` by pulling at a drawer's handle, `close` by
pushing.
"""

from collections.abc import Iterable

from mbpo_jax.envs.experts.articulated import (
    prepare,
    pull_open,
    push_shut,
    turn_off,
    turn_on,
)
from mbpo_jax.envs.experts.motion import Actions, Miss
from mbpo_jax.envs.experts.pick_place import move
from mbpo_jax.envs.experts.scene import Scene
from mbpo_jax.envs.sim.libero import LiberoEnv

# (scene, name) -> actions
_SKILLS = {"open": pull_open, "close": push_shut, "turnon": turn_on, "turnoff": turn_off}
SUPPORTED_PREDICATES = ("in", "on", *_SKILLS)

_PASSES = 3  # over the goal


def unsupported(goals: Iterable[tuple[str, ...]]) -> str:
    """Which part of a goal the expert cannot achieve and why, "" if it can achieve all of it."""
    for goal in goals:
        if goal[0] not in SUPPORTED_PREDICATES:
            known = ", ".join(SUPPORTED_PREDICATES)
            return f"cannot achieve {' '.join(goal)!r}: it knows the predicates {known}"
        if goal[0] == "open" and not goal[1].endswith("_region"):
            return f"cannot achieve {' '.join(goal)!r}: it opens drawers, but no doors"
    return ""


def check_supported(env: LiberoEnv) -> None:
    """Raises ValueError if the goal has a predicate that the expert cannot achieve."""
    reason = unsupported(env.goals)
    if reason:
        raise ValueError(
            f"in {env.suite} task {env.task_id} ({env.instruction}) the scripted expert {reason}. "
            "Import demonstrations for this task instead"
        )


def plan(env: LiberoEnv, miss: Miss) -> Actions:
    """Actions [7] that achieve the goal, `miss` [2] beside every place that is aimed at. Raises
    ValueError for a goal that is not supported."""
    check_supported(env)
    return _achieve(Scene(env, miss))


def _achieve(scene: Scene) -> Actions:
    goals = sorted(scene.env.goals, key=lambda goal: goal[0] == "close")  # what is filled, first
    for _ in range(_PASSES):
        for goal in goals:
            if scene.is_true(*goal):
                continue
            if goal[0] in _SKILLS:
                yield from _SKILLS[goal[0]](scene, goal[1])
            else:
                yield from prepare(scene, goal)
                yield from move(scene, goal)
