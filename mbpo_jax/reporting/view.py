"""One episode, or one imagined branch, as a page to scrub through: every view recorded and imagined
side by side, the chunk of actions, P(done) and the critic's value."""

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jinja2
import numpy as np

from mbpo_jax.data.episodes import read_episodes
from mbpo_jax.data.formats.recording import encode_image
from mbpo_jax.data.pipelines import collate, transitions
from mbpo_jax.episode import Episode
from mbpo_jax.mbpo import imagine
from mbpo_jax.seeds import stream
from mbpo_jax.stages.build import load_policy, load_world_model, observation_builder
from mbpo_jax.stages.imagination import branch_keys
from mbpo_jax.stages.workspace import StageError, Workspace
from mbpo_jax.types import Observation
from mbpo_jax.world_model import metrics

Frames = Sequence[np.ndarray | None]  # uint8 [H, W, 3]; None where there is none


@dataclass
class Clip:
    """What a page shows at each of its F moments.

    times: environment steps since the episode began.
    views: camera -> row of the page ("recorded", "imagined") -> a frame per moment.
    actions: the chunk [k, A] sent from each moment on, or None.
    curves: name -> a number per moment, or None.
    """

    title: str
    subtitle: str
    times: list[int]
    views: dict[str, dict[str, Frames]]
    actions: list[np.ndarray | None]
    curves: dict[str, list[float | None]]


def episode_clip(workspace: Workspace, stage: str, number: int) -> Clip:
    """Episode `number` that `stage` recorded. Where the world model is trained, each frame is
    beside the one imagined from the frame a chunk earlier and the actions that were sent; where the
    policy is improved, its critic gives values.

    Raises:
        StageError: there is no such episode.
    """
    config, episode = workspace.config, _episode(workspace, stage, number)
    count = len(episode.timesteps)
    views = {camera: {"recorded": list(episode.images[camera])} for camera in config.cameras}
    curves: dict[str, list] = {}
    if workspace.summary("world_model") is not None:
        builder = observation_builder(config)
        frames = collate([builder.at(episode, f) for f in range(count)])
        world, params = load_world_model(config, workspace.root)
        reward = jax.jit(metrics.judge(world))
        curves["P(done), recorded frame"] = np.asarray(reward(params, frames)).tolist()
        source = transitions([episode], builder, config.chunk)
        if len(source):
            chosen = collate(list(source))
            key = jax.random.key(stream(config.seed, "view"))
            imagined = metrics.imagine_chunk(world, params, chosen, key)
            reached = source.index[:, 2].tolist()
            for camera in config.cameras:
                views[camera]["imagined"] = _at(count, reached, imagined.images[camera])
            probability = reward(params, imagined)
            curves["P(done), imagined frame"] = _at(count, reached, np.asarray(probability))
        if workspace.summary("improve") is not None:
            curves["value"] = _values(workspace, frames).tolist()
    outcome = "success" if episode.success else "no success"
    return Clip(
        title=f"{stage}, episode {number}: {episode.instruction}",
        subtitle=f"{outcome} after {episode.length} steps; acted: {episode.source}. An imagined "
        "frame is what the world model expected from the recorded frame a chunk earlier.",
        times=episode.timesteps.tolist(),
        views=views,
        actions=[a if n else None for a, n in zip(episode.actions, episode.num_actions)],
        curves=curves,
    )


def branch_clip(workspace: Workspace, stage: str, number: int, step: int, chunks: int) -> Clip:
    """`chunks` chunks that the improved policy imagines from the frame at `step` of an episode,
    beside what was recorded at the same times, when other actions were sent.

    Raises:
        StageError: there is no such episode or frame, or a stage is missing.
    """
    config, episode = workspace.config, _episode(workspace, stage, number)
    workspace.require("world_model")
    workspace.require("improve")
    recorded = {int(t): f for f, t in enumerate(episode.timesteps)}
    if step not in recorded:
        raise StageError(
            f"{stage} episode {number} has no frame at step {step}; there are frames at "
            + ", ".join(map(str, recorded))
        )
    world, world_params = load_world_model(config, workspace.root)
    policy, params = _improved(workspace)
    start = collate([observation_builder(config).at(episode, recorded[step])])
    threshold = config.rl.reward_threshold

    @jax.jit
    def run(params, world_params, start, key):
        branch = imagine(
            policy,
            world,
            params,
            world_params,
            start,
            branch_keys(key, np.arange(1)),
            chunks=chunks,
            reward_threshold=threshold,
        )
        last = branch.last_observation
        moments = jax.tree.map(
            lambda x, y: jax.numpy.concatenate([x, y[None]])[:, 0], branch.observation, last
        )
        return branch, moments, metrics.judge(world)(world_params, moments)

    branch, moments, probability = jax.device_get(
        run(params, world_params, start, jax.random.key(stream(config.seed, "view")))
    )
    times = [step + i * config.chunk for i in range(chunks + 1)]
    views = {
        camera: {
            "recorded": [
                episode.images[camera][recorded[t]] if t in recorded else None for t in times
            ],
            "imagined": list(moments.images[camera]),
        }
        for camera in config.cameras
    }
    return Clip(
        title=f"branch from {stage}, episode {number}, step {step}: {episode.instruction}",
        subtitle=f"{chunks} chunks of the improved policy in the world model; the recorded frames "
        "followed other actions.",
        times=times,
        views=views,
        actions=[*branch.actions[:, 0], None],
        curves={
            "P(done), imagined frame": probability.tolist(),
            "value": [*branch.value[:, 0].tolist(), float(branch.bootstrap_value[0])],
        },
    )


def render_clip(clip: Clip) -> str:
    """The clip as one HTML page without outside parts."""
    views = {
        camera: {row: [_png(frame) for frame in frames] for row, frames in rows.items()}
        for camera, rows in clip.views.items()
    }
    actions = [None if chunk is None else np.round(chunk, 4).tolist() for chunk in clip.actions]
    environment = jinja2.Environment(autoescape=True)
    environment.policies["json.dumps_kwargs"] = {}  # keys in our order: the head camera first
    template = Path(__file__).with_name("view.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=clip.title,
        subtitle=clip.subtitle,
        data=asdict(clip) | {"views": views, "actions": actions},
    )


def write_rerun(clip: Clip, path: Path) -> None:
    """The clip as a Rerun recording (`rerun PATH`), on a timeline of environment steps.

    Raises:
        ModuleNotFoundError: the package rerun-sdk is not installed.
    """
    import rerun

    with rerun.RecordingStream("mbpo_jax") as recording:
        recording.save(path)
        for i, time in enumerate(clip.times):
            recording.set_time("step", sequence=time)
            for camera, rows in clip.views.items():
                for row, frames in rows.items():
                    if frames[i] is not None:
                        recording.log(f"{camera}/{row}", rerun.Image(frames[i]))
            for name, values in clip.curves.items():
                if values[i] is not None:
                    recording.log(f"curves/{name}", rerun.Scalars(values[i]))
            for j, action in enumerate(() if clip.actions[i] is None else clip.actions[i]):
                recording.set_time("step", sequence=time + j)
                recording.log("actions", rerun.Scalars(action))


def _episode(workspace: Workspace, stage: str, number: int) -> Episode:
    episodes = read_episodes(workspace.directory(stage) / "dataset")
    if not 0 <= number < len(episodes):
        raise StageError(f"{stage} has the episodes 0 to {len(episodes) - 1}; there is no {number}")
    return episodes[number]


def _improved(workspace: Workspace):
    policy_directory = workspace.directory("improve") / "policy"
    return load_policy(workspace.config, workspace.directory("sft"), policy_directory)


def _values(workspace: Workspace, frames: Observation) -> np.ndarray:
    policy, params = _improved(workspace)
    return np.asarray(jax.jit(lambda p, o: policy.value(p, policy.encode(p, o)))(params, frames))


def _at(count: int, places: Sequence[int], values: np.ndarray) -> list:
    """A list of `count` with `values[i]` at `places[i]` and None elsewhere."""
    placed: list = [None] * count
    for place, value in zip(places, values):
        placed[place] = float(value) if np.ndim(value) == 0 else value
    return placed


def _png(frame: np.ndarray | None) -> str | None:
    return None if frame is None else base64.b64encode(encode_image(frame)).decode()
