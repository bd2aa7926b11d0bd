"""What is asked of the simulator and what comes back. NumPy only: worker processes import it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mbpo_jax.episode import Episode


@dataclasses.dataclass(frozen=True)
class EpisodeRequest:
    """One episode to be run.

    task_id: of the suite that the environment or pool was made for.
    seed / init_state_id: a random reset, or a fixed initial state; exactly one is >= 0.
    max_steps: length after which the episode has failed.
    action_noise: levels of the jitter on the expert's actions; an episode draws one of them.
    aim_error: how far the expert grasps and puts down from above beside where it means to: standard
        deviation in metres of each horizontal direction, drawn anew each time.
    aim_offset: [x, y] by which it does so every time, in metres: its habit.
    render_every: stride of the frames in steps; divides the chunk, so that the frame a chunk later
        is there too. The chunk itself: a policy's frames are those that it sees.
    success_frames: last frames of a policy's success that are drawn; those before the very last are
        further positive examples for the reward.
    video_size: pixels of extra frames for a video, 0 for none.
    until_end: a policy goes on to max_steps, and has succeeded if the task is done at the last
        step; else the first step at which it is done ends the episode.
    """

    task_id: int
    seed: int = -1
    init_state_id: int = -1
    max_steps: int = 520
    action_noise: tuple[float, ...] = (0.0,)
    aim_error: float = 0.0
    aim_offset: tuple[float, float] = (0.0, 0.0)
    render_every: int = 5
    success_frames: int = 5
    video_size: int = 0
    until_end: bool = False

    def __post_init__(self) -> None:
        if (self.seed >= 0) == (self.init_state_id >= 0):
            raise ValueError(
                "an episode starts from a seed or from an init_state_id: exactly one must be >= 0, "
                f"not seed={self.seed} and init_state_id={self.init_state_id}"
            )
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, not {self.max_steps}")
        if not self.action_noise or min(self.action_noise) < 0:
            raise ValueError(f"action_noise needs levels >= 0, not {self.action_noise}")
        if not self.aim_error >= 0:
            raise ValueError(f"aim_error must be >= 0 metres, not {self.aim_error}")
        if len(self.aim_offset) != 2:
            raise ValueError(f"aim_offset must be two numbers, x and y, not {self.aim_offset}")


@dataclasses.dataclass
class EpisodeResult:
    """An episode with its request. `video`: camera -> uint8 [n, S, S, 3] at VIDEO_STRIDE steps and
    at the end, or None; `seconds`: what it cost on its worker; `first_success`: the step at which a
    policy's task was done first, -1 if never."""

    request: EpisodeRequest
    episode: Episode
    video: dict[str, np.ndarray] | None
    seconds: float
    first_success: int = -1


@dataclasses.dataclass
class Query:
    """A policy is asked for chunk number `chunk_index` of an episode: frames camera -> uint8
    [H, W, 3] and proprioception float32 [P]."""

    request: EpisodeRequest
    chunk_index: int
    images: dict[str, np.ndarray]
    proprio: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class BranchRequest:
    """Several continuations of one episode.

    start: how the episode began. chunks: float [G, s, A], what each continuation executes.
    states: G states of the simulator that they go on from (`BranchResult.states`, maybe of another
    worker), None for the moment behind `before`, float [t, A].
    """

    start: EpisodeRequest
    before: np.ndarray
    chunks: np.ndarray
    states: Sequence[Any]

    @property
    def task_id(self) -> int:
        return self.start.task_id


@dataclasses.dataclass
class BranchResult:
    """What a `BranchRequest` led to: frames camera -> uint8 [G, H, W, 3], proprioception float32
    [G, P] and success bool [G], s steps later or at success if that came first, and the states of
    the simulator there, G in number. `moment` is its state behind `before`, if that was needed."""

    images: dict[str, np.ndarray]
    proprio: np.ndarray
    success: np.ndarray
    states: list[Any]
    moment: Any


@dataclasses.dataclass(frozen=True)
class Failure:
    """In place of a result: what went wrong, in words. Its traceback is in the worker's log."""

    message: str
