"""The command line's errors, budgets, pooling and the page."""

import json

import ml_collections
import pytest

from configs.arx_x5 import get_config as robot_config
from configs.libero_long import get_config
from experiments.compare import DEFAULT, DESCRIPTIONS, report
from experiments.compare.__main__ import compare, seeds_of
from experiments.compare.methods import METHODS, Method, check_budgets, chosen
from experiments.compare.runs import merged
from experiments.compare.settings import get_settings


def config(variant="micro", **changes):
    whole = ml_collections.ConfigDict(merged(get_config(variant), get_settings()).to_dict())
    whole.update_from_flattened_dict(changes)
    return whole.lock()


def test_every_method_is_described():
    assert list(METHODS) == list(DESCRIPTIONS)
    assert set(DEFAULT) <= set(METHODS)


def test_sft_is_always_compared_with():
    assert list(chosen(["vla_mbpo"])) == ["sft", "vla_mbpo"]
    assert list(chosen(["idql", "sft"])) == ["sft", "idql"]


def test_unknown_methods_name_the_nearest():
    with pytest.raises(ValueError, match="'vla_mbpo_3'; did you mean vla_mbpo_"):
        chosen(["sft", "vla_mbpo_3"])
    with pytest.raises(ValueError, match="twice"):
        chosen(["idql", "idql"])


@pytest.mark.parametrize("seeds", [["x"], ["1.5"], ["-1"], ["1001"], ["0", "0"], []])
def test_bad_seeds(seeds):
    with pytest.raises(ValueError, match="--seeds"):
        seeds_of(seeds)


def test_a_wrong_method_is_one_message(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        compare(get_config("tiny"), get_settings(), tmp_path / "new", ["mopoo"], ["0"])
    assert capsys.readouterr().err.startswith("error: --methods holds 'mopoo'; did you mean mopo")
    assert not (tmp_path / "new").exists()


def test_a_robot_without_a_simulator_is_refused():
    with pytest.raises(ValueError, match="simulator"):
        merged(robot_config("tiny"), get_settings())


@pytest.mark.parametrize("variant", ["tiny", "micro", "paper"])
def test_every_method_has_the_same_budget(variant):
    whole = config(variant)
    budget = check_budgets(whole, METHODS)
    assert budget == whole.rollouts.episodes_per_task * len(whole.tasks)
    used = {name: method.episodes(method.config(whole)) for name, method in METHODS.items()}
    assert used.pop("sft") == used.pop("noiseless") == 0
    assert used.pop("online_ppo_large") == 10 * budget
    assert set(used.values()) == {budget}


def test_budgets_that_differ_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"sft\.rollouts"):
        check_budgets(config(**{"sft.rollouts": "elsewhere"}), ["sft"])
    monkeypatch.setitem(METHODS, "online_ppo", METHODS["online_ppo_large"])
    check_budgets(config(), ["online_ppo"])
    greedy = Method(None, episodes=lambda config: 51)
    monkeypatch.setitem(METHODS, "idql", greedy)
    with pytest.raises(ValueError, match="idql would use 51 real episodes, the others 50"):
        check_budgets(config(), ["sft", "idql"])


def test_online_episodes_are_whole_and_each_refill_is_as_large():
    rl = METHODS["online_ppo"].config(config()).rl
    assert (rl.world, rl.start_states_from, rl.branch_chunks) == ("simulator", "episode_start", 16)
    assert (rl.start_states, rl.updates, rl.updates_per_refill) == (10, 40, 8)
    assert METHODS["vla_mbpo_1"].config(config()).rl.start_states == 1024


def episodes(outcomes, init_states=()):
    records = [{"seed": i, "init_state": -1, "success": s} for i, s in enumerate(outcomes)]
    records += [{"seed": -1, "init_state": i, "success": s} for i, s in enumerate(init_states)]
    return [{"task": 5, "length": 95, **record} for record in records]


def test_pairs_are_pooled_over_seeds():
    first = [episodes([1, 0, 0, 0], [1]), episodes([0, 0, 1, 0], [1])]
    second = [episodes([0, 1, 1, 1], [1]), episodes([1, 1, 1, 0], [1])]
    found = report.pooled(first, second, "resets")
    assert (found["successes"], found["episodes"], found["pairs"]) == (6, 8, 8)
    assert (found["sft_only"], found["method_only"]) == (1, 5)
    assert found["p_value"] == pytest.approx(2 * (1 + 6) / 2**6)
    assert report.pooled(first, second, "init_states")["p_value"] == 1.0
    assert report.pooled([episodes([1])], [episodes([1])], "init_states") is None


def write_run(root, seed, name, outcomes, improve=None):
    directory = root / f"seed{seed}_{name}"
    for stage in ("demonstrations", "sft", "rollouts", "world_model", "value", "evaluate"):
        (directory / stage).mkdir(parents=True)
        (directory / stage / "done.json").write_text(json.dumps({"minutes": 2.0}))
    lines = [json.dumps(x) for x in episodes(outcomes, [1, 0])]
    path = directory / "evaluate" / f"episodes_{name}.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    if improve:
        (directory / "improve").mkdir()
        (directory / "improve/done.json").write_text(json.dumps(improve))


def test_the_page_tells_success_and_costs_of_finished_seeds(tmp_path):
    whole, methods = config(), chosen(["vla_mbpo", "best_of_n", "ranked_best_of_n"])
    for seed, outcomes in ((0, [1, 0]), (1, [0, 0])):
        improve = {"minutes": 3.0, "imagined_chunks": 640}
        write_run(tmp_path, seed, "sft", outcomes)
        write_run(tmp_path, seed, "best_of_n", [1, 1])
        write_run(tmp_path, seed, "ranked_best_of_n", [1, 1], improve)
        if seed == 0:  # the other seed's has not finished
            write_run(tmp_path, seed, "vla_mbpo", [1, 1], improve)
    results = report.collect(whole, tmp_path, methods, [0, 1])
    assert results["seeds"] == [0]
    row = results["methods"]["vla_mbpo"]
    assert (row["imagined_chunks"], row["real_episodes"]) == ([640], 50)
    assert row["minutes"] == [{"shared": 10.0, "training": 3.0, "evaluation": 2.0}]
    assert row["resets"]["method_only"] == 1
    assert results["methods"]["sft"]["minutes"][0]["shared"] == 4.0  # demonstrations and sft
    # 4 episodes of 95 steps are 10 chunks each, with 16 to choose from.
    assert results["methods"]["best_of_n"]["imagined_chunks"] == [640]
    assert results["methods"]["ranked_best_of_n"]["imagined_chunks"] == [640 + 640]
    # Of 2 resets and 2 init states sft solves 2, the others 3 and the same ones.
    against = results["methods"]["best_of_n"]["against"]
    assert against["sft"] == {"other_only": 0, "it_only": 1, "p_value": 1.0}
    assert against["vla_mbpo"] == {"other_only": 0, "it_only": 0, "p_value": 1.0}
    assert results["methods"]["sft"]["against"] == {}
    assert [len(x) for x in report.between(results).rows] == [4, 4, 4]
    page = report.page(whole, results, 50)
    assert "2/2 (34–100 %)" in page
    assert page.count("data:image/png;base64,") == 1
    assert 'src="http' not in page
    assert "vla_mbpo" in report.plain(report.table(results))
