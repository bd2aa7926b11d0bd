import json
import math

import pytest

from mbpo_jax.reporting.diagnose import gates, read_pool, table
from mbpo_jax.stages.workspace import StageError


def run(unexplained=0.2, improved=130):
    view = {"unexplained": unexplained, "response": 0.6}
    rate = {"sft": 100, "improved": improved, "improved_best": 150}
    return {
        "world_model": {
            "held_out_episodes": 3,
            "imagination": {
                "views": {"head": view, "wrist": view},
                "true_chunk_first": 0.9,
                "gripper_cm": {c: {"real": 1.0, "imagined": 1.5} for c in ("head", "wrist")},
            },
            "horizon": {"head": {"unexplained": [0.2, 0.3, 0.3, 0.45]}},
        },
        "value": {"held_out": {"real": {"auc": 0.85}, "imagined": {"auc": float("nan")}}},
        "selection": {
            "resets": {
                n: {"successes": s, "episodes": 200}
                for n, s in {"worst": 60, "random": 100, "sampled": 110, "best": 140}.items()
            }
        },
        "siblings": {"imagined": [{"correlation": 0.3}], "real": {"correlation": 0.1}},
        "evaluate": {
            "resets": {n: {"successes": s, "episodes": 200} for n, s in rate.items()},
            "paired_resets": {"improved": {"first_only": 20, "second_only": improved - 80}},
        },
    }


def missed(runs):
    return [gate.name for gate in gates(runs) if not gate.reached]


def test_gates_of_a_run():
    found = {gate.name: gate for gate in gates([run()])}
    assert missed([run()]) == [
        "head: unexplained after 4 chunks",  # 0.45
        "value: AUC of imagined held-out frames",  # NaN never passes
        "siblings: return after 1 real chunk tells success",
    ]
    assert found["selection: best - worst (points)"].figure == 40
    assert found["selection: best - random (points)"].figure == 20
    assert found["improved - fine-tuned (points)"].figure == 15
    assert found["improved, best of 16 - fine-tuned (points)"].figure == 25
    assert "head: unexplained change" in missed([run(unexplained=0.23)])
    assert len(table(gates([run()])).splitlines()) == 1 + len(found)


def test_runs_are_pooled():
    # 30 and 2 more successes of 200 each: 8 points over both, 20 + 20 against 50 + 22 pairs.
    found = {gate.name: gate for gate in gates([run(), run(unexplained=0.3, improved=102)])}
    assert found["improved - fine-tuned (points)"].figure == 8
    assert found["head: unexplained change"].figure == pytest.approx(0.25)
    tail = sum(math.comb(112, i) for i in range(41)) / 2**112
    assert found["improved - fine-tuned: p (exact McNemar)"].figure == pytest.approx(2 * tail)


def test_a_pool_that_is_none(tmp_path):
    with pytest.raises(StageError, match="no results"):
        read_pool(tmp_path)
    for text in (json.dumps({"sft": {}}), "{", "[]", '{"stages": {"world_model": 3}}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(StageError, match=r"a\.json"):
            read_pool(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({"stages": {**run(), "sft": {}}}))
    assert [set(r) for r in read_pool(tmp_path)] == [
        {"world_model", "value", "selection", "siblings", "evaluate"}
    ]
