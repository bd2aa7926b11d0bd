"""A robot without a simulator: from recorded episodes to a report that claims nothing more."""

import json

import numpy as np
import pytest

from configs import arx_x5
from mbpo_jax import pipeline
from mbpo_jax.data.episodes import write_episodes
from mbpo_jax.stages.workspace import StageError
from tests.test_embodiment import make_episode

SIZE = 32


def tiny_config(tmp_path):
    config = arx_x5.get_config("tiny")
    config.image_size = config.policy.vision.image_size = SIZE
    config.world_model.model.update({"vae_image_size": SIZE, "vit_image_size": SIZE})
    # One program fewer each: the critic's fit, the anchor, new values between refills.
    config.value.steps = 0
    config.rl.update({"anchor_weight": 0.0, "updates": 2, "value_recompute_every": 2})
    config.rl.flow.steps = config.policy.eval_steps = 2
    config.demonstrations.dataset = str(tmp_path / "teleoperation")
    config.rollouts.dataset = str(tmp_path / "runs_of_the_policy")
    return config


def recording(seed, success):
    """30 steps of noise of the right shape and range."""
    rng = np.random.default_rng(seed)
    low, high = np.array(arx_x5.ROBOT.action_limits, np.float32).T
    timesteps = np.array([0, 10, 20, 26, 27, 28, 29, 30], np.int32)
    frames = len(timesteps)
    actions = rng.uniform(low, high, (frames, 10, 14)).astype(np.float32)
    images = {
        camera: rng.integers(0, 256, (frames, SIZE, SIZE, 3)).astype(np.uint8)
        for camera in arx_x5.ROBOT.cameras
    }
    return make_episode(
        arx_x5.ROBOT,
        success=success,
        length=30,
        timesteps=timesteps,
        images=images,
        proprio=rng.uniform(-1, 1, (frames, 14)).astype(np.float32),
        actions=actions,
        target_actions=actions,
        num_actions=np.minimum(10, 30 - timesteps),
    )


@pytest.fixture
def recordings(tmp_path):
    write_episodes(tmp_path / "teleoperation", [recording(i, True) for i in range(2)])
    write_episodes(tmp_path / "runs_of_the_policy", [recording(i, i % 2 == 0) for i in range(2, 6)])


def test_from_recordings_to_an_honest_report(tmp_path, recordings, capsys, monkeypatch):
    monkeypatch.setattr("mbpo_jax.stages.imagined_success.START_STATES", 4)
    workdir = tmp_path / "run"
    pipeline.run(tiny_config(tmp_path), workdir)
    assert "Success on the robot was not measured" in capsys.readouterr().out
    stages = json.loads((workdir / "results.json").read_text())["stages"]
    assert list(stages) == list(pipeline.ROBOT_STAGES)
    assert list(stages["world_model"]["fidelity"]) == ["head", "left_wrist", "right_wrist"]
    assert stages["world_model"]["held_out_episodes"] == stages["imagine"]["held_out_episodes"] == 3
    assert stages["imagine"]["policies"]["improved"]["episodes"] == 4
    page = (workdir / "report.html").read_text()
    assert "Success in imagination, not on the robot" in page
    for camera in arx_x5.ROBOT.cameras:
        assert f"held-out episodes, {camera}: open loop" in page


def test_missing_recordings_say_what_to_record(tmp_path):
    config = arx_x5.get_config()
    with pytest.raises(StageError, match=r"--config\.demonstrations\.dataset=DIR"):
        pipeline.run(config, tmp_path / "run", ["demonstrations"])
    config.demonstrations.dataset = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no dataset at"):
        pipeline.run(config, tmp_path / "run", ["demonstrations"])


def test_recordings_of_another_robot_are_listed(tmp_path):
    bad = recording(1, False)
    bad.actions = bad.actions * 100
    write_episodes(tmp_path / "teleoperation", [recording(0, True), bad])
    with pytest.raises(StageError) as error:
        pipeline.run(tiny_config(tmp_path), tmp_path / "run", ["demonstrations"])
    message = str(error.value)
    assert "episode 0" not in message
    assert "episode 1: left_joint_1 goes from" in message
    assert "episode 1: a failure, which supervised fine-tuning would imitate" in message
    assert not (tmp_path / "run" / "demonstrations" / "dataset").exists()


def test_instructions_above_the_budgets_are_refused_at_once(tmp_path):
    config = tiny_config(tmp_path)
    long = recording(0, True)
    long.instruction = "fold the zyxwv over the qponm" * 9
    write_episodes(tmp_path / "teleoperation", [recording(1, True), long])
    with pytest.raises(StageError, match=r"episode 1: .*--config\.policy\.max_prompt_tokens"):
        pipeline.run(config, tmp_path / "run", ["demonstrations"])
