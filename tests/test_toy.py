import json

from experiments import toy


def test_a_rehearsal_tells_the_exact_world_from_the_wrong_one(tmp_path):
    toy.main([f"--out={tmp_path}", "--iterations=30"])
    exact, wrong, anchored = json.loads((tmp_path / "toy.json").read_text()).values()
    assert exact["real success"][0] < 0.3
    assert exact["real success"][-1] > 0.95
    assert wrong["imagined success"][-1] > 0.9
    assert wrong["real success"][-1] < 0.02
    assert abs(anchored["mean action"][-1]) < 0.2
    assert (tmp_path / "toy.png").stat().st_size > 10_000
