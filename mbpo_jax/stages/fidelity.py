"""Stage `fidelity`: what the world model gets right on held-out episodes, beside copying the last
frame and beside models that lack one of its parts (arXiv 2603.20607, table 1 and appendix E.2)."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from mbpo_jax.data.pipelines import Source, collate, transition_sequences, transitions
from mbpo_jax.episode import Episode
from mbpo_jax.seeds import stream
from mbpo_jax.stages.build import (
    Config,
    build_world_model,
    load_world_model,
    observation_builder,
)
from mbpo_jax.stages.finetune_world_model import (
    measured_statistics,
    train_dynamics,
    world_model_episodes,
)
from mbpo_jax.stages.measure_fidelity import (
    FIDELITY_TRANSITIONS,
    answers,
    gripper_probes,
    spread,
)
from mbpo_jax.stages.workspace import StageError, Workspace
from mbpo_jax.types import Params, Transition, WorldModel
from mbpo_jax.world_model import metrics, perceptual
from mbpo_jax.world_model.frame_by_frame import FrameByFrame
from mbpo_jax.world_model.umm_world import UMMWorld

HORIZON_SEQUENCES = 64
TIMED_CALLS = 5


@dataclass
class Contender:
    """A world model to measure; `answer_params` are those that its reward is read with."""

    world: WorldModel
    params: Params
    answer_params: Params


Strips = dict[
    str, np.ndarray
]  # camera -> uint8 [strips, n + 1, H, W, 3], a start and what followed


def study_fidelity(workspace: Workspace, directory: Path) -> tuple[dict, Strips, dict[str, Strips]]:
    """Measures the trained world model and trains and measures `config.fidelity.ablations`.

    Returns:
        the numbers, the film strips of the episodes, and those of every model.

    Raises:
        StageError: an ablation that is unknown or cannot be made of this config.
    """
    config = workspace.config
    workspace.require("world_model")
    unknown = [name for name in config.fidelity.ablations if name not in ABLATIONS]
    if unknown:
        raise StageError(f"fidelity.ablations: {unknown} not among {sorted(ABLATIONS)}")
    train, held_out = world_model_episodes(workspace)
    world, params = load_world_model(config, workspace.root)
    study = Study(config, world, params, train, held_out)
    contenders = {"UMM-World": Contender(world, params, params)}
    for name in config.fidelity.ablations:
        contenders[name.replace("_", " ")] = ABLATIONS[name](study, directory / name)
    results, strips = {}, {}
    for name, contender in contenders.items():
        print(f"[fidelity] measuring {name}", flush=True)
        results[name], strips[name] = study.measure(contender)
    return {"models": results, "real": study.real_numbers()}, study.real_strips(), strips


class Study:
    """The held-out data that every contender is measured on, and how."""

    def __init__(
        self,
        config: Config,
        world: UMMWorld,
        params: Params,
        train: list[Episode],
        held_out: list[Episode],
    ):
        self.config, self.world, self.params = config, world, params
        self.train, self.held_out = train, held_out
        self.builder = observation_builder(config)
        self.key = jax.random.key(stream(config.seed, "fidelity_study"))
        source = transitions(held_out, self.builder, config.chunk)
        sequences = transition_sequences(
            held_out, self.builder, config.chunk, config.world_model.horizon
        )
        for name, found in (("transition", source), ("run of transitions", sequences)):
            if not len(found):
                raise StageError(
                    f"the held-out episodes have no {name} of {config.chunk} steps; raise "
                    "--config.world_model.holdout_fraction or lower --config.world_model.horizon"
                )
        self.transitions = _collated(source, FIDELITY_TRANSITIONS)
        runs = _collated(sequences, HORIZON_SEQUENCES)
        self.starts = jax.tree.map(lambda x: x[:, 0], runs.observation)
        self.run_actions, self.run_images = jax.tree.map(
            lambda x: np.moveaxis(x, 0, 1), (runs.actions, runs.next_images)
        )
        self.probes = gripper_probes(train, config.cameras)

    def measure(self, contender: Contender) -> tuple[dict, Strips]:
        """All numbers of one contender, and its film strips."""
        world, params = contender.world, contender.params
        imagined = metrics.imagine_chunk(world, params, self.transitions, self.key).images
        scores = metrics.fidelity(self.transitions, imagined)
        now, truth = self.transitions.observation.images, self.transitions.next_images
        for camera, row in scores.items():
            frames = (now[camera], imagined[camera], truth[camera])
            row["lpips"] = _lpips(imagined[camera], truth[camera])
            row["motion"] = metrics.motion_by_decile(*frames)
            row["out_of_view"] = metrics.out_of_view(*frames)
        judged = answers(world, contender.answer_params, self.held_out, self.builder)
        frames = metrics.imagine_open_loop(world, params, self.starts, self.run_actions, self.key)
        numbers = {
            "views": scores,
            "disagreement_cm": self.disagreement(imagined),
            "reward": metrics.classification(*judged[:2])
            | metrics.calibration(*judged[:2])
            | {"f1_interval": metrics.f1_interval(*judged)},
            "horizon": jax.tree.map(
                lambda x: np.asarray(x).tolist(),
                metrics.horizon_curve(self.starts.images, frames, self.run_images),
            ),
            "seconds_per_chunk": self._seconds(contender),
        }
        return numbers, self._strips(frames)

    def real_numbers(self) -> dict:
        """The same of the real frames: what a perfect model would score."""
        return {"disagreement_cm": self.disagreement(self.transitions.next_images)}

    def disagreement(self, images: dict[str, np.ndarray]) -> float:
        """Cross-view consistency: mean distance (cm) between the gripper's position as
        `gripper_probes` read it from the first view and from the others."""
        first, *others = (read(images[camera]) for camera, read in self.probes.items())
        distances = [np.linalg.norm(first - other, axis=-1).mean() for other in others]
        return float(100 * np.mean(distances)) if distances else 0.0

    def real_strips(self) -> Strips:
        return self._strips(self.run_images)

    def _strips(self, frames):
        rows = spread(len(self.run_actions[0]), 3)
        return {
            camera: np.swapaxes(np.concatenate([start[None], frames[camera]])[:, rows], 0, 1)
            for camera, start in self.starts.images.items()
        }

    def _seconds(self, contender):
        """Median wall-clock time of one prediction of one chunk."""
        one = jax.tree.map(lambda x: x[:1], self.transitions)
        predict = jax.jit(metrics.predictor(contender.world))
        seconds = []
        for _ in range(TIMED_CALLS + 1):
            start = time.perf_counter()
            jax.block_until_ready(predict(contender.params, one.observation, one.actions, self.key))
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds[1:]))


def _lpips(images: np.ndarray, truth: np.ndarray) -> float | None:
    """Mean LPIPS of uint8 images [N, H, W, 3]; None where it is not installed."""
    distance = perceptual.lpips()
    if distance is None:
        return None
    parts = [
        distance(*(x[i : i + 32] / 127.5 - 1.0 for x in (images, truth)))
        for i in range(0, len(images), 32)
    ]
    return float(np.concatenate(parts).mean())


def _collated(source: Source, wanted: int) -> Transition:
    return collate([source[i] for i in spread(len(source), wanted)])


# Ablations: each trains a model that lacks one part, from fresh parameters around the same
# autoencoder, with the same steps and batches.


def _trained(study: Study, config: Config, world: UMMWorld, directory: Path) -> Params:
    params = _fresh(config, world, study.params)
    sources = transitions(study.train, study.builder, world.chunk)
    if world.chunk != study.world.chunk:
        some = _collated(sources, FIDELITY_TRANSITIONS)
        params["statistics"] = measured_statistics(
            config, world, params, some, study.train, sources
        )
    return train_dynamics(config, world, params, sources, study.train, directory)


def _fresh(config: Config, world: UMMWorld, trained: Params) -> Params:
    params = world.init(jax.random.key(stream(config.seed, "world_model_init")))
    return params | {k: trained[k] for k in ("vae", "statistics") if k in trained}


def separate_reward_params(
    config: Config, world: UMMWorld, trained: Params, train: list[Episode], directory: Path
) -> Params:
    """A model that learns the reward alone, around the autoencoder and the statistics of a
    `trained` one."""
    config = _changed(config, lambda c: c.world_model.update(dynamics_weight=0.0))
    sources = transitions(train, observation_builder(config), config.chunk)
    params = _fresh(config, world, trained)
    return train_dynamics(config, world, params, sources, train, directory)


def _changed(config: Config, change: Callable[[Config], None]) -> Config:
    changed = copy.deepcopy(config)
    with changed.unlocked():
        change(changed)
    return changed


def _independent_views(study: Study, directory: Path) -> Contender:
    """Every view from all current views and the actions, none from another generated view."""
    config = _changed(study.config, lambda c: c.world_model.model.update(interleaved=False))
    world = build_world_model(config)
    params = _trained(study, config, world, directory)
    return Contender(world, params, params)


def _frame_by_frame(study: Study, directory: Path) -> Contender:
    """Every rendered frame of the demonstrations, one after the other, instead of a chunk ahead."""
    chunk = study.config.demonstrations.render_every
    if chunk == study.config.chunk:
        raise StageError(
            "fidelity.ablations: frame_by_frame needs frames inside a chunk; set "
            "--config.demonstrations.render_every below --config.chunk"
        )
    config = _changed(study.config, lambda c: c.update(chunk=chunk))
    world = build_world_model(config)
    params = _trained(study, config, world, directory)
    return Contender(FrameByFrame(world, study.config.chunk // chunk), params, params)


def _separate_reward(study: Study, directory: Path) -> Contender:
    """Dynamics and reward each by a model of its own."""
    dynamics = _changed(study.config, lambda c: c.world_model.update(reward_weight=0.0))
    return Contender(
        study.world,
        _trained(study, dynamics, study.world, directory / "dynamics"),
        separate_reward_params(
            study.config, study.world, study.params, study.train, directory / "reward"
        ),
    )


def _without_pretraining(study: Study, directory: Path) -> Contender:
    """The same training from random parameters instead of a checkpoint's."""
    if not study.config.pretrained.world_model:
        raise StageError(
            "fidelity.ablations: without_pretraining only differs where "
            "--config.pretrained.world_model names a checkpoint"
        )
    params = _trained(study, study.config, study.world, directory)
    return Contender(study.world, params, params)


def _actions_as(kind: str) -> Callable[[Study, Path], Contender]:
    """Actions written as text, or as one embedded token per step."""

    def ablation(study: Study, directory: Path) -> Contender:
        if study.config.world_model.model.actions_as == kind:
            raise StageError(f"fidelity.ablations: the world model's actions are {kind} already")
        config = _changed(study.config, lambda c: c.world_model.model.update(actions_as=kind))
        world = build_world_model(config)
        params = _trained(study, config, world, directory)
        return Contender(world, params, params)

    return ablation


ABLATIONS: dict[str, Callable[[Study, Path], Contender]] = {
    "independent_views": _independent_views,
    "frame_by_frame": _frame_by_frame,
    "separate_reward": _separate_reward,
    "actions_as_text": _actions_as("text"),
    "actions_as_embedding": _actions_as("embedding"),
    "without_pretraining": _without_pretraining,
}
