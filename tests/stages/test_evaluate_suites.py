"""Which episodes are run, kept and compared; a pool without a simulator runs them."""

import json

import ml_collections
import numpy as np
import pytest

from mbpo_jax import seeds
from mbpo_jax.envs.requests import EpisodeResult
from mbpo_jax.envs.sim.simulator import TaskInfo
from mbpo_jax.episode import Episode
from mbpo_jax.stages import evaluate, evaluate_suites
from mbpo_jax.stages.statistics import newcombe_interval, wilson_interval
from mbpo_jax.stages.workspace import StageError

TASKS = {
    "libero_10": [("A_cup", "cup"), ("B_pan", "pan"), ("C_pot", "pot")],
    "libero_10_swap": [("A_cup", "cup"), ("B_pan", "pan"), ("C_pot", "pot")],
    "/files/libero_10_table": [("C_pot_table_1", "pot, please"), ("x", "PAN"), ("y", "spoon")],
}


class FakePool:
    """An episode of task t from init state i succeeds if i > t, in the perturbed suites if i > 2 t.
    After as many episodes as the last of `limits` says the policy is gone."""

    limits: tuple | list = ()

    def __init__(self, config, requested, fails_after=10**6):
        self._config, self._requested, self._left = config, requested, fails_after

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def policy_episodes(self, requests, act, source):
        assert act == ("acts on", self._config.suite)
        for request in reversed(requests):
            if self._left == 0:
                raise ConnectionError("the server has gone")
            self._left -= 1
            self._requested.append(request)
            hard = 1 if self._config.suite == "libero_10" else 2
            success = max(request.init_state_id, 0) > hard * request.task_id
            views = {camera: np.zeros((2, 8, 8, 3), np.uint8) for camera in self._config.cameras}
            yield EpisodeResult(
                request,
                _episode(self._config, request, success),
                views if request.video_size else None,
                1.5,
                first_success=7,
            )


def _episode(config, request, success):
    nothing = np.zeros((0, 1, 7), np.float32)
    return Episode(
        config.suite,
        request.task_id,
        "do it",
        "policy",
        request.seed,
        request.init_state_id,
        success,
        10 + request.task_id,
        1.0,
        np.zeros(0, np.int32),
        {},
        np.zeros((0, 8), np.float32),
        nothing,
        nothing,
        np.zeros(0, np.int32),
    )


@pytest.fixture
def requested(monkeypatch):
    def info(suite, task):
        return TaskInfo(*TASKS[suite][task], num_init_states=6)

    def pool(config):
        return FakePool(config, requested, limits.pop() if limits else 10**6)

    requested, limits = [], []
    monkeypatch.setattr(evaluate, "task_info", info)
    monkeypatch.setattr(evaluate_suites.suites, "task_info", info)
    monkeypatch.setattr(evaluate_suites.suites, "num_tasks", lambda suite: len(TASKS[suite]))
    monkeypatch.setattr(evaluate_suites, "make_pool", pool)
    monkeypatch.setattr(FakePool, "limits", limits)
    return requested


def run(root, wanted, against=None, episodes=4, resets=0, **changes):
    settings = {
        "policy": "mine",
        "cameras": ("head", "wrist"),
        "image_size": 8,
        "chunk": 5,
        "max_steps": 0,
        "until_end": False,
        "videos": 0,
        "seed": 0,
        "robot": {"control_hz": 20.0},
        "workers": 2,
        "worker_backend": "local",
        "evaluation": {"episodes_per_task": episodes, "resets_per_task": resets},
    }
    config = ml_collections.ConfigDict({**settings, **changes})
    return evaluate_suites.evaluate_suites(
        root, config, wanted, lambda suite, tasks: ("acts on", suite), against
    )


def test_every_episode_is_run_and_told(tmp_path, requested):
    results = run(tmp_path, {"libero_10": [0, 2]})
    suite = results["suites"]["libero_10"]
    starts = [(t, i) for t in (0, 2) for i in range(4)]
    assert [(e["task"], e["init_state"]) for e in suite["episodes"]] == starts
    assert {(r.max_steps, r.render_every, r.until_end) for r in requested} == {(520, 5, False)}
    summary = suite["summary"]
    assert (summary["successes"], summary["episodes"]) == (3 + 1, 8)
    assert summary["interval"] == list(wilson_interval(4, 8))
    assert summary["tasks"]["2"]["interval"] == list(wilson_interval(1, 4))
    assert summary["tasks"]["2"]["instruction"] == "pot"
    assert summary["mean_length"] == 11
    assert "drop" not in suite
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))


def test_random_resets_are_those_of_no_other_stage(tmp_path, requested):
    run(tmp_path, {"libero_10": [1]}, episodes=0, resets=3)
    wanted = {seeds.reset(0, "evaluation", i) for i in range(3)}
    assert {(r.seed, r.init_state_id) for r in requested} == {(seed, -1) for seed in wanted}


def test_a_stopped_evaluation_goes_on_and_repeats_nothing(tmp_path, requested):
    FakePool.limits.append(3)
    with pytest.raises(ConnectionError):
        run(tmp_path, {"libero_10": [0, 1]})
    assert len(requested) == 3
    with (tmp_path / "libero_10/episodes.jsonl").open("a") as file:
        file.write('{"task": 0, "ini')  # killed in the middle of a line
    results = run(tmp_path, {"libero_10": [0, 1]})
    assert len(requested) == 8 == len(set(requested))
    undisturbed = run(tmp_path.with_name("undisturbed"), {"libero_10": [0, 1]})
    assert results == undisturbed
    requested.clear()
    run(tmp_path, {"libero_10": [0, 1, 2]}, episodes=5)
    assert len(requested) == 2 * 1 + 5


def test_other_settings_are_refused(tmp_path, requested):
    run(tmp_path, {"libero_10": [0]})
    with pytest.raises(StageError, match="until_end"):
        run(tmp_path, {"libero_10": [0]}, until_end=True)
    with pytest.raises(StageError, match="max_steps"):
        run(tmp_path, {"libero_10": [0]}, max_steps=100)


def test_until_the_end_both_numbers_are_told(tmp_path, requested):
    summary = run(tmp_path, {"libero_10": [2]}, until_end=True)["suites"]["libero_10"]["summary"]
    assert (summary["successes"], summary["reached"]) == (1, 4)
    assert all(r.until_end for r in requested)


def test_the_drop_has_an_interval(tmp_path, requested):
    results = run(tmp_path, {"libero_10_swap": [1, 2]}, against="libero_10")
    assert sorted(results["suites"]) == ["libero_10", "libero_10_swap"]
    drop = results["suites"]["libero_10_swap"]["drop"]
    assert drop["against"] == "libero_10"
    assert drop["drop"] == (2 + 1) / 8 - (1 + 0) / 8
    assert drop["interval"] == list(newcombe_interval((3, 8), (1, 8)))
    both = run(tmp_path, {"libero_10_swap": [1, 2], "libero_10": [1, 2]})
    assert both["suites"]["libero_10_swap"]["drop"] == drop  # without being asked for


def test_tasks_are_matched_by_name_or_words(tmp_path, requested):
    folder = "/files/libero_10_table"
    results = run(tmp_path, {folder: [0, 1]}, against="libero_10")
    assert {e["task"] for e in results["suites"]["libero_10"]["episodes"]} == {1, 2}
    assert results["suites"]["libero_10_table"]["drop"]["episodes"] == 8
    with pytest.raises(ValueError, match=r"task 2 of libero_10_table \(y\) is no perturbation"):
        run(tmp_path, {folder: [2]}, against="libero_10")
    found = run(tmp_path, {folder: [2], "libero_10": [1]})["suites"]
    assert "drop" not in found["libero_10_table"]


def test_videos_on_request_even_afterwards(tmp_path, requested):
    before = run(tmp_path, {"libero_10": [0, 1]})
    requested.clear()
    after = run(tmp_path, {"libero_10": [0, 1]}, videos=1)
    assert [(r.task_id, r.init_state_id) for r in requested] == [(1, 0), (0, 0)]
    names = sorted(path.name for path in (tmp_path / "libero_10").glob("*.gif"))
    assert names == ["task000_init000.gif", "task001_init000.gif"]
    assert after["suites"] == before["suites"]
    requested.clear()
    run(tmp_path, {"libero_10": [0, 1]}, videos=1)
    assert requested == []


def test_too_few_init_states_are_told_before_anything_runs(tmp_path, requested):
    with pytest.raises(StageError, match=r"7 episodes .* task 0 of libero_10 has 6"):
        run(tmp_path, {"libero_10": [0]}, episodes=7)
    assert requested == []
