from types import SimpleNamespace

import numpy as np
import pytest

from experiments.benchmarks import rendering


class Grey:
    """A simulator of two views: frames of one grey level, two levels lighter in full, four in the
    first state's first view."""

    def __init__(self, suite, task_id, image_size):
        self.suite, self.task_id, self.image_size, self.max_steps = suite, task_id, image_size, 9
        self.cameras, self.over, self.count = ("head", "hand"), False, 0
        self.culling, self.detail = SimpleNamespace(enabled=True), SimpleNamespace(enabled=True)

    def reset_to(self, request):
        self.count = 0

    def state(self):
        return self.count

    def step(self, action):
        self.count += 1

    def render_state(self, state):
        lighter = 0 if self.detail.enabled else np.array([4 if state == 0 else 2, 2])
        levels = np.broadcast_to(100 + lighter, 2)
        shape = (self.image_size, self.image_size, 3)
        return {c: np.full(shape, x, np.uint8) for c, x in zip(self.cameras, levels)}

    def close(self):
        pass


def test_differences_are_over_all_views_of_all_states(monkeypatch):
    monkeypatch.setattr(rendering, "TASKS", (("libero_10", 5),))
    monkeypatch.setattr(rendering, "STATES", 2)
    monkeypatch.setattr(rendering, "LiberoEnv", Grey)
    monkeypatch.setattr(rendering.suites, "expert_actions", lambda env: iter(np.zeros((3, 7))))
    (row,) = rendering.run("8", repeats=1)
    # Four states of two views: one frame is off by 4, seven by 2.
    assert row["mean_difference"] == pytest.approx(18 / 8, abs=1e-6)
    assert row["max_difference"] == 4
    assert row["psnr"] == pytest.approx(10 * np.log10(255**2 * 8 / 44), abs=1e-6)
    assert row["frames_per_second"] == pytest.approx(2 / row["seconds"], rel=1e-9)
