"""Every method's own logic in one tiny working directory: recorded noise instead of a simulator, a
world model that knows little, one frame instead of an evaluation."""

import contextlib
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.libero_long import get_config
from experiments.compare import imitation, online, penalties, recap, reinbot, runs
from experiments.compare.methods import METHODS, chosen
from experiments.compare.recorded import fine_tuned
from experiments.compare.runs import merged
from experiments.compare.settings import get_settings
from experiments.shared_stages import SHARED_STAGES
from mbpo_jax import pipeline
from mbpo_jax.data.episodes import read_episodes, write_episodes
from mbpo_jax.data.normalization import compute_norm_stats, write_norm_stats
from mbpo_jax.data.pipelines import collate
from mbpo_jax.envs.requests import BranchResult
from mbpo_jax.episode import Episode, action_windows, strided_timesteps
from mbpo_jax.stages import build, improve_policy
from mbpo_jax.stages.build import build_policy, observation_builder
from mbpo_jax.stages.workspace import StageError, Workspace
from mbpo_jax.training.checkpoints import load_params, save_params
from mbpo_jax.types import WorldState

STEPS = 30


def episode(config, number: int, source: str, success: bool) -> Episode:
    draw = np.random.default_rng(number)
    timesteps = strided_timesteps(STEPS, 5, 0)
    size = (len(timesteps), config.image_size, config.image_size, 3)
    windows = action_windows(
        draw.uniform(-1, 1, (STEPS, config.action_dim)), timesteps, config.chunk
    )
    return Episode(
        suite=config.suite,
        task_id=5,
        instruction="put the book into the caddy",
        source=source,
        seed=number,
        init_state_id=-1,
        success=success,
        length=STEPS,
        goal_fraction=float(success),
        timesteps=timesteps,
        images={camera: draw.integers(0, 256, size, np.uint8) for camera in config.cameras},
        proprio=draw.normal(size=(len(timesteps), 8)).astype(np.float32),
        actions=windows,
        target_actions=windows,
        num_actions=np.minimum(config.chunk, STEPS - timesteps).astype(np.int32),
    )


class DriftingWorld:
    """Views stay, proprioception grows with every chunk, and so does P(done); one parameter."""

    def init(self, key):
        return {"rate": jnp.full((), 0.3)}

    def for_inference(self, params):
        return params

    def precompute(self, params, observation, key):
        return None

    def encode(self, params, observation, key, precomputed=None):
        return WorldState(observation, jnp.zeros(len(observation.proprio)))

    def step(self, params, state, actions, key):
        seen = state.observation
        moved = seen.replace(proprio=seen.proprio + actions.mean((1, 2))[:, None])
        return WorldState(moved, state.memory + params["rate"])

    def success_probability(self, params, state):
        return state.memory  # 0.3 after the first chunk, 0.6 after the second


@contextlib.contextmanager
def still_simulator(config):
    """A pool in which nothing moves and nothing succeeds."""

    class Pool:
        def branches(self, requests):
            for request in requests:
                size = (len(request.chunks), config.image_size, config.image_size, 3)
                yield (
                    request,
                    BranchResult(
                        {camera: np.zeros(size, np.uint8) for camera in config.cameras},
                        np.zeros((len(request.chunks), 8), np.float32),
                        np.zeros(len(request.chunks), bool),
                        [0] * len(request.chunks),
                        0,
                    ),
                )

    yield Pool()


@pytest.fixture(scope="module")
def config():
    settings = get_settings()
    settings.dynamics.update({"members": 2, "width": 8, "steps": 4})
    settings.idql.update({"width": 8, "steps": 4})
    settings.recap.value_steps = 4
    settings.reinbot.update({"width": 8, "expected_steps": 4})
    settings.best_of.chunks_to_choose_from = 2
    return merged(get_config("tiny"), settings)


@pytest.fixture(scope="module")
def root(config, tmp_path_factory):
    """A comparison whose shared stages are finished."""
    root = tmp_path_factory.mktemp("compare")
    workspace = Workspace(root / "seed0", config)
    made = {
        "demonstrations": [episode(config, i, "expert", True) for i in range(2)],
        "rollouts": [episode(config, 50 + i, "sft", i == 0) for i in range(2)],
    }
    actions = np.concatenate([e.actions for episodes in made.values() for e in episodes])
    proprio = np.concatenate([e.proprio for episodes in made.values() for e in episodes])
    stats = {"actions": compute_norm_stats(actions), "state": compute_norm_stats(proprio)}
    policy = build_policy(config, stats)
    params = jax.jit(policy.init)(jax.random.key(0))
    for stage in SHARED_STAGES:
        directory = workspace.begin(stage, pipeline._sections_up_to(config, stage))
        if stage in made:
            write_episodes(directory / "dataset", made[stage])
        workspace.finish(stage, {"minutes": 1.0})
    write_norm_stats(workspace.directory("sft") / "norm_stats.json", stats)
    save_params(workspace.directory("sft") / "policy", params)
    world = DriftingWorld().init(None)
    save_params(workspace.directory("world_model") / "world_model", world)
    save_params(workspace.directory("value") / "critic", params["critic"])
    return root


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    for module in (build, improve_policy, imitation):
        monkeypatch.setattr(module, "build_world_model", lambda config: DriftingWorld())
    monkeypatch.setattr(online, "make_pool", still_simulator)
    monkeypatch.setattr(runs, "evaluate", act_once)


def act_once(name, workspace, directory):
    """Instead of an evaluation: the method acts on one frame, and succeeds in it."""
    act, params = METHODS[name].actor(workspace)
    (first, *_) = read_episodes(workspace.directory("demonstrations") / "dataset")
    seen = collate([observation_builder(workspace.config).at(first, 0)])
    actions = np.asarray(jax.jit(act)(params, seen, jax.random.key(0)))
    assert actions.shape == (1, workspace.config.chunk, workspace.config.action_dim)
    assert np.isfinite(actions).all()
    record = {"task": 5, "init_state": -1, "seed": 0, "success": True, "length": 20}
    (directory / f"episodes_{name}.jsonl").write_text(json.dumps(record) + "\n")
    return {}


def trained(config, root, name):
    """The summary of the method's training, and how far the actor's parameters are from SFT's."""
    workspace = runs.run_method(config, root, name, METHODS[name])
    assert workspace.summary("evaluate") is not None
    _, before = fine_tuned(workspace)
    path = workspace.directory("improve") / "policy"
    moved = 0.0
    if path.exists():
        after = load_params(path, before)
        pairs = zip(jax.tree.leaves(before["actor"]), jax.tree.leaves(after["actor"]))
        moved = max(float(np.abs(np.asarray(a) - b).max()) for a, b in pairs)
    return workspace.summary("improve"), moved


def test_rollouts_that_succeeded_are_imitated(config, root):
    summary, moved = trained(config, root, "bc_on_rollouts")
    assert summary["successful_rollouts"] == 1
    assert summary["frames"] == 3 * len(strided_timesteps(STEPS, 5, 0)[:-1])
    assert 0 < moved < 0.1


def test_imagined_successes_are_imitated_and_kept(config, root, monkeypatch):
    stopped = root / "seed0_bc_in_world_model"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(imitation, "continue_sft", stop)
        with pytest.raises(KeyboardInterrupt):
            runs.run_method(config, root, "bc_in_world_model", METHODS["bc_in_world_model"])
    parts = sorted((stopped / "improve/imagined").glob("*.npz"))
    made = [path.stat().st_mtime_ns for path in parts]
    assert len(parts) == 4  # 2 refills of 4 branches, 2 at a time
    summary, moved = trained(config, root, "bc_in_world_model")
    # Every branch succeeds with its second chunk (0.6 > 0.5), so both chunks are learnt from.
    assert (summary["imagined_chunks"], summary["chunks_to_success"]) == (16, 16)
    assert [path.stat().st_mtime_ns for path in parts] == made
    assert 0 < moved < 0.1


def test_the_best_of_imagined_chunks_are_learnt(config, root):
    summary, moved = trained(config, root, "ranked")
    assert summary["imagined_chunks"] == 4 * 2  # states, chunks in a group
    assert summary["kept_score"] >= summary["score"]
    assert moved > 0


def test_a_penalty_changes_what_is_learnt(config, root, monkeypatch):
    # The value has not been fitted, so the deviation of values is 0: a constant instead.
    seen = []

    def penalty(values, discount):
        seen.append(values.shape)
        return jnp.full(values.shape[1:], 0.5)

    monkeypatch.setattr(penalties, "mobile_penalty", penalty)
    _, moved = trained(config, root, "mobile")
    assert seen[0] == (2, 1)  # members, one observation at a time
    assert moved > 0


def test_values_that_were_not_fitted_cannot_be_compared(config, root):
    own = METHODS["mobile"].config(config).copy_and_resolve_references()
    own.value.steps = 0
    with pytest.raises(StageError, match=r"value\.steps"):
        penalties.mobile(Workspace(root / "seed0_mobile", own), root)


def test_online_episodes_are_counted(config, root):
    summary, _ = trained(config, root, "online_ppo")
    assert summary["episodes"] == 2  # as many as rollouts
    assert summary["success_by_refill"] == [0.0, 0.0]


def test_q_is_learnt_from_all_recorded_chunks(config, root):
    summary, moved = trained(config, root, "idql")
    assert summary["chunks"] == 3 * 10 + 5  # a chunk that a failure's end cuts off is none
    assert moved == 0.0


def test_labels_are_learnt(config, root):
    summary, moved = trained(config, root, "recap")
    assert summary == summary | {"chunks": 35, "rollout_chunks_labelled_good": 5}  # 5 of 15
    assert 0 < moved < 0.1
    assert recap.conditioned(config).policy.advantage_conditioned
    assert not config.policy.advantage_conditioned


def test_returns_are_learnt_and_asked_for(config, root):
    summary, moved = trained(config, root, "reinbot")
    assert summary["chunks"] == 4 * 10  # also the one that a failure's end cuts off
    assert 0 < moved < 0.1
    workspace = Workspace(root / "seed0_reinbot", METHODS["reinbot"].config(config))
    act, params = reinbot.actor(workspace)
    policy, _ = fine_tuned(workspace)
    seen = collate([build.observation_builder(config).at(episode(config, 7, "sft", True), 0)])
    layers = params["expected"]["layers"]
    chunks = []
    for rank in (0.0, 1.0):  # the prediction is what the policy is asked for
        layers[-1] = {"kernel": 0 * layers[-1]["kernel"], "bias": 0 * layers[-1]["bias"] + rank}
        chunks.append(act(params, seen, jax.random.key(0)))
    assert chunks[0].shape == (1, policy.config.chunk, policy.env_action_dim)
    assert not np.allclose(*chunks)


def test_what_is_finished_is_not_run_again(config, root, capsys):
    methods = chosen(["best_of_n"])
    written = []
    runs.run(config, root, methods, [0], lambda: written.append(1))
    assert written == [1]
    before = (root / "seed0_best_of_n/evaluate/done.json").stat().st_mtime_ns
    capsys.readouterr()
    runs.run(config, root, methods, [0])
    assert capsys.readouterr().out.count("finished before") == len(SHARED_STAGES) + 2
    assert (root / "seed0_best_of_n/evaluate/done.json").stat().st_mtime_ns == before
    link = root / "seed0_best_of_n/sft"
    assert link.is_symlink()
    assert link.resolve() == (root / "seed0/sft").resolve()


def test_other_settings_are_refused_where_they_matter(config, root):
    runs.run_method(config, root, "best_of_n", METHODS["best_of_n"])
    other = config.copy_and_resolve_references().unlock()
    other.compare.best_of.chunks_to_choose_from = 3
    with pytest.raises(StageError, match="chunks_to_choose_from"):
        runs.run_method(other, root, "best_of_n", METHODS["best_of_n"])
    runs.run_method(other, root, "sft", METHODS["sft"])


def test_without_noise_the_key_does_not_matter(config, root):
    runs.run_method(config, root, "noiseless", METHODS["noiseless"])
    seen = collate([build.observation_builder(config).at(episode(config, 7, "sft", True), 0)])
    trained = runs.train(config, root, "ranked_noiseless", METHODS["ranked_noiseless"])
    for name, same in (("noiseless", True), ("sft", False), ("ranked_noiseless", True)):
        act, params = METHODS[name].actor(trained)
        one, other = (act(params, seen, jax.random.key(seed)) for seed in (0, 1))
        assert np.array_equal(one, other) == same


def test_a_method_acts_on_what_another_trained(config, root):
    workspace = runs.train(config, root, "ranked_noiseless", METHODS["ranked_noiseless"])
    other = root / "seed0_ranked/improve"
    assert workspace.directory("improve").resolve() == other.resolve()
    finished = (other / "done.json").stat().st_mtime_ns
    runs.run_method(config, root, "ranked", METHODS["ranked"])
    assert (other / "done.json").stat().st_mtime_ns == finished
    assert workspace.summary("improve")["updates"] == config.rl.ranked.steps
    chosen_from = runs.train(config, root, "ranked_best_of_n", METHODS["ranked_best_of_n"])
    assert chosen_from.directory("improve").resolve() == other.resolve()
    (_, choosing), (_, improved), (_, start) = (
        METHODS[name].actor(chosen_from) for name in ("ranked_best_of_n", "ranked", "best_of_n")
    )
    chex.assert_trees_all_equal(choosing["policy"]["actor"], improved["actor"])
    chex.assert_trees_all_equal(choosing["value"], start["value"])  # the start's features
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(choosing["policy"]["actor"], start["policy"]["actor"])
