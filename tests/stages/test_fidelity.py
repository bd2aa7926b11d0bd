"""The fidelity study on a workspace of synthetic episodes and an untrained world model."""

import json

import jax
import numpy as np
import pytest

from mbpo_jax.data.episodes import write_episodes
from mbpo_jax.episode import Episode
from mbpo_jax.reporting.fidelity_report import report_fidelity
from mbpo_jax.stages.build import build_world_model
from mbpo_jax.stages.workspace import StageError, Workspace
from mbpo_jax.training.checkpoints import save_params
from tests.test_pipeline import tiny_config

LENGTH, EVERY = 40, 5
TIMESTEPS = np.union1d(np.arange(0, LENGTH + 1, EVERY), np.arange(LENGTH - 4, LENGTH + 1))
NUM_FRAMES = len(TIMESTEPS)


def episode(seed: int, success: bool, cameras) -> Episode:
    rng = np.random.default_rng(seed)
    timesteps, count = TIMESTEPS, NUM_FRAMES
    actions = rng.uniform(-1, 1, (count, 10, 7)).astype(np.float32)
    return Episode(
        suite="libero_10",
        task_id=5,
        instruction="put it there",
        source="expert",
        seed=seed,
        init_state_id=-1,
        success=success,
        length=LENGTH,
        goal_fraction=float(success),
        timesteps=timesteps.astype(np.int32),
        images={c: rng.integers(0, 256, (count, 64, 64, 3)).astype(np.uint8) for c in cameras},
        proprio=rng.normal(size=(count, 8)).astype(np.float32),
        actions=actions,
        target_actions=actions,
        num_actions=np.minimum(10, LENGTH - timesteps).astype(np.int32),
    )


def workspace(directory, **fidelity) -> Workspace:
    config = tiny_config()
    config.fidelity.update(fidelity)
    made = Workspace(directory, config)
    for stage, success in (("demonstrations", True), ("rollouts", False)):
        folder = made.begin(stage, ["seed"])
        episodes = [episode(i + 10 * success, success, config.cameras) for i in range(2)]
        write_episodes(folder / "dataset", episodes)
        made.finish(stage, {})
    world = build_world_model(config)
    save_params(made.begin("world_model", ["seed"]) / "world_model", world.init(jax.random.key(0)))
    made.finish("world_model", {})
    return made


def test_the_study_measures_every_model(tmp_path, capsys):
    made = workspace(tmp_path, ablations=("frame_by_frame",))
    directory = made.begin("fidelity", ["fidelity"])
    summary = report_fidelity(made, directory)

    assert list(summary["models"]) == ["UMM-World", "frame by frame"]
    json.dumps(summary)
    untrained = summary["models"]["UMM-World"]
    for camera in made.config.cameras:
        view = untrained["views"][camera]
        # An untrained model nearly copies: it is nearly the baseline, with nearly no motion.
        assert abs(view["psnr"] - view["copy_psnr"]) < 0.5
        assert max(view["motion"]["imagined"]) < 4.0
        assert min(view["motion"]["real"]) > 0.0
        assert len(untrained["horizon"][camera]["psnr"]) == made.config.world_model.horizon
    assert untrained["disagreement_cm"] > 0
    assert (directory / "frame_by_frame/metrics.jsonl").exists()
    assert untrained["reward"]["frames"] == sum(untrained["reward"]["bin_count"])
    page = (directory / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 + 2 * len(made.config.cameras)
    assert "frame by frame" in capsys.readouterr().out


def test_an_unknown_ablation_is_named(tmp_path):
    made = workspace(tmp_path, ablations=("no_arms",))
    with pytest.raises(StageError, match=r"no_arms.*frame_by_frame"):
        report_fidelity(made, tmp_path)
