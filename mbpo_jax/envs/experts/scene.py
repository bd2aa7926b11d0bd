"""What the scripted expert for LIBERO knows of the simulator. Lengths in metres."""

from typing import Any

import numpy as np

from mbpo_jax.envs.experts.geometry import body_points
from mbpo_jax.envs.experts.motion import Hand, Miss
from mbpo_jax.envs.sim.libero import LiberoEnv

_FREE, _SLIDE = 0, 2  # mjtJoint


class Part:
    """A part of a fixture that moves on one joint: a drawer, a door or a knob."""

    def __init__(self, env: LiberoEnv, joint: str):
        self._model, self._data = env.model, env.data
        self._joint = env.simulation.sim.model.joint_name2id(joint)
        self._body = env.model.jnt_bodyid[self._joint]
        self.slides = bool(env.model.jnt_type[self._joint] == _SLIDE)
        self.free = bool(env.model.jnt_type[self._joint] == _FREE)

    @property
    def opening(self) -> float:
        """How far it is open, metres or radians; shut it is near 0."""
        return float(self._sign * self._data.qpos[self._model.jnt_qposadr[self._joint]])

    @property
    def range(self) -> float:
        """The opening that is not exceeded."""
        return float(np.ptp(self._model.jnt_range[self._joint]))

    @property
    def points(self) -> np.ndarray:
        """Surface points [N, 3]."""
        return body_points(self._model, self._data, self._body, subtree=False)

    @property
    def hinge(self) -> np.ndarray:
        """A point [3] on the axis of a part that turns."""
        return self._data.xanchor[self._joint].copy()

    def opening_direction(self, point: np.ndarray) -> np.ndarray:
        """Unit vector [3] along which a `point` [3] of it moves when it opens."""
        axis = self._sign * self._data.xaxis[self._joint]
        if self.slides:
            return axis
        moves = np.cross(axis, point - self.hinge)
        return moves / np.linalg.norm(moves)

    @property
    def _sign(self) -> float:
        return float(np.sign(self._model.jnt_range[self._joint].sum()))


class Scene:
    """Poses and surfaces by the names of the goal. `miss` gives how far [2] the next grasp or
    placing is off."""

    def __init__(self, env: LiberoEnv, miss: Miss):
        self.env, self.miss = env, miss
        self.hand = Hand(env)
        self._bodies = env.simulation.obj_body_id
        self._sites = env.simulation.object_sites_dict

    def is_true(self, *goal: str) -> bool:
        return bool(self.env.simulation._eval_predicate(goal))

    def position(self, name: str) -> np.ndarray:
        if name in self._bodies:
            return self.env.data.xpos[self._bodies[name]].copy()
        return np.array(self.env.simulation.sim.data.get_site_xpos(name))

    def points(self, name: str, subtree: bool = True) -> np.ndarray:
        """Surface points [N, 3] of an object, with or without what moves on it."""
        return body_points(self.env.model, self.env.data, self._bodies[name], subtree)

    def palm(self) -> np.ndarray:
        """Surface points [N, 3] of the hand without its fingertips."""
        points = body_points(self.env.model, self.env.data, self.env.arms[0].hand_body)
        return points[(self.hand.position - points) @ self.hand.rotation[:, 2] > 0.03]

    def obstacles(self, name: str) -> np.ndarray:
        """Surface points of everything that stands on the table besides `name`."""
        others = [self.points(other) for other in self._bodies if other != name]
        return np.concatenate([np.zeros((0, 3)), *others])

    def furniture(self) -> np.ndarray:
        """Surface points [N, 3] of what cannot be carried away."""
        fixed = [self.points(name) for name in self.env.simulation.fixtures_dict]
        return np.concatenate([np.zeros((0, 3)), *fixed])

    def region(self, name: str) -> Any:
        """LIBERO's record of a region, None for an object."""
        return self._sites.get(name)

    def half_size(self, name: str) -> np.ndarray:
        """Half extents [3] of a region along the world's axes, as LIBERO's predicate has them."""
        rotation = np.array(self.env.simulation.sim.data.get_site_xmat(name)).reshape(3, 3)
        return np.abs(rotation @ self._sites[name].size)

    def part(self, name: str) -> Part | None:
        """The drawer that a region is in, or what moves of a fixture; None if nothing does, or
        all of it, as of what can be carried away."""
        holder = self._sites.get(name) or self.env.simulation.get_object(name)
        joints = [*(holder.joints or ())]
        part = Part(self.env, joints[0]) if joints else None
        return None if part is None or part.free else part
