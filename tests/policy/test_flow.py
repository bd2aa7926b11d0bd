import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mbpo_jax.nn.layers import dense, linear
from mbpo_jax.policy import flow
from mbpo_jax.policy.config import FlowConfig

MODES = jnp.array([[2.0, 2.0], [-2.0, 2.0], [-2.0, -2.0], [2.0, -2.0]])
MODE_STD = 0.3


def mixture_velocity(x, times):
    """Exact velocity E[ε − a | x_t] of a mixture of equal Gaussians at MODES; x [B, M, 1, 2]."""
    t = times[..., None, None, None]
    offset = x[..., None, :] - (1 - t) * MODES
    variance = ((1 - t) * MODE_STD) ** 2 + t**2
    weight = jax.nn.softmax(-jnp.square(offset).sum(-1) / (2 * variance[..., 0]), axis=-1)
    clean = MODES + (1 - t) * MODE_STD**2 / variance * offset
    velocity = (weight[..., None] * (t / variance * offset - clean)).sum(-2)
    return velocity, x


def energy_distance_test(a, b, rng, resamples=200):
    """Energy distance of two samples [n, 2] and the 97.5 % quantile of it under resampling."""
    pooled = np.concatenate([a, b])
    distance = np.linalg.norm(pooled[:, None] - pooled[None], axis=-1)
    n = len(a)

    def energy(order):
        x, y = order[:n], order[n:]
        cross = distance[np.ix_(x, y)].mean()
        return 2 * cross - distance[np.ix_(x, x)].mean() - distance[np.ix_(y, y)].mean()

    null = [energy(rng.permutation(2 * n)) for _ in range(resamples)]
    return energy(np.arange(2 * n)), np.quantile(null, 0.975)


def test_sigma_by_hand():
    """N = 3, a = 0.5: t = 1, 2/3, 1/3; σ² / a² = 1 / (1 − 2/3), (2/3) / (1/3), (1/3) / (2/3)."""
    np.testing.assert_allclose(flow.schedule(3), [1, 2 / 3, 1 / 3, 0], atol=1e-7)
    np.testing.assert_allclose(
        flow.sde_sigma(3, 0.5), [0.5 * 3**0.5, 0.5 * 2**0.5, 0.5 * 0.5**0.5], rtol=1e-6
    )


def test_sde_step_by_hand():
    """x = 1, v = 2, i = 1 of N = 3, a = 0.5: Δ = 1/3, t = 2/3, σ² = 1/2, x̂_1 = 1 + 2/3 = 5/3;
    mean = 1 − 2/3 − (1/2)(1/3) / (4/3) · 5/3 = 1/3 − 5/24 = 1/8, std² = 1/6."""
    mean, std = flow.sde_step(jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), 2.0), jnp.array([1]), 3, 0.5)
    np.testing.assert_allclose(mean, [[[0.125]]], atol=1e-6)
    np.testing.assert_allclose(std, [[[6**-0.5]]], rtol=1e-6)


def test_interpolation_and_times():
    x, target = flow.interpolate(
        jnp.full((1, 1, 1), 2.0), jnp.full((1, 1, 1), 6.0), jnp.array([0.25])
    )
    np.testing.assert_allclose([x.item(), target.item()], [3.0, 4.0], rtol=1e-6)
    times = flow.sample_times(jax.random.key(0), (20_000,))
    # Beta(1.5, 1): mean 0.6, variance 1.5 / (2.5² · 3.5).
    np.testing.assert_allclose(times.mean(), 0.001 + 0.999 * 0.6, atol=0.006)
    np.testing.assert_allclose(times.var(), 1.5 / (2.5**2 * 3.5), atol=0.002)
    assert times.min() >= 0.001
    assert times.max() <= 1.0


def test_learned_std_stays_in_its_range():
    config = FlowConfig(method="noise", learned_noise=True, noise_std_range=(0.05, 0.2))
    layers = flow.init_noise_network(jax.random.key(0), 6, 3, config)
    features = 50 * jax.random.normal(jax.random.key(1), (200, 6))
    std = flow.learned_std(layers, features, config.noise_std_range)
    assert std.shape == (200, 3)
    assert 0.05 * (1 - 1e-5) <= std.min() < 0.1
    assert 0.1 < std.max() <= 0.2 * (1 + 1e-5)


@pytest.mark.trains
def test_sde_marginals_match_the_ode():
    noise = jax.random.normal(jax.random.key(0), (2, 500, 1, 2))
    config = FlowConfig(steps=50, noise_level=0.5)
    reference = flow.sample_ode(mixture_velocity, noise[0], 50)[:, 0]
    sampled, chain, _ = flow.sample_sde(mixture_velocity, noise[1], jax.random.key(1), config)
    rng = np.random.default_rng(0)
    distance, bound = energy_distance_test(np.asarray(reference), np.asarray(sampled[:, 0]), rng)
    assert distance < bound
    assert set(np.asarray(chain.step).tolist()) > set(range(0, 50, 10))
    # The same test rejects noise that is added at every step without the SDE's drift correction.
    config = FlowConfig(method="noise", steps=50)
    wrong, _, _ = flow.sample_noise(
        mixture_velocity, lambda x: jnp.full((), 0.6), noise[1], jax.random.key(1), config
    )
    distance, bound = energy_distance_test(np.asarray(reference), np.asarray(wrong[:, 0]), rng)
    assert distance > bound


@pytest.mark.trains
def test_flow_matching_fits_a_mixture():
    """The training loss and the sampler together recover a 2-D mixture of four modes."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = [dense(keys[0], 2 + 16, 96), dense(keys[1], 96, 96), dense(keys[2], 96, 2)]
    frequencies = jnp.arange(8) * jnp.pi

    def velocity(params, x, times):
        angle = times[..., None] * frequencies
        time = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)[..., None, :]
        hidden = jnp.concatenate([x, jnp.broadcast_to(time, (*x.shape[:-1], 16))], -1)
        for weights in params[:-1]:
            hidden = jax.nn.silu(linear(weights, hidden))
        return linear(params[-1], hidden), hidden

    def loss(params, key):
        mode_key, data_key, time_key, noise_key = jax.random.split(key, 4)
        modes = MODES[jax.random.randint(mode_key, (256,), 0, 4)]
        clean = (modes + MODE_STD * jax.random.normal(data_key, modes.shape))[:, None]
        noise = jax.random.normal(noise_key, clean.shape)
        times = flow.sample_times(time_key, (256,))
        x, target = flow.interpolate(clean, noise, times)
        return jnp.square(velocity(params, x, times)[0] - target).mean()

    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, 1500))

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, key), state)
            return (optax.apply_updates(params, updates), state), None

        steps = jax.random.split(keys[3], 1500)
        return jax.lax.scan(step, (params, optimizer.init(params)), steps)[0][0]

    params = train(params)
    noise = jax.random.normal(jax.random.key(9), (1000, 1, 2))
    samples = flow.sample_ode(lambda x, t: velocity(params, x, t), noise, 20)[:, 0]
    distance = jnp.linalg.norm(samples[:, None] - MODES, axis=-1)
    share = np.bincount(np.asarray(distance.argmin(-1)), minlength=4) / 1000
    assert share.min() > 0.18
    assert (np.asarray(distance.min(-1)) < 4 * MODE_STD).mean() > 0.95


def test_unknown_number_of_steps_is_refused():
    with pytest.raises(ValueError, match=r"flow\.steps"):
        FlowConfig(steps=1)


def test_matching_log_prob_by_hand():
    """a = 2, ε = 6: the target is 4 everywhere. Predicted 3 at the first time and 6 at the second:
    errors 1 and 4, mean 2.5."""
    chain = flow.MatchingChain(
        jnp.full((1, 1, 1), 2.0), jnp.array([[0.25, 0.75]]), jnp.full((1, 2, 1, 1), 6.0)
    )

    def velocity(x, times):
        np.testing.assert_allclose(x[0, :, 0, 0], [3.0, 5.0])  # t·6 + (1 − t)·2
        return jnp.array([3.0, 6.0]).reshape(1, 2, 1, 1), x

    np.testing.assert_allclose(flow.matching_log_prob(velocity, chain), [[[-2.5]]], atol=1e-6)


def test_matching_samples_as_the_deterministic_flow_does():
    config = FlowConfig(method="matching", steps=4, matching_pairs=3)
    noise = jax.random.normal(jax.random.key(0), (5, 1, 2))
    x, chain, log_prob = flow.sample_matching(mixture_velocity, noise, jax.random.key(1), config)
    np.testing.assert_allclose(x, flow.sample_ode(mixture_velocity, noise, 4), atol=1e-6)
    assert (chain.times.shape, log_prob.shape) == ((5, 3), (5, 1, 2))
    np.testing.assert_array_equal(log_prob, flow.matching_log_prob(mixture_velocity, chain))


def test_modes_are_orthogonal_with_mean_square_one():
    basis = flow.mode_basis(3, 10)
    np.testing.assert_allclose(basis @ basis.T / 10, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(flow.mode_basis(2, 2), [[1, 1], [1, -1]], atol=1e-6)


def test_smooth_noise_by_hand():
    """A flow that keeps its noise: the chunk differs from it by 1 and 3 in the first dimension, so
    its constant mode by 2 and the other by (1 - 3) / 2 = -1; with deviation 2 the quadratic terms
    are -1/2 and -1/8."""
    config = FlowConfig(method="smooth", steps=2, noise_std=2.0, smooth_modes=2)

    def still(x, times):
        return jnp.zeros_like(x), x

    noise = jax.random.normal(jax.random.key(0), (1, 2, 1))
    chunk = noise + jnp.array([1.0, 3.0])[None, :, None]
    modes = jnp.einsum("mk,bkd->bmd", flow.mode_basis(2, 2), chunk) / 2
    chain = flow.SmoothChain(noise, modes)
    constant = -np.log(2) - 0.5 * np.log(2 * np.pi)
    expected = [[[constant - 0.5], [constant - 0.125]]]
    np.testing.assert_allclose(flow.smooth_log_prob(still, chain, config), expected, atol=1e-6)


def test_smooth_samples_lie_around_the_deterministic_flow():
    config = FlowConfig(method="smooth", steps=4, noise_std=0.3)
    noise = jax.random.normal(jax.random.key(0), (2000, 5, 2))
    x, chain, log_prob = flow.sample_smooth(mixture_velocity, noise, jax.random.key(1), config)
    moved = np.asarray(x - flow.sample_ode(mixture_velocity, noise, 4))
    np.testing.assert_allclose(moved - moved[:, :1], 0, atol=1e-5)  # the same at every step
    assert abs(moved[:, 0].std() - 0.3) < 0.015
    assert log_prob.shape == (2000, 1, 2)
    again = flow.smooth_log_prob(mixture_velocity, chain, config)
    np.testing.assert_allclose(again, log_prob, atol=1e-5)
