"""A scripted expert for LIBERO that sees the simulator's state.

It reads the goal's predicates and works through them: `in` and `on` by picking and placing from
above, `turnon` by turning a knob.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mbpo_jax.envs.experts.geometry import (
    Grasp,
    Placement,
    body_points,
    plan_grasp,
    plan_insertion,
    rotation_about_vertical,
)
from mbpo_jax.envs.experts.motion import CLOSED, DOWN, OPEN, Hand
from mbpo_jax.envs.sim.libero import LiberoEnv

SUPPORTED_PREDICATES = ("in", "on", "turnon")

_ATTEMPTS = 3  # grasps of one object, and passes over the goal

Actions = Iterator[np.ndarray]


def unsupported(goals: Iterable[tuple[str, ...]]) -> str:
    """Which part of a goal the expert cannot achieve and why, "" if it can achieve all of it."""
    for goal in goals:
        if goal[0] not in SUPPORTED_PREDICATES:
            known = ", ".join(SUPPORTED_PREDICATES)
            return f"cannot achieve {' '.join(goal)!r}: it knows the predicates {known}"
    return ""


def check_supported(env: LiberoEnv) -> None:
    """Raises ValueError if the goal has a predicate that the expert cannot achieve."""
    reason = unsupported(env.goals)
    if reason:
        raise ValueError(
            f"in {env.suite} task {env.task_id} ({env.instruction}) the scripted expert {reason}. "
            "Import demonstrations for this task instead"
        )


class Scene:
    """What the expert knows of the simulator: poses and surfaces by the names of the goal."""

    def __init__(self, env: LiberoEnv):
        self.env = env
        self.hand = Hand(env)
        self._bodies = env.simulation.obj_body_id
        self._sites = env.simulation.object_sites_dict

    def is_true(self, goal: tuple[str, ...]) -> bool:
        return bool(self.env.simulation._eval_predicate(goal))

    def position(self, name: str) -> np.ndarray:
        if name in self._bodies:
            return self.env.data.xpos[self._bodies[name]].copy()
        return np.array(self.env.simulation.sim.data.get_site_xpos(name))

    def points(self, name: str) -> np.ndarray:
        return body_points(self.env.model, self.env.data, self._bodies[name])

    def obstacles(self, name: str) -> np.ndarray:
        """Surface points of everything that stands on the table besides `name`."""
        others = [self.points(other) for other in self._bodies if other != name]
        return np.concatenate([np.zeros((0, 3)), *others])

    def region(self, name: str) -> Any:
        """LIBERO's record of a region, None for an object."""
        return self._sites.get(name)

    def half_size(self, name: str) -> np.ndarray:
        """Half extents [3] of a region along the world's axes, as LIBERO's predicate has them."""
        rotation = np.array(self.env.simulation.sim.data.get_site_xmat(name)).reshape(3, 3)
        return np.abs(rotation @ self._sites[name].size)

    def knob(self, name: str) -> tuple[np.ndarray, int]:
        """Surface points of a fixture's knob and the address of its angle in qpos."""
        joint = self.env.simulation.sim.model.joint_name2id(
            self.env.simulation.get_object(name).joints[0]
        )
        body = self.env.model.jnt_bodyid[joint]
        points = body_points(self.env.model, self.env.data, body, subtree=False)
        return points, self.env.model.jnt_qposadr[joint]


def plan(env: LiberoEnv) -> Actions:
    """Actions [7] that achieve the goal. Raises ValueError for a goal that is not supported."""
    check_supported(env)
    return _achieve(Scene(env))


def _achieve(scene: Scene) -> Actions:
    for _ in range(_ATTEMPTS):
        for goal in scene.env.goals:
            if scene.is_true(goal):
                continue
            if goal[0] == "turnon":
                yield from _turn_on(scene, goal[1])
            else:
                yield from _pick(scene, goal[1])
                yield from _place(scene, goal)


def _rotation_error(scene: Scene, yaw: float) -> np.ndarray:
    """Axis-angle [3] from the hand's orientation to pointing down at `yaw`."""
    return scene.hand.rotation_error(rotation_about_vertical(yaw) @ DOWN)


def _towards(scene: Scene, target: np.ndarray, yaw: float, gripper: float) -> np.ndarray:
    """The action [7] towards a position with the hand pointing down at `yaw`."""
    return scene.hand.towards(target, rotation_about_vertical(yaw) @ DOWN, gripper)


def _pick(scene: Scene, name: str) -> Actions:
    """Grasps an object from above and lifts it a little; tries again if it slips."""
    for attempt in range(_ATTEMPTS):
        height = scene.position(name)[2]
        grasp = plan_grasp(scene.points(name), scene.obstacles(name), attempt)
        top = scene.points(name)[:, 2].max()
        if attempt:
            yield from _rise(scene, top + 0.10, grasp.yaw, OPEN)
        yield from _descend(scene, grasp, top + 0.03)
        yield from _close_fingers(scene, grasp)
        yield from _rise(scene, grasp.position[2] + 0.04, grasp.yaw, CLOSED)
        if scene.position(name)[2] > height + 0.02:
            return


def _descend(scene: Scene, grasp: Grasp, safe: float, gripper: float = OPEN) -> Actions:
    """Down into a funnel over the grasp: the hand is low only where it is well centred."""
    for _ in range(100):
        error = grasp.position - scene.hand.position
        off_centre = np.linalg.norm(error[:2])
        turned = np.linalg.norm(_rotation_error(scene, grasp.yaw))
        if np.linalg.norm(error) < grasp.tolerance and turned < 0.15:
            return
        lift = np.clip(4 * (off_centre - grasp.tolerance) + 0.3 * max(turned - 0.15, 0), 0, 1)
        height = grasp.position[2] + min(lift, max(safe - grasp.position[2], 0) + 0.02)
        yield _towards(scene, np.array([*grasp.position[:2], height]), grasp.yaw, gripper)


def _close_fingers(scene: Scene, grasp: Grasp) -> Actions:
    width = np.inf
    for step in range(15):
        if step >= 4 and width - scene.hand.finger_width < 0.001:
            return
        width = scene.hand.finger_width
        yield _towards(scene, grasp.position, grasp.yaw, CLOSED)


def _rise(scene: Scene, height: float, yaw: float, gripper: float) -> Actions:
    start = scene.hand.position[:2]
    for _ in range(30):
        if scene.hand.position[2] > height:
            return
        yield _towards(scene, np.array([*start, height + 0.05]), yaw, gripper)


def _place(scene: Scene, goal: tuple[str, ...]) -> Actions:
    """Carries the held object over its target, lowers it, lets go and withdraws."""
    name = goal[1]
    plan = _destination(scene, goal)
    start = scene.hand.position[2]
    for _ in range(200):
        held = scene.position(name)
        error = np.array([*plan.spot, plan.height]) - held
        off_centre = np.linalg.norm(error[:2])
        if abs(error[2]) < 0.006 and off_centre < 0.02:
            break
        turned = np.linalg.norm(_rotation_error(scene, plan.yaw))
        funnel = 3 * (off_centre - 0.01) + 0.2 * max(turned - 0.2, 0)
        error[2] += np.clip(funnel, 0, plan.lift)
        action = _towards(scene, scene.hand.position + error, plan.yaw, CLOSED)
        # Neighbours of the object are passed only once it is above them.
        risen = np.clip((scene.hand.position[2] - start) / 0.04, 0, 1)
        action[:2] *= risen if off_centre > 0.05 else 1.0
        yield action
        if np.linalg.norm(scene.position(name) - scene.hand.position) > 0.25:  # dropped on the way
            return
    yield from _let_go(scene, plan.yaw)


def _yaw(scene: Scene) -> float:
    rotation = scene.hand.rotation @ DOWN.T
    return float(np.arctan2(rotation[1, 0], rotation[0, 0]))


def _destination(scene: Scene, goal: tuple[str, ...]) -> Placement:
    """Where the object that is held now goes."""
    predicate, name, target = goal
    shape = scene.points(name) - scene.position(name)
    centre, region, yaw = scene.position(target), scene.region(target), _yaw(scene)
    if predicate == "in":
        container = scene.points(region.parent_name)
        return plan_insertion(shape, yaw, container, centre, scene.half_size(target))
    if region is None:
        points = scene.points(target)
        near = np.linalg.norm(points[:, :2] - centre[:2], axis=1) < 0.05
        surface = (points[near] if near.any() else points)[:, 2].max() + 0.008
    else:
        surface = centre[2] + 0.015
    return Placement(centre[:2], surface - shape[:, 2].min(), yaw, 0.05)


def _let_go(scene: Scene, yaw: float) -> Actions:
    position = scene.hand.position
    for _ in range(6):
        yield _towards(scene, position, yaw, OPEN)
    yield from _rise(scene, position[2] + 0.1, yaw, OPEN)


def _turn_on(scene: Scene, name: str) -> Actions:
    """Grips a knob and turns the hand until the fixture is on."""
    points, address = scene.knob(name)
    top = points[points[:, 2] > points[:, 2].max() - 0.025]
    grasp = plan_grasp(top, np.zeros((0, 3)))
    position = np.array([*grasp.position[:2], top[:, 2].max() - 0.012])
    grasp = dataclasses.replace(grasp, position=position)
    yield from _descend(scene, grasp, top[:, 2].max() + 0.03)
    yield from _close_fingers(scene, grasp)
    for step in range(60):
        if scene.env.data.qpos[address] > 0.7:
            break
        yield _towards(scene, position, grasp.yaw + min(1.4, 0.06 * (step + 1)), CLOSED)
    yield from _let_go(scene, _yaw(scene))
