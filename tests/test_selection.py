import jax
import numpy as np
import pytest

from mbpo_jax.selection import best_of, chunk_scores
from mbpo_jax.toy import ToyPolicy, ToyWorld, observation


class ActingPolicy(ToyPolicy):
    def act(self, params, observation, key):
        return self.sample(params, self.encode(params, observation), key).actions


def test_scores_by_hand():
    # w = 0.9, γ = 0.5: certain success 0.9; certain going on 0.5 · 0.4; half of each 0.45 + 0.1.
    scores = chunk_scores(np.array([1.0, 0.0, 0.5]), np.array([0.4, 0.4, 0.4]), 0.5, 0.9)
    np.testing.assert_allclose(scores, [0.9, 0.2, 0.55], atol=1e-6)


def test_best_and_worst_of_an_exact_world():
    # The value grows with the position, so the best chunk is the one that moves farthest.
    policy, start = ActingPolicy(), observation([0.0])
    params = policy.init()
    value = {**params, "critic": {"w": np.array([0.0, 1.0], np.float32)}}
    arguments = {"policy": params, "value": value, "world": {}}, start, jax.random.key(2)
    moves = {
        (count, choice): float(
            best_of(policy, ToyWorld(), count, 0.9, 1.0, choice)(*arguments).mean()
        )
        for count, choice in ((1, "best"), (64, "best"), (64, "worst"))
    }
    as_sampled = float(policy.act(params, start, jax.random.key(2)).mean())
    assert moves[1, "best"] == as_sampled
    assert moves[64, "best"] > 0.35 > as_sampled > -0.35 > moves[64, "worst"]


def test_a_random_choice_knows_nothing_of_the_scores():
    policy, start = ActingPolicy(), observation([0.0])
    params = {"policy": policy.init(), "value": policy.init(), "world": {}}
    act = jax.jit(best_of(policy, ToyWorld(), 16, 0.9, 1.0, "random"))
    moves = [float(act(params, start, jax.random.key(i)).mean()) for i in range(200)]
    # The mean of a chunk's two actions deviates by 0.3 / sqrt(2).
    assert abs(np.mean(moves)) < 0.05
    assert abs(np.std(moves) - 0.3 / 2**0.5) < 0.04


class StillPolicy(ActingPolicy):
    """Moves from 0.9 alone; stands still elsewhere."""

    def act(self, params, observation, key):
        moves = observation.proprio[:, :1, None] == np.float32(0.9)
        return moves * super().act(params, observation, key)


def test_a_sample_is_followed_by_what_the_policy_would_do():
    # From 0.9 the goal beyond 1 is reached at once or never, so a reward is discounted as one
    # chunk's, while a value of 1 at the end of 3 chunks counts 0.5³.
    policy, start, key = StillPolicy(), observation([0.9]), jax.random.key(0)
    params = policy.init()
    value = {**params, "critic": {"w": np.array([1.0, 0.0], np.float32)}}
    arguments = {"policy": params, "value": value, "world": {}}, start, key

    def moved(weight, chunks):
        act = best_of(policy, ToyWorld(), 64, 0.5, weight, chunks=chunks)
        return float(act(*arguments).mean())

    # The reward 0.2 is less than the value after 1 chunk, 0.5, and more than after 3, 0.125.
    assert moved(0.2, chunks=1) < 0.1 < moved(0.2, chunks=3)


def test_bad_choices():
    with pytest.raises(ValueError, match="best_of is 0"):
        best_of(ActingPolicy(), ToyWorld(), 0, 0.9, 1.0)
    with pytest.raises(ValueError, match="middle"):
        best_of(ActingPolicy(), ToyWorld(), 2, 0.9, 1.0, "middle")
    with pytest.raises(ValueError, match="best_of_chunks is 0"):
        best_of(ActingPolicy(), ToyWorld(), 2, 0.9, 1.0, chunks=0)
