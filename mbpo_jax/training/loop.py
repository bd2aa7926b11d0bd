"""Supervised training: a state, one jitted step, and a loop that survives a kill."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh
from tqdm import tqdm

from mbpo_jax.training.checkpoints import Checkpoints
from mbpo_jax.training.metrics import MetricWriter
from mbpo_jax.training.sharding import parameter_sharding, shard_batch
from mbpo_jax.types import Array, Params

LossFn = Callable[[Params, Params, Any, Array], tuple[Array, dict[str, Array]]]


@struct.dataclass
class TrainState:
    """Trained parameters, their exponential moving average, the optimiser's state, steps done."""

    params: Params
    ema: Params
    opt_state: Any
    step: Array


def make_optimizer(
    *,
    learning_rate: float,
    warmup_steps: int,
    steps: int,
    weight_decay: float,
    grad_clip: float,
    trainable: Params | None = None,
) -> optax.GradientTransformation:
    """AdamW with linear warm-up, cosine decay to 5 % of the peak, and global-norm clipping.

    Where the tree of bools `trainable` is False there is no optimiser state and no weight decay;
    the gradient is expected to be zero there.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps, max(steps, warmup_steps + 1), 0.05 * learning_rate
    )
    adamw = optax.adamw(schedule, b2=0.98, weight_decay=weight_decay)
    if trainable is not None:
        adamw = optax.masked(adamw, trainable)
    return optax.chain(optax.clip_by_global_norm(grad_clip), adamw)


def train_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, ema_decay: float
) -> Callable[[TrainState, Params, Any, Array], tuple[TrainState, dict[str, Array]]]:
    """The pure step `(state, frozen, batch, key) -> (state, metrics)`.

    The average starts as the parameters themselves and its decay grows as (1 + step) / (10 + step)
    up to `ema_decay`, so that short runs are not dominated by the initialisation.
    """

    def step(state: TrainState, frozen, batch, key):
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, frozen, batch, key
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        # In this form the average of a frozen parameter is that parameter, bit for bit.
        ema = jax.tree.map(lambda a, b: a + (1 - decay) * (b - a), state.ema, params)
        metrics = metrics | {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(params, ema, opt_state, state.step + 1), metrics

    return step


def fit(
    loss_fn: LossFn,
    params: Params,
    frozen: Params,
    batches: Callable[[int], Iterator[Any]],
    *,
    directory: Path,
    mesh: Mesh,
    seed: int,
    name: str,
    steps: int,
    learning_rate: float,
    warmup_steps: int,
    weight_decay: float,
    grad_clip: float,
    ema_decay: float,
    log_every: int,
    checkpoint_every: int,
    trainable: Params | None = None,
    loggers: Sequence[str] = ("tensorboard",),
) -> Params:
    """Trains `params` for `steps` steps and returns their exponential moving average.

    Step i uses the i-th batch and the key `fold_in(key(seed), i)`; therefore a run that is killed
    and started again in the same `directory` continues from its last checkpoint and ends with
    the same parameters.

    Args:
        loss_fn: `(params, frozen, batch, key) -> (scalar loss, metrics)`.
        frozen: arrays the loss needs that are not trained, e.g. a pretrained autoencoder's.
        batches: `batches(i)` yields the host batches of steps i, i + 1, ...
        directory: receives `checkpoints/` and the metrics.
        name: what the progress bar says.
        trainable: tree of bools like `params`, False where the loss stops the gradient.
        loggers: of the metrics, beside their file (`training.metrics.LOGGERS`).

    Raises:
        FloatingPointError: when the loss is not finite; earlier checkpoints are kept.
    """
    tx = make_optimizer(
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        steps=steps,
        weight_decay=weight_decay,
        grad_clip=grad_clip,
        trainable=trainable,
    )
    # The jitted step donates its state, so the average needs a buffer of its own.
    state = TrainState(
        params, jax.tree.map(jnp.copy, params), tx.init(params), jnp.zeros((), jnp.int32)
    )
    state = jax.device_put(state, parameter_sharding(state, mesh))
    frozen = jax.device_put(frozen, parameter_sharding(frozen, mesh))
    step_fn = jax.jit(train_step(loss_fn, tx, ema_decay), donate_argnums=0)
    checkpoints = Checkpoints(Path(directory) / "checkpoints")
    if checkpoints.latest_step() is not None:
        state = checkpoints.restore(state)
    first = int(state.step)
    base_key = jax.random.key(seed)
    pending: list[dict[str, Array]] = []
    with MetricWriter(directory, first + 1, loggers) as writer:
        stream = batches(first)
        for i in (bar := tqdm(range(first, steps), desc=name, initial=first, total=steps)):
            batch = shard_batch(next(stream), mesh)
            state, metrics = step_fn(state, frozen, batch, jax.random.fold_in(base_key, i))
            pending.append(metrics)
            done = i + 1
            if done % log_every == 0 or done == steps:
                means = _mean_metrics(pending)
                pending = []
                if not np.isfinite(means["loss"]):
                    raise FloatingPointError(
                        f"{name}: the loss is {means['loss']} at step {done}; the last checkpoint "
                        f"in {directory} is intact. Lower the learning rate or look at the data."
                    )
                writer.write(done, means)
                bar.set_postfix(loss=f"{means['loss']:.4f}")
            if done % checkpoint_every == 0 or done == steps:
                checkpoints.save(done, state)
                pending = []
    checkpoints.close()
    return state.ema


def _mean_metrics(pending: list[dict[str, Array]]) -> dict[str, float]:
    host = jax.device_get(pending)
    return {k: float(np.mean([m[k] for m in host])) for k in host[0]}
