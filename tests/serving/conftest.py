"""A working directory with a tiny policy, and messages to a server of it."""

import dataclasses

import jax
import ml_collections
import numpy as np
import pytest

from configs import libero_panda
from mbpo_jax.data.normalization import write_norm_stats
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.serving.inference import load
from mbpo_jax.stages.workspace import Workspace
from mbpo_jax.training.checkpoints import save_params
from tests.policy.conftest import CAMERAS, TINY, random_params, stats

SIZES = (1, 4)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """RUN/sft of a run that has done nothing else."""
    jax.config.update("jax_disable_most_optimizations", True)  # before any test's own fixture
    network = dataclasses.replace(TINY, vocab_size=512, max_prompt_tokens=16, action_dim=8)
    limits = libero_panda.ROBOT.action_limits
    policy = FlowPolicy(network, stats(7), stats(8), CAMERAS, limits)
    section = dataclasses.asdict(policy.config)
    del section["flow"]
    config = ml_collections.ConfigDict(
        {
            "cameras": CAMERAS,
            "robot": dataclasses.asdict(libero_panda.ROBOT),
            "image_size": 16,
            "chunk": policy.config.chunk,
            "seed": 3,
            "pretrained": {"policy_tokenizer": ""},
            "policy": section,
        }
    )
    directory = Workspace(tmp_path_factory.mktemp("run"), config).begin("sft", list(config))
    norm_stats = {"actions": policy.action_stats, "state": policy.proprio_stats}
    write_norm_stats(directory / "norm_stats.json", norm_stats)
    save_params(directory / "policy", jax.jit(lambda: random_params(policy))())
    return directory


@pytest.fixture(scope="session")
def served(checkpoint):
    return load(checkpoint, SIZES)


def message(seed: int = 0, **changes) -> dict:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    return {
        "observation/image": images[0],
        "observation/wrist_image": images[1],
        "observation/state": rng.normal(size=8),
        "prompt": "pick up the book",
        **changes,
    }
