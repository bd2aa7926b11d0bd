"""What the world model's inputs and targets are standardised by: the parameters "statistics"."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from mbpo_jax.nn.normalization import BOUND
from mbpo_jax.types import Params, Transition
from mbpo_jax.world_model.config import UMMConfig


def neutral_statistics(config: UMMConfig, cameras: Sequence[str], action_dim: int) -> Params:
    """Statistics that change nothing, as released models have them."""
    statistics, p = {}, config.proprio_dim
    if config.prediction == "composed":
        statistics = {
            "actions": {"mean": jnp.zeros(action_dim), "std": jnp.ones(action_dim)},
            "pixel_change": dict.fromkeys(cameras, jnp.ones(())),
        }
    if p:
        statistics["proprio"] = {"mean": jnp.zeros(p), "std": jnp.ones(p), "change": jnp.ones(p)}
    return statistics


def proprio_statistics(config: UMMConfig, transitions: Transition) -> Params:
    """{"proprio": mean, standard deviation and root mean square of changes of every value} over
    transitions [N]; nothing where proprioception is not predicted."""
    if not config.proprio_dim:
        return {}
    now = jnp.asarray(transitions.observation.proprio)
    change = transitions.next_proprio - now
    found = {
        "mean": now.mean(0),
        "std": now.std(0) + 1e-6,
        "change": jnp.sqrt(jnp.mean(jnp.square(change), 0)) + 1e-6,
    }
    return {"proprio": found}


def widen_proprio(
    statistics: Params, now: np.ndarray, later: np.ndarray
) -> tuple[Params, list[int]]:
    """`statistics` by which no proprioception of transitions, `now` and `later` float32 [N, P], and
    no change of it is standardised beyond ±BOUND, and the dimensions where that takes others than
    were measured on a sample of them."""
    found = statistics.get("proprio")
    if found is None:
        return statistics, []
    std = jnp.maximum(found["std"], np.abs(now - found["mean"]).max(axis=0) / BOUND)
    change = jnp.maximum(found["change"], np.abs(later - now).max(axis=0) / BOUND)
    wide = np.flatnonzero((std > found["std"]) | (change > found["change"])).tolist()
    return {**statistics, "proprio": {**found, "std": std, "change": change}}, wide


def composition_statistics(
    config: UMMConfig, cameras: Sequence[str], transitions: Transition
) -> Params:
    """The actions' mean and standard deviation per dimension, each view's root mean square change
    of pixels (of [-1, 1]) and `proprio_statistics`, measured on transitions [N].

    A dimension that never moves counts with a hundredth of the largest deviation.
    """

    def change(camera):
        pair = (transitions.next_images[camera], transitions.observation.images[camera])
        later, now = (np.asarray(x, np.float32) / 127.5 for x in pair)
        return jnp.asarray(np.sqrt(np.mean(np.square(later - now))) + 1e-6)

    actions = np.asarray(transitions.actions).reshape(-1, transitions.actions.shape[-1])
    std = actions.std(0)
    std = np.maximum(std, max(0.01 * std.max(), 1e-6))
    return {
        "actions": {"mean": jnp.asarray(actions.mean(0)), "std": jnp.asarray(std)},
        "pixel_change": {camera: change(camera) for camera in cameras},
    } | proprio_statistics(config, transitions)
