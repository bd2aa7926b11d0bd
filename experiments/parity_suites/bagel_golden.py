"""A folder of arrays recorded from BAGEL's public code, and how ours are compared with them."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbpo_jax.nn import vae
from mbpo_jax.nn.vae import VAEConfig
from mbpo_jax.types import Params
from mbpo_jax.world_model.checkpoint import load_bagel
from mbpo_jax.world_model.config import UMMConfig, bagel

Row = tuple[str, float, float, bool]  # name, largest difference, tolerance, within it

TOLERANCE = 3e-5  # hidden states, caches, logits, autoencoder
RELATIVE_TOLERANCE = 1e-5  # losses and gradient norms
ATTENTION = ("causal", "full", "noise")  # by their recorded numbers


@dataclasses.dataclass(frozen=True)
class Golden:
    """A fixture folder: its model in float32, special tokens (a `bagel.Tokenizer` without `encode`)
    and bagel_config.json."""

    folder: Path
    config: UMMConfig
    params: Params
    tokenizer: Any
    sizes: dict


def load(folder: Path) -> Golden:
    """The folder's model, in float32, and its special tokens."""
    sizes = json.loads((folder / "bagel_config.json").read_text(encoding="utf-8"))
    base = bagel()
    base = dataclasses.replace(
        base,
        mot=dataclasses.replace(base.mot, dtype="float32", remat=False),
        vit=dataclasses.replace(base.vit, dtype="float32"),
        train_timestep_shift=sizes.get("timestep_shift", 1.0),
    )
    config, params = load_bagel(folder, base)
    ids = sizes["new_token_ids"]
    tokenizer = SimpleNamespace(
        bos_id=ids["bos_token_id"],
        eos_id=ids["eos_token_id"],
        start_of_image_id=ids["start_of_image"],
        end_of_image_id=ids["end_of_image"],
    )
    return Golden(folder, config, params, tokenizer, sizes)


def row(name: str, found, expected, tolerance: float = TOLERANCE) -> Row:
    """Largest absolute difference; another shape, or NaN, is an infinite one."""
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        return (f"{name} {found.shape} != {expected.shape}", np.inf, tolerance, False)
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    largest = float(np.max(difference, initial=0.0))
    largest = np.inf if np.isnan(largest) else largest
    return (name, largest, tolerance, largest <= tolerance)


def row_relative(name: str, found, expected, tolerance: float = RELATIVE_TOLERANCE) -> Row:
    """Largest difference relative to the largest expected magnitude."""
    scale = max(float(np.max(np.abs(expected), initial=0.0)), 1e-30)
    return row(name, np.asarray(found) / scale, np.asarray(expected) / scale, tolerance)


def nhwc(x: np.ndarray) -> np.ndarray:
    """PyTorch's channel order to ours."""
    return np.moveaxis(x, 1, -1)


def sample_latents(params: Params, config: VAEConfig, images, noise) -> jax.Array:
    """Scaled posterior samples of images [B, H, W, 3]; `noise` is standard normal [B, h, w, z]."""
    mean, log_variance = vae.moments(params, config, images)
    return vae.scale_latents(config, mean + jnp.exp(0.5 * log_variance) * noise)
