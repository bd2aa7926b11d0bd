"""Compares advantages and losses with golden arrays made by πRL's public code (RLinf)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.parity_suites.pi05 import Row, row
from mbpo_jax.mbpo import (
    actor_loss,
    critic_loss,
    generalized_advantages,
    normalize_advantages,
)

TOLERANCE = 1e-6
CHUNK_TOLERANCE = 5e-6  # where a ratio is the exponential of two float32 sums over a whole chunk
CRITIC_CASES = {
    "nomask": "huber_delta",
    "masked": "huber_delta",
    "masked_small": "huber_delta_small",
}


def run(fixtures: str | Path) -> list[Row]:
    """Rows for every `gae_ppo.npz` at or below `fixtures`; none if there is none."""
    rows = []
    for path in sorted(Path(fixtures).rglob("gae_ppo.npz")):
        golden = np.load(path)
        found = {**_advantages(golden), **_actor(golden), **_critic(golden), **_combined(golden)}
        rows += [
            row(f"{path.parent.name}/{name}", value, golden[name], _tolerance(name))
            for name, value in found.items()
        ]
    return rows


def _tolerance(name: str) -> float:
    return CHUNK_TOLERANCE if name.startswith("entry/") else TOLERANCE


def _advantages(golden) -> dict[str, jax.Array]:
    discount, gae_lambda = float(golden["gae/gamma"]), float(golden["gae/lam"])

    def estimate(reward, value, done):
        return generalized_advantages(
            reward, value[:-1], done[1:].astype(np.float32), value[-1], discount, gae_lambda
        )

    advantage, target = estimate(*(golden[f"gae/{x}"] for x in ("rewards", "values", "dones")))
    mask = golden["gae/loss_mask"].astype(np.float32)
    # A chunk's reward is the sum of its steps', and it is done if one of them is.
    chunks = estimate(
        golden["chunk/rewards"].sum(-1),
        golden["chunk/chunk_level/values"][..., 0],
        golden["chunk/dones"].any(-1),
    )
    return {
        "gae/advantages": advantage,
        "gae/returns": target,
        "gae/advantages_norm": normalize_advantages(advantage, jnp.ones_like(advantage)),
        "gae/advantages_norm_masked": normalize_advantages(advantage, mask),
        "chunk/chunk_level/advantages": chunks[0][..., None],
        "chunk/chunk_level/returns": chunks[1][..., None],
    }


def _clip_range(golden) -> tuple[float, float]:
    return float(golden["ppo/clip_ratio_low"]), float(golden["ppo/clip_ratio_high"])


def _actor(golden) -> dict[str, jax.Array]:
    old, advantage, mask = (
        golden[f"actor/flat/{x}"] for x in ("old_logprobs", "advantages", "loss_mask")
    )
    found = {}
    for case, valid in (("asym", mask.astype(np.float32)), ("asym_nomask", np.ones(mask.shape))):

        def loss(log_prob, valid=valid):
            return actor_loss(log_prob, old, advantage, valid, _clip_range(golden))[0]

        value, gradient = jax.value_and_grad(loss)(jnp.asarray(golden["actor/flat/logprobs"]))
        found |= {f"actor/flat/{case}/loss": value, f"actor/flat/{case}/grad_logprobs": gradient}
    return found


def _critic(golden) -> dict[str, jax.Array]:
    target, old, mask = (golden[f"critic/{x}"] for x in ("returns", "prev_values", "loss_mask"))
    found = {}
    for case, delta in CRITIC_CASES.items():
        valid = np.ones(mask.shape) if case == "nomask" else mask.astype(np.float32)

        def loss(value, valid=valid, delta=delta):
            clip, huber = float(golden["ppo/value_clip"]), float(golden[f"ppo/{delta}"])
            return critic_loss(value, old, target, valid, clip, huber)

        value, gradient = jax.value_and_grad(loss)(jnp.asarray(golden["critic/values"]))
        found |= {f"critic/{case}/loss": value, f"critic/{case}/grad_values": gradient}
    return found


def _combined(golden) -> dict[str, jax.Array]:
    """The actor's and the critic's loss of whole chunks: one ratio per chunk."""
    names = ("advantages", "values", "prev_values", "returns", "loss_mask")
    advantage, value, old_value, target, mask = (
        golden[f"entry/chunk_level/{x}"][:, 0].astype(np.float32) for x in names
    )
    old = golden["entry/old_logprobs"].sum((1, 2))

    def loss(log_prob):
        actor, _ = actor_loss(log_prob.sum((1, 2)), old, advantage, mask, _clip_range(golden))
        clip, huber = float(golden["ppo/value_clip"]), float(golden["ppo/huber_delta"])
        return actor + critic_loss(value, old_value, target, mask, clip, huber)

    total, gradient = jax.value_and_grad(loss)(jnp.asarray(golden["entry/logprobs"]))
    return {"entry/chunk_level/loss": total, "entry/chunk_level/grad_logprobs": gradient}
