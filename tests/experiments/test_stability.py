"""The stability of the hyperparameters: what is varied, the counts of the page, one message."""

import subprocess
import sys

import ml_collections
import pytest

from configs.libero_long import get_config
from experiments import stability


def test_entries_that_are_zero_have_no_multiples():
    config = get_config("paper")
    assert config.rl.anchor_weight == 0
    assert "anchor_weight" not in stability.entries_of(config, [])
    assert "actor_lr" in stability.entries_of(config, [])
    for name in ("anchor_weight", "actor", "flow.method", "discount_per"):
        with pytest.raises(ValueError, match=name):
            stability.entries_of(config, [name])


def test_the_entries_are_those_of_the_method():
    config = get_config("micro").unlock()
    assert stability.entries_of(config, []) == [*stability.ENTRIES["ranked"]]
    with pytest.raises(ValueError, match="actor_lr"):
        stability.entries_of(config, ["ranked.steps", "actor_lr"])
    config.rl.method = "ppo"
    assert stability.entries_of(config, ["actor_lr"]) == ["actor_lr"]
    with pytest.raises(ValueError, match=r"ranked\.steps"):
        stability.entries_of(config, ["ranked.steps"])


def test_longer_ranked_branches_begin_in_fewer_states():
    config = get_config("micro")
    changed = stability.variants(config, ["ranked.chunks", "ranked.kept"])
    ranked = changed["ranked.chunks_triple"].rl.ranked
    assert (ranked.chunks, ranked.start_states) == (3, 640)
    assert changed["ranked.kept_triple"].rl.ranked.kept == 6
    assert changed["ranked.kept_third"].rl.ranked.kept == 1


def test_only_the_entry_changes():
    config = get_config("micro")
    changed = stability.variants(config, ["flow.noise_std", "updates"])
    assert list(changed) == [
        "shared",
        "flow.noise_std_third",
        "flow.noise_std_triple",
        "updates_third",
        "updates_triple",
    ]
    own = changed["flow.noise_std_triple"].to_dict()
    assert own["rl"]["flow"]["noise_std"] == pytest.approx(0.24)
    own["rl"]["flow"]["noise_std"] = config.rl.flow.noise_std
    assert own == config.to_dict()
    assert changed["updates_third"].rl.updates == 80
    assert config.rl.updates == 240


@pytest.mark.parametrize(("factor", "chunks"), [(1 / 3, 1), (3.0, 12), (30.0, 16)])
def test_branches_of_another_length_imagine_as_many_chunks(factor, chunks):
    config = get_config("micro").unlock()
    config.rl.method = "ppo"
    rl = stability.scaled(config, "branch_chunks", factor).rl
    assert rl.branch_chunks == chunks
    assert 1024 - 16 * chunks < rl.start_states * chunks <= 1024


def test_where_the_shared_set_fails_is_a_row():
    def part(successes, first_only, second_only, p_value):
        success = {"successes": successes, "episodes": 50, "success_rate": successes / 50}
        success["interval"] = (0.0, 1.0)
        pair = {"first_only": first_only, "second_only": second_only, "p_value": p_value}
        return {"sft": success, "improved": success, "against_shared": pair}

    runs = {
        "shared": part(20, 0, 0, 1.0),
        "actor_lr_third": part(30, 1, 11, 0.006),  # better
        "actor_lr_triple": part(10, 11, 1, 0.006),  # worse
        "updates_third": part(24, 1, 5, 0.22),  # by chance
        "updates_triple": part(20, 0, 0, 1.0),
    }
    results, entries = {"5": runs}, ["actor_lr", "updates"]
    rows = stability.better_than_shared(results, entries)
    assert [row[:5] for row in rows] == [("5", "actor_lr", "third", "30/50", "20/50")]
    html = stability.page(ml_collections.ConfigDict({"suite": "s", "rl": {}}), results, entries)
    assert html.count("30/50") == 3  # both policies of that run, and the row
    assert "data:image/png" in html


@pytest.mark.parametrize(
    "wrong", ["--entries=ranked.steps,none", "--tasks=5,5", "--config.rl.method=ranked,dqn"]
)
def test_what_cannot_be_run_is_one_message(wrong, tmp_path):
    command = [sys.executable, "-m", "experiments.stability", wrong, f"--workdir={tmp_path}/x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert wrong.partition("=")[2].split(",")[1] in done.stderr
    assert not (tmp_path / "x").exists()
