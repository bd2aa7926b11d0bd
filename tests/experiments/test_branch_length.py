"""The experiment on branch length: the same number of chunks, pooled counts, one message."""

import subprocess
import sys

import pytest

from configs.libero_long import get_config
from experiments import branch_length


def by_ppo():
    config = get_config("micro").unlock()
    config.rl.method = "ppo"
    return config


@pytest.mark.parametrize(("length", "starts", "chunks"), [("1", 1024, 1), ("4", 256, 4)])
def test_every_length_imagines_as_many_chunks(length, starts, chunks):
    rl = branch_length.with_branches(by_ppo(), length).rl
    assert (rl.start_states, rl.branch_chunks) == (starts, chunks)


@pytest.mark.parametrize(("length", "starts", "chunks"), [("1", 1920, 1), ("full", 120, 16)])
def test_ranked_branches_imagine_as_many_chunks(length, starts, chunks):
    rl = branch_length.with_branches(get_config("micro"), length).rl
    assert (rl.ranked.start_states, rl.ranked.chunks) == (starts, chunks)
    assert rl.start_states_from == ("episode_start" if length == "full" else "dataset")


def test_the_full_horizon_starts_with_the_episode():
    rl = branch_length.with_branches(by_ppo(), "full").rl
    assert (rl.branch_chunks, rl.start_states_from) == (16, "episode_start")
    assert rl.start_states == 64
    assert rl.start_states % rl.imagination_batch == 0


def test_seeds_are_pooled():
    def part(sft, improved, first_only, second_only):
        counts = {"sft": sft, "improved": improved}
        resets = {name: {"successes": n, "episodes": 10} for name, n in counts.items()}
        pair = {"first_only": first_only, "second_only": second_only}
        return {"resets": resets, "paired_resets": {"improved": pair}}

    row = branch_length.pooled([part(4, 7, 1, 4), part(5, 6, 0, 1)])
    assert (row["sft"]["successes"], row["improved"]["successes"]) == (9, 13)
    assert (row["first_only"], row["second_only"]) == (1, 5)
    assert row["p_value"] == pytest.approx(2 * (1 + 6) / 2**6)


def test_the_recommendation_is_where_the_model_errs_more_than_the_policy_has_moved():
    config = get_config("tiny")
    curve = {camera: {"unexplained": [0.05, 0.15, 0.25]} for camera in config.cameras}
    found = branch_length.recommended(config, [curve])
    assert found == {"0.1": 1, "0.2": 2, "0.3": 15, "0.5": 15}  # it stays at 0.25 after 3 chunks


def test_a_length_that_is_none_is_one_message():
    command = [sys.executable, "-m", "experiments.branch_length", "--chunks=1,none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "'none'" in done.stderr
    assert "Traceback" not in done.stderr
