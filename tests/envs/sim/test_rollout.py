"""What is drawn of a policy's episode, on an environment without a simulator."""

import numpy as np

from mbpo_jax.envs.requests import EpisodeRequest
from mbpo_jax.envs.sim.rollout import run_policy
from mbpo_jax.envs.sim.simulator import RobosuiteEnv


class CountingEnv:
    """Succeeds at step 13; a frame shows the number of its step."""

    suite, task_id, cameras, image_size, chunk = "none", 0, ("head",), 2, 4
    action_dim = 7
    instruction, goal_fraction = "count", 1.0

    def reset_to(self, request):
        self.num_steps = 0
        self.max_steps, self.until_end = request.max_steps, request.until_end

    def step(self, action):
        self.num_steps += 1

    @property
    def success(self):
        return self.num_steps == 13

    over = RobosuiteEnv.over

    def state(self):
        return np.array([self.num_steps])

    def proprio(self):
        return np.full(8, self.num_steps, np.float32)

    def render_state(self, state, size):
        return {"head": np.full((size, size, 3), state[0], np.uint8)}

    def observe(self):
        return self.render_state(self.state(), 2), self.proprio()


def test_frames_of_a_success_and_of_a_failure():
    def drawn(**changes):
        request = EpisodeRequest(task_id=0, seed=0, **changes)
        result = run_policy(CountingEnv(), request, lambda _: np.zeros((4, 7)), "policy")
        episode = result.episode
        np.testing.assert_array_equal(episode.images["head"][:, 0, 0, 0], episode.timesteps)
        return episode.timesteps.tolist()

    assert drawn(render_every=4) == [0, 4, 8, 9, 10, 11, 12, 13]
    assert drawn(render_every=4, success_frames=1) == [0, 4, 8, 12, 13]
    assert drawn(render_every=4, max_steps=10) == [0, 4, 8, 10]
    assert drawn(render_every=2, success_frames=1) == [0, 2, 4, 6, 8, 10, 12, 13]


def test_until_its_end_an_episode_succeeds_only_if_it_is_done_then():
    def outcome(**changes):
        request = EpisodeRequest(task_id=0, seed=0, render_every=4, **changes)
        result = run_policy(CountingEnv(), request, lambda _: np.zeros((4, 7)), "policy")
        return bool(result.episode.success), result.episode.length, result.first_success

    assert outcome(max_steps=20) == (True, 13, 13)
    assert outcome(max_steps=20, until_end=True) == (False, 20, 13)
    assert outcome(max_steps=13, until_end=True) == (True, 13, 13)
    assert outcome(max_steps=10, until_end=True) == (False, 10, -1)
