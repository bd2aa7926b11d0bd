"""A config with an entry that no run can use is refused before anything is written."""

import math

import pytest

from configs import arx_x5, bimanual, libero_long
from mbpo_jax import pipeline
from mbpo_jax.stages.limits import check_config

WRONG = {
    "seed": (-1, 10**9),
    "image_size": (0, -64, 60, 10**9),
    "workers": (0,),
    "chunk": (0, 7),
    "max_steps": (0, 5),
    "tasks": ((), ("a",), (-1,), (5, 5)),
    "cameras": ((), ("top",), ("agentview", "agentview")),
    "checkpoints.keep": (0,),
    "demonstrations.render_every": (0, 3),
    "demonstrations.episodes_per_task": (0, 50_000),
    "demonstrations.action_noise": ((0.1, -0.1), (math.nan,)),
    "demonstrations.aim_error": (-0.01, math.nan),
    "demonstrations.aim_offset": ((0.01,), (math.nan, 0.0)),
    "sft.batch_size": (0, -3, 10**12),
    "sft.learning_rate": (-1.0, math.inf, math.nan),
    "sft.grad_clip": (0.0,),
    "sft.ema_decay": (1.0,),
    "policy.vision.patch_size": (0, 15),
    "policy.normalization": ("none",),
    "world_model.holdout_fraction": (-0.1, 0.0, 1.0, 1.5),
    "world_model.horizon": (0,),
    "world_model.reward_yes_fraction": (1.5,),
    "world_model.model.vit_image_size": (60,),
    "rl.discount": (-0.1, 1.0, math.nan),
    "rl.gae_lambda": (1.1,),
    "rl.reward_threshold": (1.0,),
    "rl.start_states": (3,),
    "rl.dual_clip": (0.5,),
    "rl.world": ("real",),
    "rl.discount_per": ("day",),
    "rl.flow.steps": (1,),
    "rl.updates": (0,),
    "rl.method": ("dqn",),
    "rl.ranked.kept": (0,),
    "evaluation.best_of": (0,),
    "evaluation.checkpoint": ("first",),
    "robot.control_hz": (-1.0,),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_entry_is_named(name):
    for value in WRONG[name]:
        config = libero_long.get_config("tiny")
        *sections, entry = name.split(".")
        section = config
        for key in sections:
            section = section[key]
        section[entry] = value
        with pytest.raises(ValueError, match="config") as error:
            check_config(config)
        assert entry in str(error.value)


def test_what_ranking_cannot_do_is_refused():
    config = libero_long.get_config("tiny")
    config.evaluation.checkpoint = "best"
    config.rl.ranked.kept = config.rl.group_size
    with pytest.raises(ValueError, match=r"rl\.ranked\.kept is 2: fewer than the 2") as error:
        check_config(config)
    assert "evaluation.checkpoint is 'best'" in str(error.value)
    config.rl.method = "ppo"
    check_config(config)


def test_an_evaluation_of_nothing_is_refused():
    config = libero_long.get_config("tiny")
    config.evaluation.update({"episodes_per_task": 0, "resets_per_task": 0})
    with pytest.raises(ValueError, match=r"evaluation\.episodes_per_task and .* are 0"):
        check_config(config)


@pytest.mark.parametrize("module", [libero_long, bimanual, arx_x5])
def test_every_variant_can_be_used(module):
    for variant in libero_long.VARIANTS:
        check_config(module.get_config(variant))


def test_all_wrong_entries_are_listed_before_anything_is_written(tmp_path):
    config = libero_long.get_config("tiny")
    config.rl.discount, config.sft.batch_size = 1.5, 0
    with pytest.raises(ValueError, match="config") as error:
        pipeline.run(config, tmp_path / "run")
    assert "sft.batch_size is 0" in str(error.value)
    assert "rl.discount is 1.5" in str(error.value)
    assert not (tmp_path / "run").exists()
