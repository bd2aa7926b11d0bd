"""A flow-matching velocity as a distribution over action chunks.

The flow runs from noise at t = 1 to data at t = 0: x_t = t·ε + (1 − t)·a, velocity ε − a.
Integrating the velocity is deterministic and has no tractable density. Two stochastic samplers
have one (πRL, arXiv 2510.25889): *Flow-SDE* replaces one Euler step, drawn at random for each
chunk, by a Gaussian step with (in the limit of small steps) the same marginals; *Flow-Noise* adds
Gaussian noise to every step and uses the joint density of the whole chain. *Matching* keeps the
deterministic sampler, and the flow-matching loss of a chunk, at times and noises that are stored
with it, stands for its negative log-probability (FPO, arXiv 2507.21053): so all that made a chunk
what it is has a part in the gradient, its initial noise too, which the other two give no credit.
*Smooth* adds to the deterministic sampler's chunk one Gaussian draw for each of a few slow modes in
time (a cosine basis; the first is a constant): noise that differs from step to step averages out
within a chunk, noise that does not moves the arm. The density is that of the chunk's modes around
those of the flow from the same initial noise, and its gradient passes through every denoise step.

A velocity function takes x [B, M, k, D] and times, M states of each example at M times, and gives
the velocity [B, M, k, D] and the features behind it [B, M, k, W]. Times come as `at(t)`, t being
[B, M], or [1, M] where they are the same for all; `at` computes what depends on the time alone,
leading axes first, and samplers call it once for all steps. By default it is t itself.
Log-probabilities here are elementwise, [B, ..., k, D]; whoever knows which dimensions are real sums
them.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mbpo_jax.nn.layers import dense, linear
from mbpo_jax.policy.config import FlowConfig

TimeFunction = Callable[[jax.Array], Any]
VelocityFunction = Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]


@struct.dataclass
class SdeChain:
    """The one stochastic step of a Flow-SDE chunk: state before it [B, k, D], state after it
    [B, k, D], and which step it was, int32 [B]."""

    state: jax.Array
    next_state: jax.Array
    step: jax.Array


@struct.dataclass
class NoiseChain:
    """Every state of a Flow-Noise chunk, [B, N + 1, k, D], from pure noise to the actions."""

    states: jax.Array


@struct.dataclass
class MatchingChain:
    """A chunk [B, k, D] and the pairs of times [B, M] and noises [B, M, k, D] at which its
    flow-matching loss is taken."""

    actions: jax.Array
    times: jax.Array
    noise: jax.Array


@struct.dataclass
class SmoothChain:
    """The initial noise [B, k, D] of a chunk and its modes [B, m, D]."""

    noise: jax.Array
    modes: jax.Array


def sample_times(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Training times 0.001 + 0.999·Beta(1.5, 1), which favour noise (π0, arXiv 2410.24164, app. B).

    The distribution function of Beta(1.5, 1) is x^1.5, so it is sampled by inversion.
    """
    return 0.001 + 0.999 * jax.random.uniform(key, shape) ** (1 / 1.5)


def interpolate(actions: jax.Array, noise: jax.Array, times: jax.Array):
    """The point x_t on the straight path and its velocity, both [*B, k, D]; `times` [*B]."""
    t = times[..., None, None]
    return t * noise + (1 - t) * actions, noise - actions


def schedule(steps: int) -> np.ndarray:
    """Times t_0 = 1 > … > t_N = 0, float32 [N + 1]."""
    return (1 - np.arange(steps + 1) / steps).astype(np.float32)


def sde_sigma(steps: int, noise_level: float) -> np.ndarray:
    """Diffusion σ_i = a·sqrt(t_i / (1 − t_i)), float32 [N]; σ_0 takes t_1 in the denominator, where
    the formula would divide by zero (πRL, section 4.2)."""
    t = 1 - np.arange(steps) / steps
    denominator = 1 - np.where(t == 1, 1 - 1 / steps, t)
    return (noise_level * np.sqrt(t / denominator)).astype(np.float32)


def ode_step(x: jax.Array, velocity: jax.Array, steps: int) -> jax.Array:
    """One Euler step of size 1 / `steps`, x and velocity [*B, k, D]."""
    return x - velocity / steps


def sde_step(
    x: jax.Array, velocity: jax.Array, step: jax.Array, steps: int, noise_level: float
) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of a Flow-SDE step.

    mean = x − Δ·v − σ²Δ / (2t)·x̂_1, where x̂_1 = x + (1 − t)·v estimates the noise end, and
    std = σ·sqrt(Δ) (πRL, arXiv 2510.25889, the Flow-SDE transition).

    Args:
        x, velocity: [*B, k, D].
        step: int [*B], the index i of the step.

    Returns:
        Mean [*B, k, D] and deviation [*B, 1, 1].
    """
    delta = 1 / steps
    t = jnp.asarray(schedule(steps))[step][..., None, None]
    sigma = jnp.asarray(sde_sigma(steps, noise_level))[step][..., None, None]
    noise_end = x + (1 - t) * velocity
    mean = x - delta * velocity - jnp.square(sigma) * delta / (2 * t) * noise_end
    return mean, sigma * math.sqrt(delta)


def gaussian_log_prob(x: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Elementwise log N(x; mean, std²)."""
    return -jnp.log(std) - 0.5 * math.log(2 * math.pi) - 0.5 * jnp.square((x - mean) / std)


def init_noise_network(key: jax.Array, width: int, action_dim: int, config: FlowConfig) -> list:
    """Layers of the network that gives Flow-Noise its deviation from the expert's features."""
    sizes = (width, *config.noise_widths, action_dim)
    keys = jax.random.split(key, len(sizes) - 1)
    return [dense(k, fan_in, out) for k, (fan_in, out) in zip(keys, itertools.pairwise(sizes))]


def learned_std(layers: list, features: jax.Array, std_range: tuple[float, float]) -> jax.Array:
    """Deviation [..., D] from features [..., W]: log std² is a tanh-bounded MLP, so that std stays
    within `std_range` (πRL's exploration-noise network)."""
    for weights in layers[:-1]:
        features = jnp.tanh(linear(weights, features))
    unit = 0.5 * (jnp.tanh(linear(layers[-1], features)) + 1)
    low, high = (2 * math.log(bound) for bound in std_range)
    return jnp.exp(0.5 * (low + (high - low) * unit))


def guided(
    conditional: VelocityFunction, unconditional: VelocityFunction, scale: float
) -> VelocityFunction:
    """Classifier-free guidance: v = v_u + scale·(v_c − v_u) (Ho & Salimans, arXiv 2207.12598)."""

    def velocity(x: jax.Array, time: Any) -> tuple[jax.Array, jax.Array]:
        (towards, features), (base, _) = conditional(x, time), unconditional(x, time)
        return base + scale * (towards - base), features

    return velocity


def _itself(times: jax.Array) -> jax.Array:
    return times


def sample_ode(
    velocity: VelocityFunction, noise: jax.Array, steps: int, at: TimeFunction = _itself
) -> jax.Array:
    """Euler integration from `noise` [B, k, D] to data [B, k, D].

    Times are accumulated in float32 as openpi does: the fastest of the time embedding's waves
    makes 250 turns in unit time and would see the difference.
    """
    delta = np.float32(-1 / steps)
    times = np.cumsum([1.0, *[delta] * (steps - 1)], dtype=np.float32)

    def advance(x: jax.Array, time: Any) -> tuple[jax.Array, None]:
        v, _ = _one(velocity, x, _for_all(time))
        return x + delta * v, None

    return jax.lax.scan(advance, noise, at(jnp.asarray(times)))[0]


def sample_sde(
    velocity: VelocityFunction,
    noise: jax.Array,
    key: jax.Array,
    config: FlowConfig,
    at: TimeFunction = _itself,
) -> tuple[jax.Array, SdeChain, jax.Array]:
    """Flow-SDE: actions [B, k, D], chain, log-probability [B, k, D] of its stochastic step."""
    step_key, noise_key = jax.random.split(key)
    chosen = jax.random.randint(step_key, noise.shape[:1], 0, config.steps)
    draw = jax.random.normal(noise_key, noise.shape)
    times = at(jnp.asarray(schedule(config.steps)[:-1]))

    def advance(carry, now):
        x, chain, log_prob = carry
        step, time = now
        v, _ = _one(velocity, x, _for_all(time))
        mean, std = sde_step(x, v, chosen, config.steps, config.noise_level)
        here = (chosen == step)[:, None, None]
        next_x = jnp.where(here, mean + std * draw, ode_step(x, v, config.steps))
        chain = SdeChain(
            jnp.where(here, x, chain.state), jnp.where(here, next_x, chain.next_state), chosen
        )
        log_prob = jnp.where(here, gaussian_log_prob(next_x, mean, std), log_prob)
        return (next_x, chain, log_prob), None

    start = (noise, SdeChain(noise, noise, chosen), jnp.zeros_like(noise))
    (actions, chain, log_prob), _ = jax.lax.scan(advance, start, (jnp.arange(config.steps), times))
    return actions, chain, log_prob


def sde_log_prob(
    velocity: VelocityFunction, chain: SdeChain, config: FlowConfig, at: TimeFunction = _itself
) -> jax.Array:
    """Elementwise log-probability [B, k, D] of a stored Flow-SDE step; one velocity per example."""
    times = jnp.asarray(schedule(config.steps))[chain.step]
    v, _ = _one(velocity, chain.state, at(times[:, None]))
    mean, std = sde_step(chain.state, v, chain.step, config.steps, config.noise_level)
    return gaussian_log_prob(chain.next_state, mean, std)


def sample_noise(
    velocity: VelocityFunction,
    std: Callable[[jax.Array], jax.Array],
    noise: jax.Array,
    key: jax.Array,
    config: FlowConfig,
    at: TimeFunction = _itself,
) -> tuple[jax.Array, NoiseChain, jax.Array]:
    """Flow-Noise: actions [B, k, D], chain, and log-probability [B, N + 1, k, D] of the initial
    noise and of each step. `std` maps features [..., k, W] to deviations that broadcast to
    [..., k, D]."""
    draws = jax.random.normal(key, (config.steps, *noise.shape))
    times = at(jnp.asarray(schedule(config.steps)[:-1]))

    def advance(x, now):
        time, draw = now
        v, features = _one(velocity, x, _for_all(time))
        mean, deviation = ode_step(x, v, config.steps), std(features)
        next_x = mean + deviation * draw
        return next_x, (next_x, gaussian_log_prob(next_x, mean, deviation))

    actions, (states, log_probs) = jax.lax.scan(advance, noise, (times, draws))
    states = jnp.concatenate([noise[None], states]).swapaxes(0, 1)
    initial = gaussian_log_prob(noise, jnp.zeros(()), jnp.ones(()))
    log_probs = jnp.concatenate([initial[None], log_probs]).swapaxes(0, 1)
    return actions, NoiseChain(states), log_probs


def noise_log_prob(
    velocity: VelocityFunction,
    std: Callable[[jax.Array], jax.Array],
    chain: NoiseChain,
    config: FlowConfig,
    at: TimeFunction = _itself,
) -> jax.Array:
    """Log-probability [B, N + 1, k, D] of a stored Flow-Noise chain, all N velocities at once."""
    before, after = chain.states[:, :-1], chain.states[:, 1:]
    v, features = velocity(before, at(jnp.asarray(schedule(config.steps)[:-1])[None]))
    mean = ode_step(before, v, config.steps)
    initial = gaussian_log_prob(chain.states[:, :1], jnp.zeros(()), jnp.ones(()))
    return jnp.concatenate([initial, gaussian_log_prob(after, mean, std(features))], axis=1)


def sample_matching(
    velocity: VelocityFunction,
    noise: jax.Array,
    key: jax.Array,
    config: FlowConfig,
    at: TimeFunction = _itself,
) -> tuple[jax.Array, MatchingChain, jax.Array]:
    """The deterministic sampler's chunk [B, k, D] with pairs drawn as in training, and
    `matching_log_prob` [B, k, D]."""
    actions = sample_ode(velocity, noise, config.steps, at)
    time_key, noise_key = jax.random.split(key)
    times = sample_times(time_key, (len(noise), config.matching_pairs))
    draws = jax.random.normal(noise_key, (*times.shape, *noise.shape[1:]))
    chain = MatchingChain(actions, times, draws)
    return actions, chain, matching_log_prob(velocity, chain, at)


def matching_log_prob(
    velocity: VelocityFunction, chain: MatchingChain, at: TimeFunction = _itself
) -> jax.Array:
    """Minus the flow-matching loss [B, k, D] of a chunk, averaged over its pairs: up to a constant
    a weighted bound of its log-probability (FPO, arXiv 2507.21053, section 4)."""
    x, target = interpolate(chain.actions[:, None], chain.noise, chain.times)
    predicted, _ = velocity(x, at(chain.times))
    return -jnp.square(predicted - target).mean(axis=1)


def mode_basis(modes: int, chunk: int) -> np.ndarray:
    """Cosines over the steps of a chunk, float32 [m, k], orthogonal, each with mean square 1."""
    phase = np.pi * np.arange(modes)[:, None] * (np.arange(chunk) + 0.5) / chunk
    scale = np.where(np.arange(modes) == 0, 1.0, math.sqrt(2))
    return (scale[:, None] * np.cos(phase)).astype(np.float32)


def _modes(x: jax.Array, config: FlowConfig) -> jax.Array:
    """[B, k, D] -> [B, m, D]."""
    steps = x.shape[1]
    return jnp.einsum("mk,bkd->bmd", mode_basis(config.smooth_modes, steps) / steps, x)


def sample_smooth(
    velocity: VelocityFunction,
    noise: jax.Array,
    key: jax.Array,
    config: FlowConfig,
    at: TimeFunction = _itself,
) -> tuple[jax.Array, SmoothChain, jax.Array]:
    """The deterministic sampler's chunk plus smooth noise of deviation `config.noise_std` in every
    mode: [B, k, D], its chain, and `smooth_log_prob` [B, m, D]."""
    x = sample_ode(velocity, noise, config.steps, at)
    mean = _modes(x, config)
    draw = config.noise_std * jax.random.normal(key, mean.shape)
    x = x + jnp.einsum("mk,bmd->bkd", mode_basis(config.smooth_modes, x.shape[1]), draw)
    chain = SmoothChain(noise, mean + draw)
    return x, chain, gaussian_log_prob(chain.modes, mean, jnp.asarray(config.noise_std))


def smooth_log_prob(
    velocity: VelocityFunction, chain: SmoothChain, config: FlowConfig, at: TimeFunction = _itself
) -> jax.Array:
    """Elementwise log-probability [B, m, D] of a chunk's modes."""
    mean = _modes(sample_ode(velocity, chain.noise, config.steps, at), config)
    return gaussian_log_prob(chain.modes, mean, jnp.asarray(config.noise_std))


def _for_all(time: Any) -> Any:
    """One time for one state of every example: leading axes [1, 1]."""
    return jax.tree.map(lambda y: y[None, None], time)


def _one(velocity: VelocityFunction, x: jax.Array, time: Any) -> tuple[jax.Array, jax.Array]:
    """The velocity of one state x [B, k, D] per example, [B, k, D], and its features."""
    v, features = velocity(x[:, None], time)
    return v[:, 0], features[:, 0]
