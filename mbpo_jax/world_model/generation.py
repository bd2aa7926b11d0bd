"""Generating an image behind a cached prefix: contexts from an interleaved list of texts and
images, sampling times, Euler integration of the (guided) flow."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mbpo_jax.nn.qwen2_mot import Cache, Segment, empty_cache
from mbpo_jax.shapes import Array, Float
from mbpo_jax.world_model import bagel, guidance
from mbpo_jax.world_model.bagel import Params, Tokenizer
from mbpo_jax.world_model.config import UMMConfig
from mbpo_jax.world_model.guidance import Contexts


def sampling_times(num_timesteps: int, shift: float) -> np.ndarray:
    """Decreasing float32 times from 1 to 0; the last is not evaluated."""
    t = np.linspace(1.0, 0.0, num_timesteps)
    return (shift * t / (1 + (shift - 1) * t)).astype(np.float32)


def training_times(normal: Array, shift: float) -> Array:
    """Flow times of standard normal draws: u = sigmoid(draw), t = shift u / (1 + (shift - 1) u)."""
    u = jax.nn.sigmoid(normal)
    return shift * u / (1 + (shift - 1) * u)


def build_contexts(
    params: Params,
    config: UMMConfig,
    segments: Sequence[Segment],
    start: Contexts | None = None,
) -> Contexts:
    """Cache texts ("causal" segments) and condition images ("full" segments), in order.

    Args:
        start: contexts of what came before `segments`; None for nothing.

    Returns:
        The full context; the other two if `config.guidance` needs them. In a list that ends with
        an image nothing is dropped from `text_free`.
    """
    if start is None:
        batch = segments[0].und.shape[0]
        empty = empty_cache(config.mot, batch)
        start = Contexts(empty, empty, empty)
    if config.guidance.text_scale <= 1:
        return Contexts(bagel.extend(params, config, segments, start.full)[0])
    text_last = segments[-1].attention == "causal"
    head = segments[:-1] if text_last else segments
    text_free = bagel.extend(params, config, head, start.full)[0] if head else start.full
    full = bagel.extend(params, config, segments[-1:], text_free)[0] if text_last else text_free
    if config.guidance.image_scale <= 1:
        return Contexts(full, text_free)
    texts = [s for s in segments if s.attention == "causal"]
    image_free = start.image_free
    if texts:
        image_free = bagel.extend(params, config, texts, image_free)[0]
    return Contexts(full, text_free, image_free)


def predict(
    params: Params,
    config: UMMConfig,
    tokenizer: Tokenizer,
    contexts: Sequence[Cache],
    x: Float[Array, "B n v"],
    t: Float[Array, " B"],
    rows: int,
    columns: int,
) -> Float[Array, "B n v"]:
    """The velocity (noise - clean) of noised tokens x at flow time t, of which equal parts of the
    rows are under each of the contexts."""
    segment = bagel.latent_segment(params, config, tokenizer, x, rows, columns, t)
    return bagel.read_latents(params, bagel.forward(params, config, [segment], *contexts)[1])


def guided_velocity(
    params: Params,
    config: UMMConfig,
    tokenizer: Tokenizer,
    contexts: Contexts,
    x: Float[Array, "B n v"],
    t: Array,
    rows: int,
    columns: int,
) -> Float[Array, "B n v"]:
    """`predict` under all contexts present, in one batch, combined by `guidance.combine`.

    t is a scalar; guidance is applied whatever it is. A context that is another one (`text_free`
    behind an image, from which no text was dropped) is evaluated once.
    """
    present = [contexts.full, contexts.text_free, contexts.image_free]
    present = [c for c in present if c is not None]
    distinct = list({id(c): c for c in present}.values())

    tiled = jnp.concatenate([x] * len(distinct), axis=0)
    times = jnp.full((len(distinct) * x.shape[0],), t)
    v = predict(params, config, tokenizer, distinct, tiled, times, rows, columns)
    if len(present) == 1:
        return v
    found = {id(c): part for c, part in zip(distinct, jnp.split(v, len(distinct), axis=0))}
    return guidance.combine(config.guidance, *(found[id(c)] for c in present))


def generate(
    params: Params,
    config: UMMConfig,
    tokenizer: Tokenizer,
    contexts: Contexts,
    noise: Float[Array, "B n v"],
    rows: int,
    columns: int,
) -> Float[Array, "B n v"]:
    """Tokens at t = 0 by Euler steps x <- x - v (t_i - t_{i+1}) from `noise` at t = 1."""
    return trajectory(params, config, tokenizer, contexts, noise, rows, columns)[0]


def trajectory(
    params: Params,
    config: UMMConfig,
    tokenizer: Tokenizer,
    contexts: Contexts,
    noise: Float[Array, "B n v"],
    rows: int,
    columns: int,
) -> tuple[Array, Array, Array]:
    """`generate`, with the states and velocities [steps, B, n, v] of every step.

    The times are static, so steps outside the guidance interval evaluate the full context alone.
    With `config.evaluate_every` above 1 only the first of as many steps evaluates the network; the
    others extrapolate the last two evaluations linearly in t (feature caching as in TaylorSeer,
    arXiv 2503.06923, at the network's output). Extrapolation starts anew where guidance switches.
    """
    times = sampling_times(config.num_timesteps, config.sample_timestep_shift)
    active = [guidance.is_active(config.guidance, t) for t in times[:-1]]
    steps = list(zip(times[:-1], times[:-1] - times[1:], active))
    x, states, velocities = noise, [], []
    for guide, run in itertools.groupby(steps, key=lambda step: step[2]):
        used = contexts if guide else Contexts(contexts.full)

        def evaluate(x, t, used=used):
            return guided_velocity(params, config, tokenizer, used, x, t, rows, columns)

        t, size = (jnp.asarray(column) for column in np.asarray([step[:2] for step in run]).T)
        nothing = (jnp.zeros_like(x), jnp.full((), 2.0)), (jnp.zeros_like(x), jnp.full((), 3.0))
        step = _euler(evaluate, config.evaluate_every)
        (x, *_), (xs, vs) = jax.lax.scan(step, (x, *nothing), (jnp.arange(len(t)), t, size))
        states.append(xs)
        velocities.append(vs)
    return x, jnp.concatenate(states), jnp.concatenate(velocities)


def _euler(evaluate, every):
    """A step of Euler's method for `lax.scan`, of which every `every`-th evaluates the velocity."""

    def step(carry, now):
        x, last, before = carry  # `last`, `before`: (velocity, time) of the last two evaluations
        i, t, size = now

        def fresh():
            v = evaluate(x, t)
            return v, (v, t), last

        def extrapolated():
            slope = (last[0] - before[0]) / (last[1] - before[1])
            two_known = i > every
            return last[0] + jnp.where(two_known, (t - last[1]) * slope, 0.0), last, before

        if every == 1:
            v, last, before = fresh()
        else:
            v, last, before = jax.lax.cond(i % every == 0, fresh, extrapolated)
        return (x - v * size, last, before), (x, v)

    return step
