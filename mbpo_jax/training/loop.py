"""Supervised training: a state, one jitted step, and a loop that survives a kill."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh
from jax.tree_util import KeyPath
from tqdm import tqdm

from mbpo_jax.gradients import summed_value_and_grad
from mbpo_jax.training.checkpoints import Checkpoints
from mbpo_jax.training.interruption import Interrupted, deferred
from mbpo_jax.training.metrics import MetricWriter
from mbpo_jax.training.nonfinite import NonFiniteGuard, skip_nonfinite
from mbpo_jax.training.profiling import StepProfiler
from mbpo_jax.training.sharding import Rules, on_mesh, parameter_sharding, shard_batch
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
    matrix_learning_rate: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW with linear warm-up, cosine decay to 5 % of the peak, and global-norm clipping.

    With a `matrix_learning_rate` the matrices inside stacks of layers are instead moved by Muon
    (orthogonalised momentum, arXiv 2502.16982) at that rate, under the same schedule: models that
    train from scratch get there in about two thirds of the steps.

    Where the tree of bools `trainable` is False there is no optimiser state and no weight decay;
    the gradient is expected to be zero there.
    """

    def schedule(peak):
        return optax.warmup_cosine_decay_schedule(
            0.0, peak, warmup_steps, max(steps, warmup_steps + 1), 0.05 * peak
        )

    tx = optax.adamw(schedule(learning_rate), b2=0.98, weight_decay=weight_decay)
    if matrix_learning_rate:
        muon = optax.contrib.muon(
            schedule(matrix_learning_rate),
            weight_decay=weight_decay,
            muon_weight_dimension_numbers=partial(
                jax.tree_util.tree_map_with_path, _matrix_dimensions
            ),
        )
        tx = optax.partition({"matrix": muon, "other": tx}, _layer_matrices)
    if trainable is not None:
        tx = optax.masked(tx, trainable)
    return optax.chain(optax.clip_by_global_norm(grad_clip), tx)


# Input and output axes of the matrices in stacks of layers, by a pattern of their names; what is
# left are more matrices of the same kind (layers, and the two halves of a gate).
_MATRICES = (
    (r"encoderblock/.*/(query|key|value)/kernel$", (-3,), (-2, -1)),
    (r"encoderblock/.*/out/kernel$|attn_vec_einsum(_1)?/w$", (-3, -2), (-1,)),
    (r"(q|kv)_einsum(_1)?/w$", (-2,), (-3, -1)),
    (r"(encoderblock|layers)/.*(kernel|gating_einsum|linear)$", (-2,), (-1,)),
)


def _matrix_dimensions(path: KeyPath, x: Array) -> optax.contrib.MuonDimensionNumbers | None:
    name = "/".join(str(entry.key) for entry in path if hasattr(entry, "key"))
    for pattern, inputs, outputs in _MATRICES:
        if re.search(pattern, name):
            return optax.contrib.MuonDimensionNumbers(
                tuple(x.ndim + axis for axis in inputs), tuple(x.ndim + axis for axis in outputs)
            )
    return None


def _layer_matrices(params: Params) -> Params:
    """Which optimiser moves what: "matrix" for the matrices in stacks of layers, else "other"."""

    def label(path: KeyPath, x: Array) -> str:
        return "other" if _matrix_dimensions(path, x) is None else "matrix"

    return jax.tree_util.tree_map_with_path(label, params)


def initial_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(params, params, tx.init(params), jnp.zeros((), jnp.int32))


def train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    ema_decay: float,
    gradient_accumulation: int = 1,
) -> Callable[[TrainState, Params, Any, Array], tuple[TrainState, dict[str, Array]]]:
    """The pure step `(state, frozen, batch, key) -> (state, metrics)`.

    The average starts as the parameters themselves and its decay grows as (1 + step) / (10 + step)
    up to `ema_decay`, so that short runs are not dominated by the initialisation. With
    `gradient_accumulation` above 1 the gradient is the mean of those of as many slices of the
    batch, computed one after the other, each with a key of its own.
    """
    slices = gradient_accumulation

    def step(state: TrainState, frozen, batch, key):
        def slice_loss(params, rows, index):
            slice_key = jax.random.fold_in(key, index) if slices > 1 else key
            loss, metrics = loss_fn(params, frozen, rows, slice_key)
            return loss / slices, metrics

        (loss, metrics), grads = summed_value_and_grad(slice_loss, slices)(state.params, batch)
        metrics = jax.tree.map(lambda x: x.mean(0), metrics)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        # In this form the average of a frozen parameter is that parameter, bit for bit.
        ema = jax.tree.map(lambda a, b: a + (1 - decay) * (b - a), state.ema, params)
        metrics = metrics | {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(params, ema, opt_state, state.step + 1), metrics

    return step


def jit_step(step: Callable, shardings: TrainState) -> Callable:
    """A `train_step` that skips what is not finite, compiled for a state with these shardings,
    whose buffers it reuses."""
    step = on_mesh(skip_nonfinite(step), shardings.step.mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


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
    keep: int = 1,
    origin: Mapping[str, Any] | None = None,
    profile_steps: Sequence[int] = (),
    trainable: Params | None = None,
    loggers: Sequence[str] = ("tensorboard",),
    rules: Rules = (),
    gradient_accumulation: int = 1,
    matrix_learning_rate: float = 0.0,
) -> Params:
    """Trains `params` for `steps` steps and returns their exponential moving average.

    Step i uses the i-th batch and the key `fold_in(key(seed), i)`; therefore a run that is killed
    and started again in the same `directory` continues from its last checkpoint and ends with
    the same parameters and metrics. A step whose loss or gradient is not finite changes nothing
    and is counted in the metric `skipped`.

    Args:
        loss_fn: `(params, frozen, batch, key) -> (scalar loss, metrics)`.
        frozen: arrays the loss needs that are not trained, e.g. a pretrained autoencoder's.
        batches: `batches(i)` yields the host batches of steps i, i + 1, ...
        directory: receives `checkpoints/` and the metrics.
        name: what the progress bar says.
        keep, origin: of the checkpoints, see `Checkpoints`; the seed is added to the origin.
        profile_steps: see `StepProfiler`.
        trainable: tree of bools like `params`, False where the loss stops the gradient.
        loggers: of the metrics, beside their file (`training.metrics.LOGGERS`).
        rules: how parameters and what belongs to them are split (`parameter_sharding`).
        gradient_accumulation: see `train_step`. matrix_learning_rate: see `make_optimizer`.

    Raises:
        FloatingPointError: three steps in a row were not finite; see `NonFiniteGuard`.
        Interrupted: SIGTERM came; the state is saved.
        OSError: a checkpoint cannot be written; earlier ones are kept.
    """
    tx = make_optimizer(
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        steps=steps,
        weight_decay=weight_decay,
        grad_clip=grad_clip,
        trainable=trainable,
        matrix_learning_rate=matrix_learning_rate,
    )
    # Straight into its shards: a large model's optimiser state does not fit one device.
    make_state = partial(initial_state, tx=tx)
    shardings = parameter_sharding(jax.eval_shape(make_state, params), mesh, rules)
    state = jax.jit(make_state, out_shardings=shardings)(jax.device_put(params, shardings.params))
    frozen = jax.device_put(frozen, parameter_sharding(frozen, mesh, rules))
    step_fn = jit_step(train_step(loss_fn, tx, ema_decay, gradient_accumulation), shardings)
    base_key = jax.random.key(seed)
    with (
        deferred() as asked_to_stop,
        Checkpoints(
            Path(directory) / "checkpoints", {**(origin or {}), "seed": seed}, keep
        ) as checkpoints,
        StepProfiler(directory, profile_steps) as profiler,
    ):
        progress: dict = {"window": [], "skipped_in_a_row": 0}
        if checkpoints.latest_step() is not None:
            state, progress = checkpoints.restore(state)
        first, window = int(state.step), progress["window"]
        guard = NonFiniteGuard(directory, name, progress["skipped_in_a_row"])
        stream = batches(first)
        with MetricWriter(directory, first + 1, loggers) as writer:
            for i in (bar := tqdm(range(first, steps), desc=name, initial=first, total=steps)):
                batch = next(stream)
                profiler.before(i)
                key = jax.random.fold_in(base_key, i)
                state, metrics = step_fn(
                    state, frozen, shard_batch(batch, mesh, gradient_accumulation), key
                )
                profiler.after(i, state)
                guard.add(i, batch, metrics["skipped"])
                window.append(metrics)
                done = i + 1
                if done % log_every == 0 or done == steps:
                    means = _mean_metrics(window)
                    window = []
                    writer.write(done, means)
                    bar.set_postfix(loss=f"{means['loss']:.4f}")
                stop = asked_to_stop(i)
                if done % checkpoint_every == 0 or done == steps or stop:
                    guard.settle()
                    window = _on_host(window)
                    progress = {"window": window, "skipped_in_a_row": guard.in_a_row}
                    checkpoints.save(done, state, progress)
                if stop and done < steps:
                    checkpoints.wait()
                    raise Interrupted(f"{name}: stopped by SIGTERM and saved after step {done}")
    return state.ema


def _on_host(window: list[dict[str, Array]]) -> list[dict[str, float]]:
    return [{k: float(v) for k, v in metrics.items()} for metrics in jax.device_get(window)]


def _mean_metrics(window: list[dict[str, Array]]) -> dict[str, float]:
    """Means over the steps that were not skipped (all, if all were), and how many were."""
    rows = _on_host(window)
    taken = [row for row in rows if not row["skipped"]] or rows
    means = {k: float(np.mean([row[k] for row in taken])) for k in rows[0]}
    return means | {"skipped": sum(row["skipped"] for row in rows)}
