"""The scripted expert's dealings with drawers, doors and knobs."""

import numpy as np

from mbpo_jax.envs.experts.geometry import leaning, plan_grasp
from mbpo_jax.envs.experts.motion import (
    CLOSED,
    DOWN,
    OPEN,
    Actions,
    approach,
    close_fingers,
    let_go,
    reach,
)
from mbpo_jax.envs.experts.pick_place import downward, yaw_of
from mbpo_jax.envs.experts.scene import Scene

_LEAN = 1.3  # of the hand at a handle: level it would touch what lies before the drawer
_ROOM = 0.11  # of a drawer that is to be filled


def pull_open(scene: Scene, name: str, enough: float = np.inf) -> Actions:
    """Grips the bar of a drawer's handle from the front and pulls until the drawer counts as open,
    or is open by `enough`."""
    hand, part = scene.hand, scene.part(name)
    outward = part.opening_direction(np.zeros(3))
    points = part.points
    ahead = points @ outward
    bar = points[ahead > ahead.max() - 0.012]
    centre = (bar.min(axis=0) + bar.max(axis=0)) / 2
    centre += outward * (ahead.max() - 0.008 - centre @ outward)
    rotation = leaning(DOWN, outward, _LEAN)
    yield from reach(hand, centre + 0.1 * outward + [0, 0, 0.15], rotation, OPEN)
    yield from approach(hand, centre, rotation, 0.01, 0.1)
    yield from close_fingers(hand, centre, rotation)
    for _ in range(100):
        if scene.is_true("open", name) or part.opening > enough:
            break
        yield hand.towards(hand.position + outward * 0.05, rotation, CLOSED)
    yield from let_go(hand, rotation, outward)


def push_shut(scene: Scene, name: str) -> Actions:
    yield from ()


def turn_on(scene: Scene, name: str) -> Actions:
    """Grips a knob and turns the hand until the fixture is on."""
    hand, part = scene.hand, scene.part(name)
    points = part.points
    top = points[points[:, 2] > points[:, 2].max() - 0.025]
    grasp = plan_grasp(top, np.zeros((0, 3)))
    position = np.array([*grasp.position[:2], top[:, 2].max() - 0.012])
    rotation = downward(grasp.yaw)
    yield from approach(hand, position, rotation, grasp.tolerance, 0.062)
    yield from close_fingers(hand, position, rotation)
    for step in range(60):
        if part.opening > 0.7:
            break
        turned = downward(grasp.yaw + min(1.4, 0.06 * (step + 1)))
        yield hand.towards(position, turned, CLOSED)
    yield from let_go(hand, downward(yaw_of(hand.rotation)))


def prepare(scene: Scene, target: str) -> Actions:
    """Opens the drawer that something is to be put into, no further than the hand can do without:
    what is to be put into it may lie before it."""
    part = scene.part(target)
    if part and part.slides and part.opening < _ROOM - 0.03:
        yield from pull_open(scene, target, _ROOM)
