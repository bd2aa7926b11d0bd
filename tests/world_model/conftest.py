"""A world model small enough to compile in seconds, and observations for it."""

import dataclasses

import jax
import numpy as np
import pytest

from mbpo_jax.nn.navit import NaViTConfig
from mbpo_jax.nn.qwen2_mot import MoTConfig
from mbpo_jax.nn.vae import VAEConfig
from mbpo_jax.types import Observation, Prompt, Transition
from mbpo_jax.world_model.composed import ComposedWorld
from mbpo_jax.world_model.config import UMMConfig
from mbpo_jax.world_model.metrics import judge, predictor
from mbpo_jax.world_model.umm_world import UMMWorld

CAMERAS = ("head", "wrist")
SIZE = 16


class WordTokenizer:
    """Words, digits and punctuation marks are tokens 5, 6, ... in order of appearance."""

    bos_id, eos_id, start_of_image_id, end_of_image_id = 1, 2, 3, 4
    vocab_size = 64

    def __init__(self):
        self.words = {}

    def encode(self, text):
        pieces = "".join(c if c.isalpha() else f"\0{c}\0" for c in text).split("\0")
        return [self.words.setdefault(p, 5 + len(self.words)) for p in pieces if p]


TINY = UMMConfig(
    mot=MoTConfig(64, 32, 2, 4, 2, 48, rope_theta=1e4),
    vit=NaViTConfig(16, 1, 2, 32, patch_size=8, max_patches_per_side=2),
    vae=VAEConfig(16, (1,), 1, 4, norm_groups=4, patch_size=4),
    vae_image_size=SIZE,
    vit_image_size=SIZE,
    latent_patch=2,
    max_latent_side=2,
    actions_as="embedding",
    train_timestep_shift=1.0,
    sample_timestep_shift=1.0,
    num_timesteps=3,
    freeze_vit=False,
)
COMPOSED = dataclasses.replace(
    TINY, vae=None, prediction="composed", latent_patch=4, max_latent_side=4, proprio_dim=8
)


def make_world(cameras=CAMERAS, **changes):
    config = dataclasses.replace(TINY, **changes)
    return UMMWorld(config, cameras, SIZE, 2, 3, WordTokenizer())


def make_composed_world(cameras=CAMERAS, **changes):
    config = dataclasses.replace(COMPOSED, **changes)
    return ComposedWorld(config, cameras, SIZE, 2, 3, WordTokenizer())


def make_observation(seed=0, batch=(2,), cameras=CAMERAS):
    rng = np.random.default_rng(seed)
    prompt = Prompt(
        np.broadcast_to(np.array([1, 9, 10, 2, 0], np.int32), (*batch, 5)),
        np.broadcast_to(np.array([1, 1, 1, 1, 0], bool), (*batch, 5)),
    )
    images = {c: rng.integers(0, 256, (*batch, SIZE, SIZE, 3)).astype(np.uint8) for c in cameras}
    return Observation(images, rng.normal(size=(*batch, 8)).astype(np.float32), prompt, prompt)


def actions(seed=0, batch=2):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, 3, 2)).astype(np.float32)


def make_transition(seed=0, batch=(2,), cameras=CAMERAS):
    rng = np.random.default_rng(seed + 100)
    return Transition(
        make_observation(seed, batch, cameras),
        rng.uniform(-1, 1, (*batch, 3, 2)).astype(np.float32),
        make_observation(seed + 1, batch, cameras).images,
        rng.normal(size=(*batch, 8)).astype(np.float32),
    )


def awaken(params, seed=0):
    """Parameters with a random head, so that a prediction is not the zero of a fresh model."""
    head = params["adapters"]["llm2vae"]
    kernel = 0.3 * jax.random.normal(jax.random.key(seed), head["kernel"].shape)
    adapters = {**params["adapters"], "llm2vae": {**head, "kernel": kernel}}
    return {**params, "adapters": adapters}


@pytest.fixture(scope="session")
def world():
    return make_world()


@pytest.fixture(scope="session")
def params(world):
    return awaken(world.init(jax.random.key(0)))


@pytest.fixture(scope="session")
def step(world):
    """The world's jitted prediction; one object for the session, so that it compiles once."""
    return jax.jit(predictor(world))


@pytest.fixture(scope="session")
def reward(world):
    return jax.jit(judge(world))


@pytest.fixture(scope="session")
def stage_losses(world):
    """(params, transition) -> the loss of each view's stage, same noise every time."""
    losses = jax.jit(lambda p, t: world.dynamics_loss(p, t, jax.random.key(3))[1])
    return lambda p, t: {k.split("/")[1]: float(v) for k, v in losses(p, t).items()}
