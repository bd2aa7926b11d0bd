"""The command `experiments.evaluate`: what it refuses, and two episodes in the simulator."""

import json

import pytest

from experiments import evaluate
from mbpo_jax.serving.server import serving_in_thread


@pytest.mark.libero
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--suite=libero_10", "--policy is missing"),
        ("--policy=p", "no suite: name one with --suite"),
        ("--policy=p --suite=libero_1", "no suite 'libero_1'; did you mean 'libero_10'"),
        ("--policy=p --suite=libero_10_swop", "did you mean 'libero_10_swap'"),
        ("--policy=p --suite=libero_10 --tasks=3,10", "tasks 0 to 9; there is no 10"),
        ("--policy=p --suite=libero_10 --tasks=a", "--tasks are numbers, such as 0,3, not a"),
        ("--policy=p --suite=libero_10 --episodes=0", "--episodes is 0: 1 or more"),
        ("--policy=p --suite=libero_10_env", "libero_10_env is incomplete"),
        ("--policy=p --suite=libero_10 --against=libero_11", "no suite 'libero_11'"),
        ("--policy=p --suite=libero_10", "p holds no policy"),
        ("--policy=ws://127.0.0.1:9 --suite=libero_10 --patience=0", "no policy server answers"),
    ],
)
def test_bad_input_is_one_message(arguments, complaint, capsys):
    pytest.importorskip("libero", reason="the simulator is not installed (extra: libero)")
    assert evaluate.main(arguments.split()) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert complaint in told
    assert "Traceback" not in told


@pytest.mark.libero
def test_a_checkpoint_and_its_server_are_evaluated_alike(checkpoint, served, tmp_path, capsys):
    pytest.importorskip("libero", reason="the simulator is not installed (extra: libero)")
    arguments = "--suite=libero_object_swap --tasks=0 --episodes=1 --max_steps=6 --workers=1"

    def episode(policy, workdir):
        command = [f"--policy={policy}", *arguments.split(), f"--workdir={workdir}"]
        assert evaluate.main(command) == 0
        results = json.loads((workdir / "results.json").read_text())
        (episode,) = results["suites"]["libero_object_swap"]["episodes"]
        return {name: x for name, x in episode.items() if name != "seconds"}

    here = episode(checkpoint, tmp_path / "here")
    with serving_in_thread(served) as (port, _):
        assert episode(f"ws://127.0.0.1:{port}", tmp_path / "there") == here
    assert here["length"] == 6
    assert "libero_object_swap  0     0/1 = 0 %" in capsys.readouterr().out
    assert evaluate.main([f"--policy={checkpoint}", *arguments.split(), "--list"]) == 0
    assert "libero_10_swap\n" in capsys.readouterr().out
