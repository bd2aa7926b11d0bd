"""The scripted expert's picking and placing, from above."""

import dataclasses

import numpy as np

from mbpo_jax.envs.experts.geometry import (
    Mouth,
    Placement,
    find_mouth,
    highest_between,
    leaning,
    plan_grasp,
    plan_handle_grasp,
    plan_insertion,
    rotation_about_vertical,
    yaw_along,
)
from mbpo_jax.envs.experts.motion import (
    CLOSED,
    DOWN,
    OPEN,
    UP,
    Actions,
    Progress,
    approach,
    close_fingers,
    let_go,
    reach,
    retreat,
)
from mbpo_jax.envs.experts.scene import Scene

ATTEMPTS = 3  # grasps of one object
_HELD = 0.01  # an object has risen so far at least that is held: by its rim it hangs low
_HIGH = 0.05  # above an object is what a hand can meet that has it by its top
_LEAN = 0.9  # of the hand that reaches under a roof
_FRONT = 0.03  # how far before the middle of such a region something is put


def downward(yaw: float) -> np.ndarray:
    """The hand's rotation [3, 3] when it points down at `yaw`."""
    return rotation_about_vertical(yaw) @ DOWN


def yaw_of(rotation: np.ndarray) -> float:
    """The yaw of a hand that points down."""
    rotation = rotation @ DOWN.T
    return float(np.arctan2(rotation[1, 0], rotation[0, 0]))


def move(scene: Scene, goal: tuple[str, ...]) -> Actions:
    """Brings an object to where `goal`, an `in` or `on`, wants it."""
    predicate, name, target = goal
    if predicate == "in":
        container = scene.points(scene.region(target).parent_name, subtree=False)
        mouth = find_mouth(container, scene.position(target), scene.half_size(target))
        if mouth is not None:
            yield from _slide_in(scene, name, target, mouth)
            return
    yield from pick(scene, name, goal)
    yield from place(scene, goal)


def _slide_in(scene: Scene, name: str, target: str, mouth: Mouth) -> Actions:
    """Takes an object by its handle and puts it into a region with a roof."""
    hand, outward = scene.hand, mouth.outward
    upright = downward(yaw_along(np.cross(outward, UP)))
    rotation = leaning(upright, outward, _LEAN)
    grasp = plan_handle_grasp(scene.points(name), outward)
    yield from reach(hand, grasp + 0.08 * outward + 0.12 * UP, rotation, OPEN)
    yield from approach(hand, grasp, rotation, 0.01, 0.1)
    yield from close_fingers(hand, grasp, rotation)
    yield from retreat(hand, UP, 0.08, rotation, CLOSED)
    held = scene.position(name)
    spot = mouth.middle + _FRONT * outward
    spot[2] += 0.03 - scene.half_size(target)[2] - (scene.points(name) - held)[:, 2].min()
    spot += hand.position - held
    yield from reach(hand, spot + 0.2 * outward, rotation, CLOSED)
    yield from approach(hand, spot, rotation, 0.01, 0.2, CLOSED, -outward)
    yield from let_go(hand, rotation, outward)


def pick(scene: Scene, name: str, goal: tuple[str, ...] = ()) -> Actions:
    """Grasps an object from above and lifts it a little; tries again if it slips. The hand is to
    have room here, and beside the furniture where an "on" or a drawer wants the object."""
    hand = scene.hand
    for attempt in range(ATTEMPTS):
        height = scene.position(name)[2]
        obstacles = scene.obstacles(name)
        crowd = obstacles
        if goal and (goal[0] == "on" or scene.part(goal[2])):
            plan = _destination(scene, goal)
            way = np.array([*plan.spot, plan.height]) - scene.position(name)
            there = scene.furniture() - way  # as it will stand around the object
            high = there[:, 2] > scene.points(name)[:, 2].max() + _HIGH
            crowd = np.concatenate([obstacles, there[high]])
        grasp = plan_grasp(scene.points(name), crowd, attempt)
        grasp = dataclasses.replace(grasp, position=grasp.position + [*scene.miss(), 0.0])
        rotation, low = downward(grasp.yaw), grasp.position[2]
        top = scene.points(name)[:, 2].max()
        between = highest_between(obstacles, hand.position[:2], grasp.position[:2])
        clearance = max(top + 0.03 - low, between + 0.01 - low, 0) + 0.02
        yield from approach(hand, grasp.position, rotation, grasp.tolerance, clearance)
        yield from close_fingers(hand, grasp.position, rotation)
        yield from retreat(hand, UP, low + 0.04 - hand.position[2], rotation, CLOSED)
        if scene.position(name)[2] > height + _HELD:
            return
        # What still hangs in the fingers falls before it is looked at again.
        above = scene.points(name)[:, 2].max() + 0.10
        yield from retreat(hand, UP, above - hand.position[2], rotation, OPEN)


def place(scene: Scene, goal: tuple[str, ...]) -> Actions:
    """Brings the held object to its target."""
    plan = _destination(scene, goal)
    spot = plan.spot + scene.miss()
    yield from _put(scene, goal[1], dataclasses.replace(plan, spot=spot))


def set_aside(scene: Scene, name: str, spot: np.ndarray) -> Actions:
    """Takes an object and sets it down at a free `spot` [2] of what it stands on."""
    height = scene.position(name)[2]
    yield from pick(scene, name)
    yaw = yaw_of(scene.hand.rotation)
    yield from _put(scene, name, Placement(spot, height + 0.005, yaw, 0.05))


def _put(scene: Scene, name: str, plan: Placement) -> Actions:
    """Carries the held object over its place, lowers it, lets go and withdraws."""
    hand = scene.hand
    rotation = downward(plan.yaw)
    start, progress = hand.position[2], Progress()
    # It goes down only near its place, also from a cabinet to the table.
    lift = max(plan.lift, plan.climb + scene.position(name)[2] - plan.height)
    for _ in range(200):
        held = scene.position(name)
        error = np.array([*plan.spot, plan.height]) - held
        off_centre = np.linalg.norm(error[:2])
        if abs(error[2]) < 0.006 and off_centre < 0.02:
            break
        turned = np.linalg.norm(hand.rotation_error(rotation))
        # Rising leads away from a place below: it counts double what is left of it.
        to_rise = max(start + plan.climb - hand.position[2], 0) if off_centre > 0.05 else 0.0
        if progress.ended(np.linalg.norm(error) + 0.1 * turned + 2 * to_rise):
            break
        funnel = 3 * (off_centre - 0.01) + 0.2 * max(turned - 0.2, 0)
        error[2] += np.clip(funnel, 0, lift)
        action = hand.towards(hand.position + error, rotation, CLOSED)
        # Neighbours of the object are passed only once it is above them.
        risen = np.clip((hand.position[2] - start - plan.climb) / 0.04 + 1, 0, 1)
        action[:2] *= risen if off_centre > 0.05 else 1.0
        yield action
        if np.linalg.norm(scene.position(name) - hand.position) > 0.25:  # dropped on the way
            return
    yield from let_go(hand, rotation)


def _destination(scene: Scene, goal: tuple[str, ...]) -> Placement:
    """Where the object that is held now goes."""
    predicate, name, target = goal
    shape = scene.points(name) - scene.position(name)
    centre, region = scene.position(target), scene.region(target)
    yaw = yaw_of(scene.hand.rotation)
    if predicate == "in":
        container, drawer = scene.points(region.parent_name), scene.part(target)
        rim = (drawer.points if drawer else container)[:, 2].max()
        palm = scene.palm() - scene.position(name)
        half = scene.half_size(target)
        inside = plan_insertion(shape, palm, yaw, container, rim, centre, half)
        if drawer:  # it may stand out over what is put into it
            climb = inside.height + inside.lift - scene.position(name)[2]
            inside = dataclasses.replace(inside, climb=max(climb, 0.04))
        return inside
    if region is None:
        points = scene.points(target)
        near = np.linalg.norm(points[:, :2] - centre[:2], axis=1) < 0.05
        surface = (points[near] if near.any() else points)[:, 2].max() + 0.008
    else:
        surface = centre[2] + 0.015
        centre = centre + _share(scene, name, target, shape)
    held = scene.position(name)
    between = highest_between(scene.obstacles(name), held[:2], centre[:2])
    climb = max(between + 0.02 - shape[:, 2].min() - held[2], 0.04)
    return Placement(centre[:2], surface - shape[:, 2].min(), yaw, 0.05, climb)


def _share(scene: Scene, name: str, target: str, shape: np.ndarray) -> np.ndarray:
    """How far [3] from the middle of a region an object goes, so that all that is to stand there
    stands in a row along its narrower side."""
    rivals = [goal[1] for goal in scene.env.goals if goal[0] == "on" and goal[2] == target]
    axis = np.eye(3)[np.argmin(np.ptp(shape[:, :2], axis=0))]
    rivals.sort(key=lambda rival: scene.position(rival) @ axis)
    place = rivals.index(name) - (len(rivals) - 1) / 2
    return axis * place * (np.ptp(shape @ axis) + 0.008)
