"""Timing a training step."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.flops import matmul_flops
from experiments.benchmarks.timing import Run, timed
from mbpo_jax.training.loop import LossFn, Training, TrainState, make_optimizer, train_step
from mbpo_jax.types import Params

# The times do not depend on these numbers.
TRAINING = Training(
    steps=1000,
    learning_rate=1e-4,
    warmup_steps=10,
    weight_decay=1e-10,
    grad_clip=1.0,
    ema_decay=0.99,
    log_every=1,
    checkpoint_every=1,
)


def training_run(loss_fn: LossFn, params: Params, frozen: Params, batch: Any) -> tuple[Run, float]:
    """A run that does one step of `training.loop.fit` after another on the same batch, and the
    floating-point operations of its matrix products. `params` are donated."""
    tx = make_optimizer(TRAINING)
    step, key = train_step(loss_fn, tx, TRAINING.ema_decay), jax.random.key(1)
    state = TrainState(
        params, jax.tree.map(jnp.copy, params), tx.init(params), jnp.zeros((), jnp.int32)
    )
    flops = matmul_flops(step, state, frozen, batch, key)
    jitted = jax.jit(step, donate_argnums=0)

    def advance() -> jax.Array:
        nonlocal state
        state, metrics = jitted(state, frozen, batch, key)
        return metrics["loss"]

    return timed(advance), flops
