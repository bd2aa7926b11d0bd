"""Stage `world_model`: autoencoder, dynamics and reward, then fidelity on held-out episodes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mbpo_jax.data.episodes import read_episodes
from mbpo_jax.data.pipelines import (
    ObservationBuilder,
    Source,
    batches,
    by_label,
    collate,
    process_rows,
    reward_examples,
    split_episodes,
    transition_sequences,
    transitions,
)
from mbpo_jax.episode import Episode
from mbpo_jax.nn.normalization import BOUND
from mbpo_jax.seeds import stream
from mbpo_jax.stages.build import (
    Config,
    build_world_model,
    check_prompts,
    checkpoint_origin,
    observation_builder,
    robot,
)
from mbpo_jax.stages.workspace import StageError, Workspace
from mbpo_jax.training.checkpoints import save_params
from mbpo_jax.training.loop import LossFn, Training, fit
from mbpo_jax.training.run import Run
from mbpo_jax.training.sharding import make_mesh, parameter_sharding
from mbpo_jax.types import Observation, Params, Transition, WorldModel
from mbpo_jax.world_model import bagel, metrics
from mbpo_jax.world_model.checkpoint import load_bagel
from mbpo_jax.world_model.statistics import neutral_statistics, widen_proprio
from mbpo_jax.world_model.umm_world import UMMWorld

Images = Mapping[str, np.ndarray]  # per camera

STATISTICS_TRANSITIONS = 512
FIDELITY_TRANSITIONS = 512
FILM_STRIPS = 3
PROBE_FRAMES = 1500
RANKED_TRANSITIONS, RANKED_CHUNKS = 60, 16
ENCODED_FRAMES = 64  # at a time


def world_model_episodes(workspace: Workspace) -> tuple[list[Episode], list[Episode]]:
    """(training, held-out) episodes: demonstrations and rollouts, split by episode."""
    config = workspace.config
    workspace.require("demonstrations")
    workspace.require("rollouts")
    train, held_out = [], []
    for stage in ("demonstrations", "rollouts"):
        episodes = read_episodes(workspace.directory(stage) / "dataset")
        # Not a stream: what an earlier run held out must stay held out.
        kept, held = split_episodes(episodes, config.world_model.holdout_fraction, config.seed)
        train += kept
        held_out += held
    return train, held_out


def finetune_world_model(workspace: Workspace, directory: Path) -> dict:
    """Trains UMM-World; writes `world_model/`, `fidelity.npz` (film strips) and their numbers."""
    config = workspace.config
    train, held_out = world_model_episodes(workspace)
    check_prompts(workspace, directory.name, [*train, *held_out])
    world = build_world_model(config)
    params = _initial_params(config, world)
    builder = observation_builder(config)
    sources = transitions(train, builder, config.chunk)
    if len(sources) < config.world_model.dynamics_batch_size:
        raise StageError(
            f"only {len(sources)} transitions of {config.chunk} steps in the training episodes; "
            "collect more (--config.rollouts.episodes_per_task)"
        )
    some = collate([sources[i] for i in spread(len(sources), STATISTICS_TRANSITIONS)])
    if config.world_model.vae_training.steps:
        params = _train_vae(config, world, params, train, directory / "vae")
    params["statistics"] = measured_statistics(config, world, params, some, train, sources)
    params = train_dynamics(config, world, params, sources, train, directory / "dynamics")
    save_params(directory / "world_model", params)
    report = measure_fidelity(config, world, params, train, held_out, directory)
    return {
        "training_episodes": len(train),
        "held_out_episodes": len(held_out),
        "transitions": len(sources),
        "transitions_skipped": sources.skipped,
        "actions_clipped": count_clipped(train, robot(config).action_limits),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        **report,
    }


def measured_statistics(
    config: Config,
    world: UMMWorld,
    params: Params,
    some: Transition,
    episodes: list[Episode],
    sources: Source,
) -> Params:
    """The statistics measured on some transitions, with room for all the others' proprioception;
    where that has to be made, says so on the terminal."""
    statistics = params["statistics"] | world.measured(params, some)
    episode, now, later = sources.index.T
    values = [
        np.stack([episodes[e].proprio[f] for e, f in zip(episode, frames)])
        for frames in (now, later)
    ]
    statistics, wide = widen_proprio(statistics, *values)
    if wide:
        names = ", ".join(robot(config).states[i] for i in wide)
        print(
            f"[world_model] statistics of proprioception widened to keep values within ±{BOUND:g}: "
            f"{names}"
        )
    return statistics


def count_clipped(episodes: list[Episode], limits: Sequence[tuple[float, float]]) -> int:
    """How many action values lie outside the robot's limits (low, high), to which the world model
    clips them; says so on the terminal."""
    low, high = np.asarray(limits).T
    clipped = sum(int(((e.actions < low) | (e.actions > high)).sum()) for e in episodes)
    if clipped:
        total = sum(e.actions.size for e in episodes)
        print(f"[world_model] {clipped} of {total} action values beyond their limits are clipped")
    return clipped


def _initial_params(config: Config, world: UMMWorld) -> Params:
    """BAGEL's checkpoint where the config names one, else fresh parameters."""
    key = jax.random.key(stream(config.seed, "world_model_init"))
    if not config.pretrained.world_model:
        return world.init(key)
    mesh, rules = make_mesh(config.parallel.fsdp), config.parallel.rules
    sizes, params = load_bagel(
        config.pretrained.world_model,
        world.config,
        lambda tree: parameter_sharding(tree, mesh, rules),
    )
    if sizes != world.config:
        raise StageError(
            f"{config.pretrained.world_model} holds a model of other sizes than "
            f"world_model.model: {sizes} there, {world.config} in the config"
        )
    # What a released model does not have starts fresh.
    fresh = bagel.init_adapters(world.config, world.action_dim, key)
    return {
        **params,
        "adapters": {**fresh, **params["adapters"]},
        "statistics": neutral_statistics(world.config, world.cameras, world.action_dim),
    }


def _train_vae(
    config: Config, world: UMMWorld, params: Params, episodes: list[Episode], directory: Path
) -> Params:
    frames = np.concatenate([e.images[c] for e in episodes for c in config.cameras])
    section = config.world_model.vae_training
    batch_size, seed = section.batch_size, stream(config.seed, "autoencoder_batches")

    def image_batches(first: int) -> Iterator[np.ndarray]:
        step = first
        while True:
            rng = np.random.default_rng((seed, step))
            yield frames[rng.integers(len(frames), size=batch_size)[process_rows(batch_size)]]
            step += 1

    vae = fit(
        lambda vae, frozen, images, key: world.autoencoder.loss(vae, images, key),
        params["vae"],
        {},
        image_batches,
        Training.of(section),
        Run.of(
            config,
            "image autoencoder",
            directory,
            stream(config.seed, "autoencoder"),
            checkpoint_origin(config, ["world_model"], {}),
        ),
    )
    return {**params, "vae": vae}


def train_dynamics(
    config: Config,
    world: UMMWorld,
    params: Params,
    sources: Source,
    episodes: list[Episode],
    directory: Path,
) -> Params:
    """Parameters after joint training on the transitions of `sources` and the reward labels of
    `episodes`; one whose weight in the config is 0 is left out."""
    frozen = {k: v for k, v in params.items() if k in world.frozen}
    trained = fit(
        joint_loss(config, world),
        {k: v for k, v in params.items() if k not in world.frozen},
        frozen,
        joint_batches(config, world, params, sources, episodes),
        Training.of(config.world_model.training),
        Run.of(
            config,
            "world model",
            directory,
            stream(config.seed, "dynamics"),
            checkpoint_origin(config, ["world_model"], params["statistics"]),
        ),
    )
    return {**jax.device_get(frozen), **jax.device_get(trained)}


def joint_batches(
    config: Config, world: UMMWorld, params: Params, sources: Source, episodes: list[Episode]
) -> Callable[[int], Iterator[Any]]:
    """`batches(i)` for `joint_loss`: transitions of `sources` and reward labels of `episodes`."""
    section = config.world_model
    if world.config.vae is None:
        sources = sources.map(lambda transition, *_: (transition, None))
    else:
        sources = _with_moments(world, params, sources, episodes)
    no, yes = by_label(reward_examples(episodes, observation_builder(config)))
    yes_share = section.reward_yes_fraction

    def mixed_batches(first: int):
        dynamics = batches(
            sources,
            section.dynamics_batch_size,
            stream(config.seed, "dynamics_batches"),
            start_step=first,
        )
        reward = batches(
            (no, yes),
            section.reward_batch_size,
            stream(config.seed, "reward_batches"),
            start_step=first,
            weights=(1.0 - yes_share, yes_share),
        )
        return zip(dynamics, reward)

    return mixed_batches


def joint_loss(config: Config, world: UMMWorld) -> LossFn:
    """The weighted sum of the dynamics' and the reward's loss on (Transition, RewardExample)."""
    section = config.world_model

    def loss_fn(trained, frozen, batch, key):
        (transition, moments), example = batch
        everything = {**trained, **frozen}
        loss, metrics = 0.0, {}
        if section.dynamics_weight:
            dynamics, metrics = world.dynamics_loss(everything, transition, key, moments)
            loss += section.dynamics_weight * dynamics
        if section.reward_weight:
            reward, reward_metrics = world.reward_loss(everything, example)
            loss += section.reward_weight * reward
            metrics = {**metrics, **reward_metrics}
        return loss, metrics

    return loss_fn


def _with_moments(
    world: UMMWorld, params: Params, sources: Source, episodes: list[Episode]
) -> Source:
    """Records (transition, its latents' moments now and later), each frame encoded once: the
    autoencoder is frozen, and training comes back to every frame many times."""
    encode, vae = jax.jit(world.autoencoder.moments), jax.device_put({"vae": params["vae"]})
    first = np.cumsum([0, *(len(e.timesteps) for e in episodes)])
    # One shape, hence one compilation: the last batch is filled up with earlier frames.
    parts = np.resize(np.arange(first[-1]), (-(-first[-1] // ENCODED_FRAMES), ENCODED_FRAMES))
    moments = {}
    for camera in world.cameras:
        frames = np.concatenate([e.images[camera] for e in episodes])
        encoded = [
            np.asarray(encode(vae, frames[rows]))
            for rows in tqdm(parts, desc=f"encoding {camera} frames")
        ]
        moments[camera] = np.concatenate(encoded)

    def record(transition, e, now, later):
        return transition, tuple(
            {camera: x[first[e] + frame] for camera, x in moments.items()} for frame in (now, later)
        )

    return sources.map(record)


def measure_fidelity(
    config: Config,
    world: UMMWorld,
    params: Params,
    train: list[Episode],
    episodes: list[Episode],
    directory: Path,
) -> dict:
    """Numbers of the held-out `episodes`: images per view beside copy-last-frame, what the actions
    do to them (`action_response`), reward, error against horizon.

    Writes film strips to `fidelity.npz`: `real/CAMERA` and `imagined/CAMERA`, uint8
    [strips, n + 1, H, W, 3], the first frame being the common start.
    """
    builder = observation_builder(config)
    source = transitions(episodes, builder, config.chunk)
    if not len(source):
        raise StageError(
            "no held-out transitions; raise --config.world_model.holdout_fraction or collect more"
        )
    chosen = collate([source[i] for i in spread(len(source), FIDELITY_TRANSITIONS)])
    judged = answers(world, params, episodes, builder)
    key = jax.random.key(stream(config.seed, "fidelity"))
    imagined = metrics.imagine_chunk(world, params, chosen, key)
    report = {
        "held_out_transitions": len(source),
        "fidelity": metrics.fidelity(chosen, imagined.images),
        "imagination": action_response(world, params, source, episodes, chosen, imagined)
        | {"gripper_cm": gripper_errors(train, chosen, imagined.images)},
        "reward": metrics.classification(*judged[:2])
        | {"f1_interval": metrics.f1_interval(*judged), "episodes": len(episodes)},
    }
    if world.config.proprio_dim:
        report["proprio"] = metrics.proprio_error(chosen, imagined.proprio)
    sequences = transition_sequences(episodes, builder, config.chunk, config.world_model.horizon)
    if not len(sequences):
        return report
    some = collate([sequences[i] for i in spread(len(sequences), 64)])
    observation = jax.tree.map(lambda x: x[:, 0], some.observation)
    actions, seen = jax.tree.map(lambda x: np.moveaxis(x, 0, 1), (some.actions, some.next_images))
    imagined = metrics.imagine_open_loop(world, params, observation, actions, key)
    report["horizon"] = _plain(metrics.horizon_curve(observation.images, imagined, seen))
    _save_film_strips(observation.images, imagined, seen, directory / "fidelity.npz")
    return report


def action_response(
    world: UMMWorld,
    params: Params,
    source: Source,
    episodes: list[Episode],
    chosen: Transition,
    imagined: Observation,
) -> dict:
    """Whether imagined frames follow the actions: per view "unexplained" and "response" (see
    `metrics`) of the `chosen` transitions of `source`, and "true_chunk_first": the share of
    cases in which, of the true chunk and 15 of other episodes at the nearest time steps, the true
    one gives the frames nearest to the real ones."""
    key = jax.random.key(0)
    now, truth = chosen.observation.images, chosen.next_images
    order = np.random.default_rng(0).permutation(len(chosen.actions))
    other = metrics.imagine_chunk(
        world, params, chosen.replace(actions=chosen.actions[order]), key
    ).images
    views = {
        c: {
            "unexplained": metrics.unexplained(now[c], imagined.images[c], truth[c]),
            "response": metrics.response(now[c], imagined.images[c], other[c], truth[c]),
        }
        for c in world.cameras
    }
    episode, time = (
        source.index[:, 0],
        np.array([episodes[e].timesteps[f] for e, f in source.index[:, :2]]),
    )
    cases = []
    for i in spread(len(source), RANKED_TRANSITIONS):
        elsewhere = np.flatnonzero(episode != episode[i])
        nearest = elsewhere[np.argsort(np.abs(time[elsewhere] - time[i]), kind="stable")]
        nearest = nearest[: RANKED_CHUNKS - 1]
        if len(nearest) == RANKED_CHUNKS - 1:
            real = source[i]
            cases += [real.replace(actions=source[j].actions) for j in (i, *nearest)]
    errors = np.zeros((len(cases) // RANKED_CHUNKS, RANKED_CHUNKS))
    if cases:
        ranked = collate(cases)
        frames = metrics.imagine_chunk(world, params, ranked, key).images
        for c in world.cameras:
            real = ranked.next_images[c].astype(np.float32)
            error = np.square(frames[c] - real).mean((1, 2, 3))
            change = np.square(real - ranked.observation.images[c]).mean((1, 2, 3))
            errors += (error / (change + 1)).reshape(errors.shape)
    first = metrics.rank_of_truth(errors) if cases else None
    return {"views": views, "true_chunk_first": first, "ranked": len(errors)}


def gripper_errors(train: list[Episode], chosen: Transition, imagined: Images) -> dict:
    """Median distance (cm) between the gripper's position and what `gripper_probes` read of it from
    the views a chunk later: camera -> {"real", "imagined"}."""
    position, errors = chosen.next_proprio[:, :3], {}
    for camera, read in gripper_probes(train, list(imagined)).items():
        views = {"real": chosen.next_images[camera], "imagined": imagined[camera]}
        errors[camera] = {
            name: float(100 * np.median(np.linalg.norm(read(x) - position, axis=-1)))
            for name, x in views.items()
        }
    return errors


def gripper_probes(
    episodes: list[Episode], cameras: Sequence[str]
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Camera -> the function (`metrics.fit_probe`) that reads the gripper's position (metres; the
    first three values of proprioception) from its frames, fitted to real ones."""
    places = [(e, f) for e in episodes for f in range(len(e.timesteps))]
    chosen = [places[i] for i in spread(len(places), PROBE_FRAMES)]
    position = np.stack([e.proprio[f, :3] for e, f in chosen])
    return {
        camera: metrics.fit_probe(np.stack([e.images[camera][f] for e, f in chosen]), position)
        for camera in cameras
    }


def answers(
    world: WorldModel, params: Params, episodes: list[Episode], builder: ObservationBuilder
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P(Yes), label and number of the episode of every labelled frame of the episodes."""
    examples = reward_examples(episodes, builder)
    reward = jax.jit(metrics.judge(world))
    probabilities, labels = [], []
    for first in range(0, len(examples), 128):
        rows = [examples[i] for i in range(first, min(first + 128, len(examples)))]
        batch = collate(rows + [rows[-1]] * (128 - len(rows)))
        probabilities.append(np.asarray(reward(params, batch.observation))[: len(rows)])
        labels.append(batch.label[: len(rows)])
    return np.concatenate(probabilities), np.concatenate(labels), examples.index[:, 0]


def _save_film_strips(start: Images, imagined: Images, seen: Images, path: Path) -> None:
    arrays = {}
    for camera, first in start.items():
        rows = spread(len(first), FILM_STRIPS)
        for name, frames in (("imagined", imagined[camera]), ("real", seen[camera])):
            strip = np.concatenate([first[None], frames])[:, rows]
            arrays[f"{name}/{camera}"] = np.swapaxes(strip, 0, 1)
    np.savez_compressed(path, **arrays)


def _plain(numbers):
    """The same tree with Python's numbers and lists, for JSON."""
    return jax.tree.map(lambda x: np.asarray(x).tolist(), numbers)


def spread(total: int, wanted: int) -> np.ndarray:
    """At most `wanted` indices spread evenly over range(total)."""
    return np.unique(np.linspace(0, total - 1, min(wanted, total)).round().astype(int))
