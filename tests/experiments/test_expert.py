"""The measurement of the scripted expert: its table, how it goes on, what it refuses."""

import json
import subprocess
import sys

import pytest

from experiments import expert
from mbpo_jax.stages.statistics import wilson_interval

BOOK = "--suite=libero_10", "--tasks=5", "--workers=1"


@pytest.mark.libero
def test_finished_episodes_are_kept_and_more_are_added(tmp_path, capsys):
    out = f"--out={tmp_path}"
    assert expert.main([*BOOK, "--episodes=1", out]) == 0
    first = json.loads((tmp_path / "expert.json").read_text())
    first["episodes"][0]["seconds"] = 1000.0  # that it is kept shows
    (tmp_path / "expert.json").write_text(json.dumps(first))
    assert expert.main([*BOOK, "--episodes=2", out, "--gifs"]) == 0
    both = json.loads((tmp_path / "expert.json").read_text())
    assert [e["seed"] for e in both["episodes"]] == [0, 1]
    assert [e["success"] for e in both["episodes"]] == [True, True]
    (row,) = both["tasks"]
    assert (row["successes"], row["episodes"]) == (2, 2)
    assert row["seconds_per_episode"] > 500
    line = capsys.readouterr().out.splitlines()[-1]
    assert "2/2" in line
    assert "back compartment of the caddy" in line
    assert [path.name for path in tmp_path.glob("*.gif")] == ["libero_10_task005_success.gif"]
    assert expert.main([*BOOK, "--episodes=2", out, "--jitter=0.1"]) == 1
    assert "choose another --out" in capsys.readouterr().err


def test_a_row_has_counts_interval_and_means():
    def episode(task, success, length):
        return {
            "suite": "s",
            "task": task,
            "success": success,
            "length": length,
            "seconds": 2.0,
        }

    episodes = [episode(0, True, 100), episode(0, False, 200), episode(1, True, 7)]
    row = expert.summarize("s", 0, "do it", "", episodes)
    assert row["interval"] == list(wilson_interval(1, 2))
    assert (row["mean_length"], row["seconds_per_episode"]) == (150, 2)
    refused = expert.summarize("s", 2, "fold it", "cannot achieve 'folded shirt'", episodes)
    lines = expert.table([row, refused]).splitlines()
    assert lines[2].split() == ["s", "0", "1/2", "9–91", "150", "2.0", "do", "it"]
    assert lines[3].split()[:3] == ["s", "2", "fold"]
    assert lines[3].endswith("(cannot achieve 'folded shirt')")


@pytest.mark.libero
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suite=libero_goals"], "did you mean 'libero_goal'"),
        (["--suite=libero_goal", "--tasks=10"], "tasks 0 to 9; there is no 10"),
        (["--suite=libero_goal", "--gifs"], "--gifs needs --out"),
    ],
)
def test_what_cannot_be_run_is_one_message(flags, message, capsys):
    assert expert.main(flags) == 1
    assert message in capsys.readouterr().err


def test_it_does_not_need_jax():
    program = (
        "import sys, experiments.expert, mbpo_jax.envs.workers.pool; print('jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
