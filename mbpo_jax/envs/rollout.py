"""One episode of a policy in the simulator, chunk by chunk."""

import time
from collections.abc import Callable

import numpy as np

from mbpo_jax.envs.libero import ACTION_DIM, LiberoEnv
from mbpo_jax.envs.recording import Recorder
from mbpo_jax.envs.requests import EpisodeRequest, EpisodeResult, Query


def run_policy(
    env: LiberoEnv, request: EpisodeRequest, act: Callable[[Query], np.ndarray], source: str
) -> EpisodeResult:
    """One episode of a policy, open loop inside a chunk.

    `act` maps a Query to a chunk of actions float [k, 7] with k = env.chunk. Frames are at the
    chunks' starts and at the end, and at the last `request.success_frames` steps of a success.
    Raises ValueError for a chunk of another shape.
    """
    started = time.perf_counter()
    env.max_steps = request.max_steps
    env.reset_to(request)
    recorder = Recorder(env)
    planned: list[np.ndarray] = []
    drawn = {}
    while not env.over:
        images, proprio = env.observe()
        drawn[env.num_steps] = images
        actions = np.asarray(act(Query(request, len(planned), images, proprio)), np.float32)
        if actions.shape != (env.chunk, ACTION_DIM):
            raise ValueError(
                f"a policy returns [{env.chunk}, {ACTION_DIM}] actions, not {list(actions.shape)}"
            )
        planned.append(actions)
        for action in actions:
            env.step(action)
            recorder.record()
            if env.over:
                break
    length = env.num_steps
    first = length - request.success_frames + 1 if env.success else length
    timesteps = np.union1d(list(drawn), np.arange(max(0, first), length + 1))
    sent = np.concatenate(planned)
    episode = recorder.episode(request, source, timesteps, sent, sent, drawn)
    video = recorder.video(request.video_size)
    return EpisodeResult(request, episode, video, time.perf_counter() - started)
