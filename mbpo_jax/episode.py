"""The record of one episode in the simulator or on the robot, and what of a full-rate recording
goes into it.

It is `mbpo_jax.types.Episode`; it has a file of its own because the simulator's worker processes
need it and must not pay for importing JAX.
"""

import dataclasses

import numpy as np

SUCCESS_FRAMES = 5  # the last frames of a success, all of them positive examples for the reward


@dataclasses.dataclass
class Episode:
    """One recorded episode, NumPy, frames only where they were rendered (F of them).

    A frame's `actions` are the k environment actions *sent* from its time step on (the last ones
    planned but not executed if the episode ended first: `num_actions` says how many were);
    `target_actions` are the labels for supervised training (equal to `actions` unless the expert's
    actions were jittered). Frame times need not be evenly spaced: the last 5 frames of a success
    are always present. The final frame of an episode is at `timesteps[-1] == length`, with
    `num_actions == 0`.
    """

    suite: str
    task_id: int
    instruction: str
    source: str  # "expert" or the name of the policy that acted
    seed: int  # of the random reset; -1 when a fixed init state was used
    init_state_id: int  # of the fixed init state; -1 after a random reset
    success: bool
    length: int  # environment steps T
    goal_fraction: float  # share of goal predicates reached at any time
    timesteps: np.ndarray  # int32 [F], increasing
    images: dict[str, np.ndarray]  # camera -> uint8 [F, H, W, 3]
    proprio: np.ndarray  # float32 [F, P]
    actions: np.ndarray  # float32 [F, k, A]
    target_actions: np.ndarray  # float32 [F, k, A]
    num_actions: np.ndarray  # int32 [F]


def action_windows(sent: np.ndarray, timesteps: np.ndarray, chunk: int) -> np.ndarray:
    """The `chunk` actions from each time step on: [F, chunk, A] from `sent` [T, A].

    A window that runs over the end repeats the last action.
    """
    index = np.minimum(timesteps[:, None] + np.arange(chunk), len(sent) - 1)
    return sent[index].astype(np.float32)


def strided_timesteps(length: int, stride: int, offset: int) -> np.ndarray:
    """int32: every `stride` steps from `offset` on, and the last SUCCESS_FRAMES up to `length`."""
    strided = np.arange(offset, length, stride)
    last = np.arange(max(0, length - SUCCESS_FRAMES + 1), length + 1)
    return np.union1d(strided, last).astype(np.int32)
