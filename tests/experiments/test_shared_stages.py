"""Several optimisations of one fine-tuned policy: what they share, and what no robot without a
simulator can do."""

import json

import pytest

from configs import arx_x5
from configs.libero_long import get_config
from experiments import branch_length, shared_stages, stability
from mbpo_jax import pipeline


def test_variants_share_the_early_stages_and_the_fine_tuned_policys_episodes(tmp_path, monkeypatch):
    ran = []

    class Done:
        def __init__(self, config, directory):
            self.config, self.directory = config, directory

        def summary(self, stage):
            return {"stage": stage, "of": self.directory.name}

    def run(config, directory, stages):
        directory.mkdir(exist_ok=True)
        episodes = directory / "evaluate" / "episodes_sft.jsonl"
        ran.append((directory.name, stages, config.evaluation.best_of, episodes.exists()))
        for stage in stages:
            (directory / stage).mkdir(exist_ok=True)
        if "evaluate" in stages:
            episodes.write_text(json.dumps({"run": directory.name}))
            (directory / "evaluate" / "done.json").write_text("{}")
        return Done(config, directory)

    monkeypatch.setattr(pipeline, "run", run)
    config = get_config("micro")
    base = tmp_path / "seed0"
    world_model, evaluations = shared_stages.optimize_each(base, config, {"a": config, "b": config})
    assert world_model == {"stage": "world_model", "of": "seed0"}
    assert {name: e["of"] for name, e in evaluations.items()} == {"a": "seed0_a", "b": "seed0_b"}
    assert ran == [
        ("seed0", shared_stages.SHARED_STAGES, 16, False),
        ("seed0_a", ("improve", "evaluate"), 1, False),
        ("seed0_b", ("improve", "evaluate"), 1, True),
    ]
    for stage in shared_stages.SHARED_STAGES:
        assert (tmp_path / "seed0_b" / stage).resolve() == base / stage
    assert config.evaluation.best_of == 16


def test_a_robot_without_a_simulator_is_one_message(tmp_path, capsys):
    config = arx_x5.get_config("tiny")
    with pytest.raises(ValueError, match="simulator"):
        branch_length.run(config, tmp_path / "x", ["1"], [0])
    with pytest.raises(SystemExit) as stop:
        stability.measure(config, tmp_path / "x", ["0"], [])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "x").exists()
