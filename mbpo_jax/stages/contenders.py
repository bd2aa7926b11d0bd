"""What the stage `fidelity` measures of each world model, on the same held-out data."""

import time
from dataclasses import dataclass

import jax
import numpy as np

from mbpo_jax.data.pipelines import collate_some, spread, transition_sequences, transitions
from mbpo_jax.episode import Episode
from mbpo_jax.seeds import stream
from mbpo_jax.stages.build import Config, observation_builder
from mbpo_jax.stages.gripper import gripper_probes
from mbpo_jax.stages.measure_fidelity import FIDELITY_TRANSITIONS, answers
from mbpo_jax.stages.workspace import StageError
from mbpo_jax.types import Params, WorldModel
from mbpo_jax.world_model import metrics, perceptual
from mbpo_jax.world_model.umm_world import UMMWorld

HORIZON_SEQUENCES = 64
TIMED_CALLS = 5


@dataclass
class Contender:
    """A world model to measure; `answer_params` are those that its reward is read with."""

    world: WorldModel
    params: Params
    answer_params: Params


# Camera -> uint8 [strips, n + 1, H, W, 3], a start and what followed.
Strips = dict[str, np.ndarray]


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
        self.transitions = collate_some(source, FIDELITY_TRANSITIONS)
        runs = collate_some(sequences, HORIZON_SEQUENCES)
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
