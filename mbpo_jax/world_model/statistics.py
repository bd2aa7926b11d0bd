"""What the world model's inputs and targets are standardised by: the parameters "statistics"."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mbpo_jax.types import Params, Transition
from mbpo_jax.world_model.autoencoder import Autoencoder
from mbpo_jax.world_model.config import UMMConfig


def neutral_statistics(config: UMMConfig, cameras: Sequence[str]) -> Params:
    """Statistics that change nothing, as released models have them."""
    z, p = config.vae.z_channels, config.proprio_dim
    statistics = {
        "latent_mean": jnp.zeros(z),
        "latent_std": jnp.ones(z),
        "residual_scale": {camera: jnp.ones(()) for camera in cameras},
    }
    if p:
        statistics["proprio"] = {"mean": jnp.zeros(p), "std": jnp.ones(p), "change": jnp.ones(p)}
    return statistics


def latent_statistics(
    autoencoder: Autoencoder, cameras: Sequence[str], params: Params, transitions: Transition
) -> Params:
    """The latents' mean and standard deviation per channel and each view's root mean square of
    changes, measured on transitions [N].

    Needed once after training a VAE from scratch; released models keep 0, 1 and 1.
    """
    bare = {**params, "statistics": neutral_statistics(autoencoder.config, cameras)}
    encode = jax.jit(autoencoder.encode)
    now = {c: encode(bare, transitions.observation.images[c]) for c in cameras}
    later = {c: encode(bare, transitions.next_images[c]) for c in cameras}
    pooled = jnp.concatenate(list(now.values()))
    mean, std = pooled.mean((0, 1, 2)), pooled.std((0, 1, 2)) + 1e-6
    scale = {c: jnp.sqrt(jnp.mean(jnp.square((later[c] - now[c]) / std))) + 1e-6 for c in cameras}
    return {"latent_mean": mean, "latent_std": std, "residual_scale": scale}


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
