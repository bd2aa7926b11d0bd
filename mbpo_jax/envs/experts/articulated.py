"""The scripted expert's dealings with drawers, doors and knobs."""

from collections.abc import Callable

import numpy as np

from mbpo_jax.envs.experts.geometry import clear_spot, leaning, plan_grasp, yaw_along
from mbpo_jax.envs.experts.motion import (
    CLOSED,
    OPEN,
    UP,
    Actions,
    approach,
    close_fingers,
    let_go,
    reach,
    retreat,
)
from mbpo_jax.envs.experts.pick_place import downward, set_aside, yaw_of
from mbpo_jax.envs.experts.scene import Part, Scene

_LEAN = 1.3  # of the hand at a handle: level it would touch what lies before the drawer
_ROOM = 0.11  # of a drawer that is to be filled
_DOOR = 0.9  # of its range: how wide a door stands open that something is to be put behind


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
    rotation = leaning(downward(yaw_along(outward)), outward, _LEAN)
    yield from reach(hand, centre + 0.1 * outward + 0.15 * UP, rotation, OPEN)
    yield from approach(hand, centre, rotation, 0.01, 0.1)
    yield from close_fingers(hand, centre, rotation)
    for _ in range(100):
        if scene.is_true("open", name) or part.opening > enough:
            break
        yield hand.towards(hand.position + outward * 0.05, rotation, CLOSED)
    yield from let_go(hand, rotation, outward)


def push_shut(scene: Scene, name: str) -> Actions:
    """Pushes a drawer or door with closed fingers until it counts as shut."""
    yield from _push(scene, scene.part(name), -1.0, lambda: scene.is_true("close", name))


def _push(scene: Scene, part: Part, sense: float, done: Callable[[], bool]) -> Actions:
    """Pushes a drawer or door with closed fingers, open (`sense` 1) or shut (-1), until `done`."""
    hand = scene.hand
    contact = _contact(part, sense)
    back = -sense * part.opening_direction(contact)
    rotation = downward(yaw_along(np.cross(back, UP)))
    if part.slides:
        rotation = leaning(rotation, back, 0.6)
    top = part.points[:, 2].max()
    yield from retreat(hand, UP, top + 0.12 - hand.position[2], hand.rotation, OPEN)
    before = contact + 0.04 * back
    yield from reach(hand, np.array([*before[:2], top + 0.12]), rotation, CLOSED)
    yield from approach(hand, before, rotation, 0.02, 0.12, CLOSED)
    for _ in range(150):
        if done():
            break
        contact = _contact(part, sense)
        back = -sense * part.opening_direction(contact)
        yield hand.towards(contact - 0.04 * back, rotation, CLOSED)
    # Up from an opened door: the hand would take it along.
    away = UP if sense > 0 else part.opening_direction(contact)
    yield from retreat(hand, away, 0.05, rotation, CLOSED)


def _contact(part: Part, sense: float) -> np.ndarray:
    """Where [3] fingertips push: on a drawer's handle, or high on a door, on its outside to shut
    it, where its handle is not in the way."""
    points = part.points
    if part.slides:
        outward = part.opening_direction(points[0])
        front = points[points @ outward > (points @ outward).max() - 0.012]
        return (front.min(axis=0) + front.max(axis=0)) / 2
    radius = np.linalg.norm((points - part.hinge)[:, :2], axis=1)
    ring = points[np.abs(radius - 0.7 * radius.max()) < 0.02]
    ahead = ring @ (-sense * part.opening_direction(ring.mean(axis=0)))
    middle = ring[ahead > ahead.max() - 0.005].mean(axis=0)
    return np.array([*middle[:2], points[:, 2].max() - 0.03])


def turn_on(scene: Scene, name: str) -> Actions:
    """Grips a knob and turns the hand until the fixture is on."""
    yield from _turn(scene, scene.part(name), 1.0, lambda: scene.part(name).opening > 0.7)


def turn_off(scene: Scene, name: str) -> Actions:
    """Grips a knob and turns the hand until the fixture is off."""
    yield from _turn(scene, scene.part(name), -1.0, lambda: scene.is_true("turnoff", name))


def _turn(scene: Scene, part: Part, sense: float, done: Callable[[], bool]) -> Actions:
    hand, points = scene.hand, part.points
    top = points[points[:, 2] > points[:, 2].max() - 0.025]
    grasp = plan_grasp(top, np.zeros((0, 3)))
    position = np.array([*grasp.position[:2], top[:, 2].max() - 0.012])
    rotation = downward(grasp.yaw)
    yield from approach(hand, position, rotation, grasp.tolerance, 0.062)
    yield from close_fingers(hand, position, rotation)
    for step in range(60):
        if done():
            break
        turned = downward(grasp.yaw + sense * min(1.4, 0.06 * (step + 1)))
        yield hand.towards(position, turned, CLOSED)
    yield from let_go(hand, downward(yaw_of(hand.rotation)))


def prepare(scene: Scene, goal: tuple[str, ...]) -> Actions:
    """Opens the drawer that `goal`, an `in` or `on`, wants an object in, no further than the hand
    can do without; where the hand would then not reach the object from above, it is set aside
    before. A door is pushed wide open, out of the arm's way."""
    predicate, name, target = goal
    part = scene.part(target)
    if part and part.slides and part.opening < _ROOM - 0.03:
        outward = part.opening_direction(np.zeros(3))
        opened = part.points + (_ROOM - part.opening) * outward
        spot = clear_spot(scene.position(name), opened, outward, scene.obstacles(name))
        if spot is not None:
            yield from set_aside(scene, name, spot)
        yield from pull_open(scene, target, _ROOM)
    door = scene.part(scene.region(target).parent_name) if predicate == "in" and not part else None
    if door and not door.slides and door.opening < _DOOR * door.range:
        yield from _push(scene, door, 1.0, lambda: door.opening > _DOOR * door.range)
