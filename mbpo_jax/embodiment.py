"""What the pipeline has to know of a robot. One instance per robot, in `configs/`."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mbpo_jax.episode import Episode

_SLACK = 0.01  # actions may leave their limits by this share of the range: calibration, rounding


@dataclasses.dataclass(frozen=True)
class Embodiment:
    """A robot: its views, the numbers that command it and the numbers that it reports.

    Attributes:
        name: of the robot.
        cameras: in the decoding order of the world model's interleaved views, head view first.
        wrist_cameras: those of `cameras` that move with a gripper.
        actions: name of each action dimension, in order.
        action_limits: (low, high) of each, in its raw unit.
        grippers: those of `actions` that open and close a gripper.
        deltas: those of `actions` that are changes (or rates); the others are absolute targets.
        states: name of each dimension of proprioception, in order.
        control_hz: actions per second.
        chunk: k, environment steps in an action chunk.

    Raises:
        ValueError: the parts contradict each other; every contradiction is listed.
    """

    name: str
    cameras: tuple[str, ...]
    wrist_cameras: tuple[str, ...]
    actions: tuple[str, ...]
    action_limits: tuple[tuple[float, float], ...]
    grippers: tuple[str, ...]
    deltas: tuple[str, ...]
    states: tuple[str, ...]
    control_hz: float
    chunk: int

    def __post_init__(self) -> None:
        wrong = []
        for field in ("cameras", "actions", "states"):
            names = getattr(self, field)
            twice = sorted({name for name in names if names.count(name) > 1})
            if not names:
                wrong.append(f"{field} is empty")
            if twice:
                wrong.append(f"{field} has {', '.join(twice)} more than once")
        for field, whole in (
            ("wrist_cameras", "cameras"),
            ("grippers", "actions"),
            ("deltas", "actions"),
        ):
            unknown = [name for name in getattr(self, field) if name not in getattr(self, whole)]
            if unknown:
                wrong.append(f"{field} has {', '.join(unknown)}, not among {whole}")
        if len(self.action_limits) != len(self.actions):
            wrong.append(
                f"action_limits has {len(self.action_limits)} pairs for {len(self.actions)} actions"
            )
        for name, (low, high) in zip(self.actions, self.action_limits):
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                wrong.append(f"action_limits of {name} are ({low}, {high}); low < high is needed")
        if not self.control_hz > 0:
            wrong.append(f"control_hz is {self.control_hz}; more than 0 is needed")
        if self.chunk < 1:
            wrong.append(f"chunk is {self.chunk}; 1 or more is needed")
        if wrong:
            raise ValueError(f"robot {self.name!r}: {'; '.join(wrong)}")

    @property
    def action_dim(self) -> int:
        return len(self.actions)

    @property
    def state_dim(self) -> int:
        return len(self.states)

    def problems(
        self, episode: Episode, cameras: Sequence[str], image_size: int, chunk: int
    ) -> list[str]:
        """Why an episode cannot be this robot's, seen by `cameras` in square frames of `image_size`
        pixels and cut into chunks of `chunk` steps; empty if it can."""
        wrong = []
        missing = [camera for camera in cameras if camera not in episode.images]
        if missing:
            wrong.append(
                f"no images of {', '.join(missing)} (there are {', '.join(sorted(episode.images))})"
            )
        for camera, frames in episode.images.items():
            if camera in cameras and frames.shape[1:] != (image_size, image_size, 3):
                wrong.append(f"frames of {camera} are {frames.shape[1:]}, not {image_size} pixels")
        if episode.actions.shape[1] < chunk:
            wrong.append(f"chunks of {episode.actions.shape[1]} steps, {chunk} are needed")
        if not episode.instruction.strip():
            wrong.append("the instruction is empty")
        width = episode.actions.shape[-1]
        return wrong + self.array_problems(episode.actions.reshape(-1, width), episode.proprio)

    def array_problems(self, actions: np.ndarray, states: np.ndarray) -> list[str]:
        """Why actions [N, A] and states [M, P], in raw units, cannot be this robot's; empty if they
        can."""
        wrong = []
        for field, rows in (("actions", actions), ("states", states)):
            names = getattr(self, field)
            if rows.shape[1] != len(names):
                wrong.append(
                    f"{rows.shape[1]} {field}, the robot {self.name} has {len(names)} "
                    f"({', '.join(names)})"
                )
                continue
            broken = [name for name, column in zip(names, rows.T) if not np.isfinite(column).all()]
            if broken:
                wrong.append(f"{field} that are not finite: {', '.join(broken)}")
            elif field == "actions" and len(rows):
                wrong += self._outside(rows)
        return wrong

    def _outside(self, rows: np.ndarray) -> list[str]:
        wrong = []
        for name, (low, high), column in zip(self.actions, self.action_limits, rows.T):
            slack = _SLACK * (high - low)
            if column.min() < low - slack or column.max() > high + slack:
                wrong.append(
                    f"{name} goes from {column.min():.3g} to {column.max():.3g}, its limits are "
                    f"{low:.3g} and {high:.3g}"
                )
        return wrong
