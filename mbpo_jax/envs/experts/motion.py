"""How the scripted experts move a hand.

Every motion is a proportional law on the distance to a target, so that the actions are smooth and
a network can imitate them.
"""

import numpy as np

from mbpo_jax.envs.sim.simulator import RobosuiteEnv

OPEN, CLOSED = -1.0, 1.0
DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])  # the hand at yaw 0

_METRES, _RADIANS = 0.05, 0.5  # what an action of 1.0 commands
_GAIN = 0.8  # at 1.5 the arm arrives sooner, but a network imitates the last centimetres worse


class Hand:
    """The hand of one arm of an environment."""

    def __init__(self, env: RobosuiteEnv, arm: int = 0):
        self._data, self._arm = env.data, env.arms[arm]

    @property
    def position(self) -> np.ndarray:
        """[3], of the point between the fingertips."""
        return self._data.site_xpos[self._arm.site].copy()

    @property
    def rotation(self) -> np.ndarray:
        """[3, 3]; the fingers open along the first column and point along the third."""
        return self._data.site_xmat[self._arm.site].reshape(3, 3).copy()

    @property
    def finger_width(self) -> float:
        return float(np.ptp(self._data.qpos[self._arm.finger_joints]))

    def rotation_error(self, target: np.ndarray) -> np.ndarray:
        """Axis-angle [3] from the hand's orientation to `target` [3, 3]."""
        relative = target @ self.rotation.T
        axis = np.array(
            [
                relative[2, 1] - relative[1, 2],
                relative[0, 2] - relative[2, 0],
                relative[1, 0] - relative[0, 1],
            ]
        )
        sine = np.linalg.norm(axis) / 2
        angle = np.arctan2(sine, (np.trace(relative) - 1) / 2)
        return axis * (angle / (2 * sine)) if sine > 1e-9 else np.zeros(3)

    def towards(
        self, target: np.ndarray, rotation: np.ndarray, gripper: float, pace: float = 1.0
    ) -> np.ndarray:
        """The action [7] towards a pose: proportional, limited to `pace`, horizontally and
        vertically apart so that the arm rises at full speed while it travels."""
        step = _GAIN * (target - self.position) / _METRES
        step[:2] *= min(1.0, pace / max(np.abs(step[:2]).max(), 1e-9))
        step[2] = np.clip(step[2], -pace, pace)
        turn = _GAIN * self.rotation_error(rotation) / _RADIANS
        turn *= min(1.0, 1.0 / max(np.linalg.norm(turn), 1e-9))
        return np.concatenate([step, turn, [gripper]])
