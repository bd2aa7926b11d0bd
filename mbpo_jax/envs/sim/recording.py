"""From a running environment to an Episode: states are saved at every step, frames drawn later."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mbpo_jax.envs.requests import EpisodeRequest
from mbpo_jax.envs.sim.simulator import RobosuiteEnv
from mbpo_jax.episode import Episode, action_windows

VIDEO_STRIDE = 4


class Recorder:
    """Collects one episode of `env` that starts now; call `record` after every step."""

    def __init__(self, env: RobosuiteEnv):
        self._env = env
        self._states = [env.state()]
        self._proprio = [env.proprio()]

    def record(self) -> None:
        self._states.append(self._env.state())
        self._proprio.append(self._env.proprio())

    def frames(self, timesteps: np.ndarray, size: int | None = None) -> dict[str, np.ndarray]:
        """Camera -> uint8 [F, S, S, 3], drawn from the saved states. Ends the episode."""
        size = size or self._env.image_size
        frames = {
            camera: np.zeros((len(timesteps), size, size, 3), np.uint8)
            for camera in self._env.cameras
        }
        for row, timestep in enumerate(timesteps):
            for camera, frame in self._env.render_state(self._states[timestep], size).items():
                frames[camera][row] = frame
        return frames

    def video(self, size: int) -> dict[str, np.ndarray] | None:
        """Frames for a video of the whole episode; None if `size` is 0."""
        if size == 0:
            return None
        length = len(self._states) - 1
        return self.frames(np.union1d(np.arange(0, length, VIDEO_STRIDE), [length]), size)

    def episode(
        self,
        request: EpisodeRequest,
        source: str,
        timesteps: np.ndarray,
        sent: np.ndarray,
        labels: np.ndarray,
        drawn: dict[int, dict[str, np.ndarray]] | None = None,
    ) -> Episode:
        """The record with frames at `timesteps`.

        sent, labels: float [>= length, A], the actions of the whole episode and the supervised
        labels; `sent` may hold planned actions beyond the end. drawn: frames that exist already,
        by time step.
        """
        env, drawn = self._env, drawn or {}
        length, success, fraction = env.num_steps, env.success, env.goal_fraction
        timesteps = np.asarray(timesteps, np.int32)
        missing = np.array([t for t in timesteps if t not in drawn], np.int32)
        images = self.frames(missing)
        rows = {int(t): {c: images[c][i] for c in env.cameras} for i, t in enumerate(missing)}
        rows.update(drawn)
        shape = (0, env.image_size, env.image_size, 3)
        return Episode(
            suite=env.suite,
            task_id=env.task_id,
            instruction=env.instruction,
            source=source,
            seed=request.seed,
            init_state_id=request.init_state_id,
            success=success,
            length=length,
            goal_fraction=fraction,
            timesteps=timesteps,
            images={
                camera: np.stack([rows[int(t)][camera] for t in timesteps])
                if len(timesteps)
                else np.zeros(shape, np.uint8)
                for camera in env.cameras
            },
            proprio=np.stack(self._proprio)[timesteps],
            actions=action_windows(sent, timesteps, env.chunk),
            target_actions=action_windows(labels, timesteps, env.chunk),
            num_actions=np.minimum(env.chunk, length - timesteps).astype(np.int32),
        )


def write_video(video: Mapping[str, np.ndarray], path: Path, control_hz: float) -> None:
    """An episode's `video` (camera -> uint8 [n, S, S, 3], VIDEO_STRIDE steps apart) as a GIF at the
    robot's speed, its views side by side; complete or not there at all."""
    import imageio.v3 as iio

    frames = np.concatenate([*video.values()], axis=2)
    temporary = path.with_name(f"{path.stem}_unfinished.gif")
    iio.imwrite(temporary, frames, duration=1000 * VIDEO_STRIDE / control_hz, loop=0)
    temporary.replace(path)
