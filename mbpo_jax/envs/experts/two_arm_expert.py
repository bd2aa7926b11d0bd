"""A scripted expert for the two-arm lift that sees the simulator's state.

Both hands move in step: they open over their handles, come down around them, close, and rise
together, the higher hand waiting for the lower one so that the pot stays level.
"""

from collections.abc import Callable

import numpy as np

from mbpo_jax.envs.experts.motion import CLOSED, OPEN, Actions, Hand, Miss
from mbpo_jax.envs.sim.two_arm_lift import TwoArmLiftEnv

_ATTEMPTS = 3
_ABOVE = 0.06  # metres over the handle from which a hand comes down
_CENTRED, _TURNED = 0.015, 0.15  # metres and radians within which a hand comes down
# Jitter keeps the hand this far from where it wants to be: metres horizontally and vertically.
_ARRIVED = (0.025, 0.015)
_LIFT = 0.16  # metres
_PACE = 0.5  # of the fastest command, for the lift


def plan(env: TwoArmLiftEnv, miss: Miss) -> Actions:
    """Actions [14] that lift the pot, each hand `miss` [2] beside its handle; begins anew if one
    slips."""
    arms = [_GraspingHand(env, arm, miss()) for arm in range(2)]
    for _ in range(_ATTEMPTS):
        yield from _both(arms, lambda arm: arm.approach(), lambda arm: arm.arrived, 80)
        yield from _both(arms, lambda arm: arm.close(), lambda arm: False, 8)
        yield from _lift(arms)
        yield from _both(arms, lambda arm: arm.let_go(), lambda arm: False, 12)


class _GraspingHand:
    """One arm with the handle that it is for."""

    def __init__(self, env: TwoArmLiftEnv, arm: int, miss: np.ndarray):
        self._env, self._arm, self.hand = env, arm, Hand(env, arm)
        self._miss = np.array([*miss, 0.0])

    @property
    def grasp(self) -> tuple[np.ndarray, np.ndarray]:
        """Position [3] and rotation [3, 3] of the hand around the handle's bar: the fingers open
        across it, turned whichever way is nearer."""
        position, outwards = self._env.handle(self._arm)
        if outwards @ self.hand.rotation[:, 0] < 0:
            outwards = -outwards
        down = np.array([0.0, 0.0, -1.0])
        return position + self._miss, np.column_stack([outwards, np.cross(down, outwards), down])

    @property
    def arrived(self) -> bool:
        position, rotation = self.grasp
        error = np.abs(position - self.hand.position)
        turned = np.linalg.norm(self.hand.rotation_error(rotation))
        near = np.linalg.norm(error[:2]) < _ARRIVED[0] and error[2] < _ARRIVED[1]
        return bool(near and turned < _TURNED)

    def approach(self) -> np.ndarray:
        """Down into a funnel: the hand is low only where it is centred and turned."""
        position, rotation = self.grasp
        off_centre = np.linalg.norm((position - self.hand.position)[:2])
        turned = np.linalg.norm(self.hand.rotation_error(rotation))
        funnel = 4 * max(off_centre - _CENTRED, 0) + 0.3 * max(turned - _TURNED, 0)
        target = position + np.array([0, 0, min(funnel, _ABOVE)])
        return self.hand.towards(target, rotation, OPEN)

    def close(self) -> np.ndarray:
        return self.hand.towards(self.grasp[0], self.hand.rotation, CLOSED)

    def let_go(self) -> np.ndarray:
        return self.hand.towards(self.hand.position + [0, 0, 0.05], self.hand.rotation, OPEN)


def _both(
    arms: list[_GraspingHand],
    act: Callable[[_GraspingHand], np.ndarray],
    finished: Callable[[_GraspingHand], bool],
    steps: int,
) -> Actions:
    """Both arms act until both have finished, for at most so many steps."""
    for _ in range(steps):
        if all(finished(arm) for arm in arms):
            return
        yield np.concatenate([act(arm) for arm in arms])


def _lift(arms: list[_GraspingHand]) -> Actions:
    starts = [(arm.hand.position, arm.hand.rotation) for arm in arms]
    for _ in range(60):
        risen = [arm.hand.position[2] - start[2] for arm, (start, _) in zip(arms, starts)]
        if min(risen) > _LIFT:
            return
        height = min(risen) + 0.05
        actions = [
            arm.hand.towards(start + [0, 0, height], rotation, CLOSED, _PACE)
            for arm, (start, rotation) in zip(arms, starts)
        ]
        yield np.concatenate(actions)
