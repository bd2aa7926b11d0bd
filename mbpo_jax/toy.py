"""An exact toy world and a Gaussian policy: the two protocols with known answers.

A point on a line moves by the mean of its chunk's actions; the task is done where it is beyond 1.
The best policy moves to the right and succeeds at once, with return 1. `experiments/toy.py`
rehearses the method on it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mbpo_jax.types import ActionSample, Observation, Prompt, WorldState

CHUNK = 2
DEVIATION = 0.3


def observation(position) -> Observation:
    """Observations [M] at the given positions [M]."""
    position = np.asarray(position, np.float32)
    prompt = Prompt(np.zeros((len(position), 1), np.int32), np.ones((len(position), 1), bool))
    return Observation(
        images={"camera": np.zeros((len(position), 1, 1, 3), np.uint8)},
        proprio=position[:, None],
        prompt=prompt,
        world_prompt=prompt,
    )


class ToyWorld:
    """Implements WorldModel without parameters."""

    def precompute(self, params, observation, key):
        return observation.proprio

    def encode(self, params, observation, key, precomputed=None):
        position = observation.proprio if precomputed is None else precomputed
        return WorldState(observation.replace(proprio=position))

    def step(self, params, state, actions, key):
        now = state.observation
        return WorldState(now.replace(proprio=now.proprio + actions.mean((1, 2))[:, None]))

    def success_probability(self, params, state):
        return (state.observation.proprio[:, 0] > 1.0).astype(jnp.float32)


class WrongWorld(ToyWorld):
    """Promises ever more the farther the point goes to the left."""

    def success_probability(self, params, state):
        return jax.nn.sigmoid(-10.0 * state.observation.proprio[:, 0] - 10.0)


class ToyPolicy:
    """Implements Policy: actions are normal around a learned constant."""

    def init(self):
        return {"actor": {"mean": jnp.zeros(())}, "critic": {"w": jnp.zeros(2)}}

    def encode(self, params, observation):
        return {"position": observation.proprio[:, 0], "mean": params["actor"]["mean"]}

    def sample(self, params, prefix, key):
        noise = jax.random.normal(key, (*prefix["position"].shape, CHUNK, 1))
        actions = prefix["mean"] + DEVIATION * noise
        return ActionSample(actions, actions, self.log_prob(params, prefix, actions))

    def log_prob(self, params, prefix, chain):
        return jax.scipy.stats.norm.logpdf(chain, prefix["mean"], DEVIATION).sum((1, 2))

    def value(self, params, prefix):
        w = params["critic"]["w"]
        return w[0] + w[1] * jax.lax.stop_gradient(prefix["position"])

    def loss(self, actor, observation, actions, key):
        """Demonstrated actions pull the mean: gradient 2 (mean - actions)."""
        loss = jnp.square(actor["mean"] - actions).mean()
        return loss, {"loss": loss}
