"""SIGKILL at random moments of a small training and of a collection, in processes of their own."""

import multiprocessing
import random
import signal
import time
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest

from mbpo_jax.data.episodes import read_episodes
from mbpo_jax.envs.requests import EpisodeResult
from mbpo_jax.episode import Episode
from mbpo_jax.stages import collect
from mbpo_jax.training.checkpoints import load_params, save_params
from mbpo_jax.training.metrics import read_metrics
from tests.stages.test_improve_policy import optimize
from tests.training.test_loop import train

# Fresh processes that need not import the libraries again.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


def train_supervised(directory: Path) -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    save_params(directory / "result", train(directory, steps=200, checkpoint_every=5))


def train_in_imagination(directory: Path) -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    save_params(directory / "result", optimize(directory, updates=60, checkpoint_every=5))


def kill_and_finish(target, directory: Path, progress: str, unfinished: str, kills: int) -> None:
    """Runs `target(directory)`, kills it as often as asked, and lets the last run finish.

    The first kill is during a save: when a file of the pattern `unfinished` is there. The others
    are at random moments after the file or folder `progress` has changed.
    """
    moments = random.Random(0)
    path = directory / progress
    for attempt in range(kills + 1):
        seen = path.stat().st_mtime_ns if path.exists() else 0

        def due(attempt=attempt, seen=seen):
            if attempt == 0:
                return any(directory.glob(unfinished))
            return path.exists() and path.stat().st_mtime_ns > seen

        process = PROCESSES.Process(target=target, args=(directory,))
        process.start()
        if attempt < kills:
            while process.is_alive() and not due():
                time.sleep(0.001)
            time.sleep(moments.uniform(0.0, 0.2) if attempt else 0.0)
            process.kill()
        process.join()
        assert attempt > 0 or process.exitcode == -signal.SIGKILL
    assert process.exitcode == 0


@pytest.mark.parametrize("target", [train_supervised, train_in_imagination])
def test_a_training_killed_at_random_moments_equals_an_uninterrupted_one(tmp_path, target):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = PROCESSES.Process(target=target, args=(tmp_path / "whole",))
    whole.start()
    kill_and_finish(target, tmp_path / "killed", "metrics.jsonl", "checkpoints/*-tmp", kills=3)
    whole.join()
    like = {"w": np.zeros(3, np.float32)}
    if target is train_in_imagination:
        like = {
            "actor": {"mean": np.zeros((), np.float32)},
            "critic": {"w": np.zeros(2, np.float32)},
        }
    first, second = (load_params(tmp_path / d / "result", like) for d in ("whole", "killed"))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    rows, again = (read_metrics(tmp_path / d / "metrics.jsonl") for d in ("whole", "killed"))
    assert rows == again
    assert len({row["step"] for row in rows}) == len(rows)


class SlowPool:
    """Episodes without a simulator, in another order than asked, one in three a failure."""

    restarts = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def expert_episodes(self, requests):
        for request in reversed(requests):
            time.sleep(0.02)
            yield EpisodeResult(request, episode(request.seed), None, 0.0)


def episode(seed: int) -> Episode:
    chunk = np.full((2, 1, 1), seed, np.float32)
    return Episode(
        suite="libero_10",
        task_id=5,
        instruction="put it there",
        source="expert",
        seed=seed,
        init_state_id=-1,
        success=seed % 3 != 1,
        length=1,
        goal_fraction=1.0,
        timesteps=np.arange(2, dtype=np.int32),
        images={"camera": np.full((2, 4, 4, 3), seed, np.uint8)},
        proprio=np.zeros((2, 1), np.float32),
        actions=chunk,
        target_actions=chunk,
        num_actions=np.array([1, 0], np.int32),
    )


def demonstrate(directory: Path) -> None:
    demonstrations = {"episodes_per_task": 40, "render_every": 1}
    demonstrations |= {"action_noise": (0.0,), "aim_error": 0.0, "aim_offset": (0.0, 0.0)}
    config = ml_collections.ConfigDict(
        {
            **{"suite": "libero_10", "tasks": (5,), "max_steps": 10, "seed": 0},
            "demonstrations": demonstrations,
        }
    )
    collect.make_pool = lambda config: SlowPool()
    workspace = type("Workspace", (), {"config": config})
    collect.collect_demonstrations(workspace, directory)


def test_no_episode_is_lost_or_doubled_by_kills(tmp_path):
    kill_and_finish(demonstrate, tmp_path, "spool", "spool/*.tmp", kills=4)
    seeds = [e.seed for e in read_episodes(tmp_path / "dataset")]
    assert seeds == [seed for seed in range(60) if seed % 3 != 1]
