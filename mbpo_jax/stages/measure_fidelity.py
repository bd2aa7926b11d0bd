"""What the trained world model gets right on held-out episodes."""

from pathlib import Path

import jax
import numpy as np

from mbpo_jax.data.pipelines import (
    ObservationBuilder,
    Source,
    collate,
    collate_some,
    equal_parts,
    reward_examples,
    spread,
    transition_sequences,
    transitions,
)
from mbpo_jax.episode import Episode
from mbpo_jax.seeds import stream
from mbpo_jax.stages.build import Config, observation_builder
from mbpo_jax.stages.gripper import Images, gripper_errors
from mbpo_jax.stages.workspace import StageError
from mbpo_jax.types import Observation, Params, Transition, WorldModel
from mbpo_jax.world_model import metrics
from mbpo_jax.world_model.umm_world import UMMWorld

FIDELITY_TRANSITIONS = 512
FILM_STRIPS = 3
RANKED_TRANSITIONS, RANKED_CHUNKS = 60, 16


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
    chosen = collate_some(source, FIDELITY_TRANSITIONS)
    judged = answers(world, params, episodes, builder)
    key = jax.random.key(stream(config.seed, "fidelity"))
    imagined = metrics.imagine_chunk(world, params, chosen, key)
    report = {
        "held_out_transitions": len(source),
        "fidelity": metrics.fidelity(chosen, imagined.images),
        "imagination": action_response(world, params, source, episodes, chosen, imagined)
        | {"gripper_cm": gripper_errors(world, params, train, builder, chosen, imagined.images)},
        "reward": metrics.classification(*judged[:2])
        | {"f1_interval": metrics.f1_interval(*judged), "episodes": len(episodes)},
    }
    if world.config.proprio_dim:
        report["proprio"] = metrics.proprio_error(chosen, imagined.proprio)
    sequences = transition_sequences(episodes, builder, config.chunk, config.world_model.horizon)
    if not len(sequences):
        return report
    some = collate_some(sequences, 64)
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


def answers(
    world: WorldModel, params: Params, episodes: list[Episode], builder: ObservationBuilder
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P(Yes), label and number of the episode of every labelled frame of the episodes."""
    examples = reward_examples(episodes, builder)
    reward = jax.jit(metrics.judge(world))
    probabilities, labels = [], []
    for rows in equal_parts(len(examples), 128):
        batch = collate([examples[i] for i in rows])
        probabilities.append(np.asarray(reward(params, batch.observation)))
        labels.append(batch.label)
    judged = (np.concatenate(x)[: len(examples)] for x in (probabilities, labels))
    return *judged, examples.index[:, 0]


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
