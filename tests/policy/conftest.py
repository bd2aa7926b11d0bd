import dataclasses

import jax
import numpy as np
import pytest

from mbpo_jax.nn.gemma import GemmaConfig
from mbpo_jax.nn.normalization import NormStats
from mbpo_jax.nn.siglip import SiglipConfig
from mbpo_jax.policy.config import CriticConfig, FlowConfig, Pi0Config
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.types import Observation, Prompt

CAMERAS = ("agentview", "robot0_eye_in_hand")
HEADS = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
TINY = Pi0Config(
    vision=SiglipConfig(16, 1, 32, 2, patch_size=8, image_size=16),
    language=GemmaConfig(width=16, depth=2, mlp_dim=32, **HEADS),
    expert=GemmaConfig(width=16, depth=2, mlp_dim=32, **HEADS),
    vocab_size=40,
    max_prompt_tokens=6,
    action_dim=5,
    chunk=4,
    critic=CriticConfig(widths=(8,), ensemble=3),
    eval_steps=2,
    times_per_example=2,
)
ACTION_DIM = 3
LIMITS = ((-1.0, 1.0),) * ACTION_DIM


def stats(size: int) -> NormStats:
    low, high = -np.linspace(0.5, 1.0, size), np.linspace(0.6, 1.0, size)
    return NormStats(0.1 * low, 0.5 * high, low, high)


def make_policy(**changes) -> FlowPolicy:
    return FlowPolicy(
        dataclasses.replace(TINY, **changes), stats(ACTION_DIM), stats(4), CAMERAS, LIMITS
    )


def random_params(policy: FlowPolicy, seed: int = 0):
    """Parameters without zeros: a fresh expert is inert until it is trained."""
    leaves, tree = jax.tree.flatten(policy.init(jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
    return jax.tree.unflatten(tree, noisy)


def make_observation(batch: int = 3, seed: int = 0, size: int = 16) -> Observation:
    rng = np.random.default_rng(seed)
    images = {
        camera: rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8) for camera in CAMERAS
    }
    mask = np.arange(6) < rng.integers(2, 6, (batch, 1))
    prompt = Prompt(rng.integers(1, 40, (batch, 6)).astype(np.int32), mask)
    proprio = rng.normal(size=(batch, 4)).astype(np.float32)
    return Observation(images, proprio, prompt, prompt)


FLOWS = {
    "sde": FlowConfig(method="sde"),
    "fixed noise": FlowConfig(method="noise", noise_std=0.2),
    "learned noise": FlowConfig(method="noise", learned_noise=True, noise_widths=(8,)),
    "matching": FlowConfig(method="matching"),
    "smooth": FlowConfig(method="smooth", noise_std=0.2, smooth_modes=2),
}


@pytest.fixture
def observation() -> Observation:
    return make_observation()
