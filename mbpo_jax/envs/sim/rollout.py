"""One episode in the simulator: of the scripted expert, or of a policy, chunk by chunk."""

import time
from collections.abc import Callable, Iterator

import numpy as np

from mbpo_jax.envs.requests import (
    BranchRequest,
    BranchResult,
    EpisodeRequest,
    EpisodeResult,
    Query,
)
from mbpo_jax.envs.sim.recording import Recorder
from mbpo_jax.envs.sim.simulator import RobosuiteEnv
from mbpo_jax.episode import strided_timesteps

_JITTER_MEMORY = 0.85


def run_expert(
    env: RobosuiteEnv,
    request: EpisodeRequest,
    plan: Callable[..., Iterator[np.ndarray]],
) -> EpisodeResult:
    """One episode of an expert, with frames if it succeeded.

    `plan` gives the expert's actions [A] from the start of the episode on, and calls its second
    argument for how far [2] it misses the next place that it aims at: by `request.aim_offset` and,
    anew each time, by `request.aim_error`. Executed are these actions plus autoregressive jitter on
    all dimensions but the grippers', whose level is drawn from `request.action_noise`; the labels
    are the expert's. Frames are at every `request.render_every` steps from an offset drawn from the
    seed, and at the last 5 steps. Raises ValueError for a stride that does not divide the chunk,
    and what `plan` raises.
    """
    started = time.perf_counter()
    if env.chunk % request.render_every:
        raise ValueError(
            f"render_every={request.render_every} must divide the chunk of {env.chunk} steps"
        )
    env.reset_to(request)
    random = np.random.default_rng([max(request.seed, 0), request.init_state_id + 1])
    level = request.action_noise[random.integers(len(request.action_noise))]
    offset = int(random.integers(request.render_every))
    recorder = Recorder(env)
    aiming = np.random.default_rng([max(request.seed, 0), request.init_state_id + 1, 1])
    sent, labels = [], []
    moving = np.flatnonzero(env.jitter_scale)
    jitter = np.zeros(len(moving))
    habit = np.array(request.aim_offset)
    for label in plan(env, lambda: habit + request.aim_error * aiming.normal(size=2)):
        innovation = random.normal(size=len(moving)) * np.sqrt(1 - _JITTER_MEMORY**2)
        jitter = _JITTER_MEMORY * jitter + innovation
        action = label.copy()
        noise = level * jitter * env.jitter_scale[moving]
        action[moving] = np.clip(label[moving] + noise, -1, 1)
        env.step(action)
        recorder.record()
        sent.append(action)
        labels.append(label)
        if env.over:
            break
    sent = np.array(sent).reshape(-1, env.action_dim)
    labels = np.array(labels).reshape(-1, env.action_dim)
    timesteps = np.zeros(0, np.int32)
    if env.success:
        timesteps = strided_timesteps(env.num_steps, request.render_every, offset)
    episode = recorder.episode(request, "expert", timesteps, sent, labels)
    video = recorder.video(request.video_size)
    return EpisodeResult(request, episode, video, time.perf_counter() - started)


def run_policy(
    env: RobosuiteEnv, request: EpisodeRequest, act: Callable[[Query], np.ndarray], source: str
) -> EpisodeResult:
    """One episode of a policy, open loop inside a chunk.

    `act` maps a Query to a chunk of actions float [k, A] with k = env.chunk. Frames are at the
    chunks' starts, at every `request.render_every` steps and at the end, and at the last
    `request.success_frames` steps of a success.
    Raises ValueError for a chunk of another shape.
    """
    started = time.perf_counter()
    env.reset_to(request)
    recorder = Recorder(env)
    planned: list[np.ndarray] = []
    drawn, first_success = {}, -1
    while not env.over:
        images, proprio = env.observe()
        drawn[env.num_steps] = images
        actions = np.asarray(act(Query(request, len(planned), images, proprio)), np.float32)
        if actions.shape != (env.chunk, env.action_dim):
            raise ValueError(
                f"a policy returns [{env.chunk}, {env.action_dim}] actions, not "
                f"{list(actions.shape)}"
            )
        planned.append(actions)
        for action in actions:
            env.step(action)
            recorder.record()
            if env.success and first_success < 0:
                first_success = env.num_steps
            if env.over:
                break
    length = env.num_steps
    first = length - request.success_frames + 1 if env.success else length
    between = np.arange(0, length, request.render_every)
    timesteps = np.union1d(np.union1d(list(drawn), between), np.arange(max(0, first), length + 1))
    sent = np.concatenate(planned)
    episode = recorder.episode(request, source, timesteps, sent, sent, drawn)
    video = recorder.video(request.video_size)
    return EpisodeResult(request, episode, video, time.perf_counter() - started, first_success)


def run_branches(env: RobosuiteEnv, request: BranchRequest) -> BranchResult:
    """The continuations of an episode, which is executed once more up to the moment that some of
    them go on from. One that has succeeded stays where it is.

    Raises ValueError when the episode ends before that moment.
    """
    env.reset_to(request.start)
    moment = None
    if any(state is None for state in request.states):
        for action in request.before:
            env.step(action)
        if env.success:
            raise ValueError(f"{request.start} has succeeded within {len(request.before)} steps")
        moment = env.snapshot()
    seen = []
    for actions, state in zip(request.chunks, request.states):
        env.restore(moment if state is None else state)
        for action in actions:
            if env.success:
                break
            env.step(action)
        seen.append((*env.observe(), env.success, env.snapshot()))
    images, proprio, success, states = zip(*seen)
    views = {camera: np.stack([x[camera] for x in images]) for camera in env.cameras}
    return BranchResult(views, np.stack(proprio), np.array(success), list(states), moment)
