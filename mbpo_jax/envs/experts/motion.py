"""How the scripted experts move a hand. Lengths in metres, angles in radians.

Every motion is a proportional law on the distance to a target, so that the actions are smooth and
a network can imitate them.
"""

from collections.abc import Callable, Iterator

import numpy as np

from mbpo_jax.envs.sim.simulator import RobosuiteEnv

Actions = Iterator[np.ndarray]
Miss = Callable[[], np.ndarray]  # how far [2] beside its place the next grasp or placing goes

OPEN, CLOSED = -1.0, 1.0
DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])  # the hand at yaw 0

UP = np.array([0.0, 0.0, 1.0])

_METRES, _RADIANS = 0.05, 0.5  # what an action of 1.0 commands
_GAIN = 0.8  # at 1.5 the arm arrives sooner, but a network imitates the last centimetres worse


def exactly() -> np.ndarray:
    """The `Miss` of an expert that misses nothing."""
    return np.zeros(2)


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


class Progress:
    """Notices that a motion is held up."""

    def __init__(self, patience: int = 15):
        self._patience, self._best, self._since = patience, np.inf, 0

    def ended(self, distance: float) -> bool:
        """Whether a distance, told at every step, has not shrunk for so many steps."""
        self._since += 1
        if distance < self._best - 0.001:
            self._best, self._since = distance, 0
        return self._since >= self._patience


def reach(hand: Hand, position: np.ndarray, rotation: np.ndarray, gripper: float) -> Actions:
    """Roughly to a pose (position [3], rotation [3, 3]), on the way to somewhere else. Ends early
    where it gets no nearer."""
    progress = Progress()
    for _ in range(60):
        off = np.linalg.norm(position - hand.position)
        turned = np.linalg.norm(hand.rotation_error(rotation))
        if (off < 0.03 and turned < 0.3) or progress.ended(off + 0.1 * turned):
            return
        yield hand.towards(position, rotation, gripper)


def approach(
    hand: Hand,
    position: np.ndarray,
    rotation: np.ndarray,
    tolerance: float,
    clearance: float,
    gripper: float = OPEN,
    along: np.ndarray | None = None,
) -> Actions:
    """To a pose (position [3], rotation [3, 3]) through a funnel along a unit vector [3], which by
    default is where the hand points: from up to `clearance` before it, and near only where well
    centred and turned. `tolerance`: how near is near enough. Ends early where it gets no nearer."""
    progress = Progress()
    along = rotation[:, 2] if along is None else along
    for _ in range(100):
        error = position - hand.position
        off_centre = np.linalg.norm(error - along * (error @ along))
        turned = np.linalg.norm(hand.rotation_error(rotation))
        if np.linalg.norm(error) < tolerance and turned < 0.15:
            return
        if progress.ended(np.linalg.norm(error) + 0.1 * turned):
            return
        back = np.clip(4 * (off_centre - tolerance) + 0.3 * max(turned - 0.15, 0), 0, 1)
        yield hand.towards(position - along * min(back, clearance), rotation, gripper)


def close_fingers(hand: Hand, position: np.ndarray, rotation: np.ndarray) -> Actions:
    """Closes the fingers at a pose until they are stopped."""
    width = np.inf
    for step in range(15):
        if step >= 4 and width - hand.finger_width < 0.001:
            return
        width = hand.finger_width
        yield hand.towards(position, rotation, CLOSED)


def retreat(
    hand: Hand, direction: np.ndarray, distance: float, rotation: np.ndarray, gripper: float
) -> Actions:
    """Straight away along a unit vector [3]."""
    start = hand.position
    for _ in range(30):
        if (hand.position - start) @ direction > distance:
            return
        yield hand.towards(start + direction * (distance + 0.05), rotation, gripper)


def let_go(hand: Hand, rotation: np.ndarray, direction: np.ndarray = UP) -> Actions:
    """Opens the fingers and retreats."""
    position = hand.position
    for _ in range(6):
        yield hand.towards(position, rotation, OPEN)
    yield from retreat(hand, direction, 0.1, rotation, OPEN)
