"""π0.5 and π0: a flow-matching distribution over action chunks given images and an instruction.

π0.5 (arXiv 2504.16054), π0 (arXiv 2410.24164). `prefix_tokens`, `encode` and `velocity` are the
network in its own units; `FlowPolicy` speaks the robot's units and implements
`mbpo_jax.types.Policy`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct

from mbpo_jax.models import gemma, siglip
from mbpo_jax.models.layers import dense, linear
from mbpo_jax.models.normalization import NormStats, normalize, unnormalize
from mbpo_jax.policy import critic, flow, inputs
from mbpo_jax.policy.config import Pi0Config
from mbpo_jax.types import ActionSample, Array, Observation, Params, Prompt

TIME_PERIODS = (4e-3, 4.0)  # shortest and longest period of the time embedding's waves


@struct.dataclass
class Prefix:
    """An encoded observation.

    cache: the language model's keys and values, which the expert attends to.
    features: its mean hidden state over real tokens, float32 [B, D], which the critic reads; None
        if it was not asked for.
    state: padded proprioception [B, action_dim] for π0, None for π0.5.
    """

    cache: gemma.KVCache
    features: jax.Array | None
    state: jax.Array | None


def init(key: jax.Array, config: Pi0Config) -> dict:
    """Random float32 parameters of the network, in openpi's tree."""
    keys = jax.random.split(key, 8)
    width = config.expert.width
    tree = {
        "PaliGemma": {
            "img": siglip.init(keys[0], config.vision, config.language.width),
            "llm": gemma.init(
                keys[1], config.vocab_size, config.language, config.expert, config.pi05
            ),
        },
        "action_in_proj": dense(keys[2], config.action_dim, width),
        "action_out_proj": dense(keys[3], width, config.action_dim),
    }
    if config.pi05:
        tree["time_mlp_in"] = dense(keys[4], width, width)
        tree["time_mlp_out"] = dense(keys[5], width, width)
    else:
        tree["state_proj"] = dense(keys[4], config.action_dim, width)
        tree["action_time_mlp_in"] = dense(keys[5], 2 * width, width)
        tree["action_time_mlp_out"] = dense(keys[6], width, width)
    return tree


def prefix_tokens(
    actor: dict, config: Pi0Config, images: jax.Array, image_mask: jax.Array, prompt: Prompt
) -> tuple[jax.Array, jax.Array]:
    """Image tokens, camera by camera, then prompt tokens.

    Args:
        images: float32 [B, V, image_size, image_size, 3] in [-1, 1].
        image_mask: bool [B, V]; the tokens of a False camera are ignored by everything.

    Returns:
        Tokens [B, S, D] in the compute dtype and which of them are real, bool [B, S].
    """
    dtype = jnp.dtype(config.dtype)
    batch, views = images.shape[:2]
    flat = images.reshape(batch * views, *images.shape[2:])
    seen = siglip.encode(actor["PaliGemma"]["img"], config.vision, flat, dtype, config.layer_loop)
    seen = seen.reshape(batch, views * seen.shape[1], -1)
    words = gemma.embed(actor["PaliGemma"]["llm"], prompt.tokens).astype(dtype)
    image_mask = jnp.repeat(image_mask, config.vision.num_tokens, axis=1)
    mask = jnp.concatenate([image_mask, prompt.mask], axis=1)
    return jnp.concatenate([seen, words], axis=1), mask


def encode(
    actor: dict,
    config: Pi0Config,
    images: jax.Array,
    image_mask: jax.Array,
    prompt: Prompt,
    state: jax.Array | None,
    with_features: bool = True,
) -> Prefix:
    """The prefix of a batch of observations in the network's units; `state` [B, action_dim].

    Without features the last layer's attention and MLP are left out: actions do not depend on them.
    """
    tokens, mask = prefix_tokens(actor, config, images, image_mask, prompt)
    hidden, cache = gemma.encode_prefix(
        actor["PaliGemma"]["llm"], tokens, mask, config.layer_loop, not with_features
    )
    features = None
    if with_features:
        weight = mask[..., None].astype(jnp.float32)
        features = (hidden * weight).sum(1) / weight.sum(1)
    return Prefix(cache, features, state)


def time_embedding(times: jax.Array, width: int) -> jax.Array:
    """Sine-cosine features of flow times: float32 [*B] -> [*B, width], sines first."""
    shortest, longest = TIME_PERIODS
    fraction = jnp.linspace(0.0, 1.0, width // 2)
    period = shortest * (longest / shortest) ** fraction
    angle = times[..., None] * (1.0 / period * 2 * jnp.pi)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def time_condition(actor: dict, times: jax.Array, width: int) -> jax.Array:
    """What modulates π0.5's norms: [*B] -> [*B, width]."""
    hidden = jax.nn.silu(linear(actor["time_mlp_in"], time_embedding(times, width)))
    return jax.nn.silu(linear(actor["time_mlp_out"], hidden))


def velocity(
    actor: dict, config: Pi0Config, prefix: Prefix, x: jax.Array, times: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Velocity of M noisy chunks per prefix.

    Args:
        x: float32 [B, M, k, action_dim].
        times: float32 [B, M].

    Returns:
        Velocity float32 [B, M, k, action_dim] and the expert's last hidden states, float32
        [B, M, k, W].
    """
    dtype, width = jnp.dtype(config.dtype), config.expert.width
    steps = x.shape[2]
    tokens = linear(actor["action_in_proj"], x)
    attend = jnp.ones((steps, steps), bool)
    if config.pi05:
        condition = time_condition(actor, times, width)
    else:
        condition = None
        time = jnp.broadcast_to(time_embedding(times, width)[..., None, :], tokens.shape)
        hidden = linear(actor["action_time_mlp_in"], jnp.concatenate([tokens, time], axis=-1))
        tokens = linear(actor["action_time_mlp_out"], jax.nn.silu(hidden))
        state = linear(actor["state_proj"], prefix.state)[:, None, None]
        state = jnp.broadcast_to(state, (*x.shape[:2], 1, width))
        tokens = jnp.concatenate([state, tokens], axis=2)
        # The state token sees the prefix and itself, never the noisy actions.
        attend = jnp.pad(attend, ((1, 0), (1, 0)), constant_values=True).at[0, 1:].set(False)
    hidden = gemma.denoise(
        actor["PaliGemma"]["llm"],
        tokens.astype(dtype),
        prefix.cache,
        condition,
        attend,
        config.layer_loop,
    )
    features = hidden[:, :, -steps:].astype(jnp.float32)
    return linear(actor["action_out_proj"], features), features


class FlowPolicy:
    """The policy in the robot's units; implements `mbpo_jax.types.Policy`.

    Parameters are {"actor": the network in openpi's tree, "critic": its value function}. Every
    method is pure and takes one batch axis.

    Args:
        action_stats: statistics of the actions; their length is the robot's action dimension A.
        proprio_stats: statistics of proprioception (read by π0 only).
        cameras: names in the order of the image tokens; the head camera first.

    Raises:
        ValueError: actions or proprioception have more dimensions than `config.action_dim`.
    """

    def __init__(
        self,
        config: Pi0Config,
        action_stats: NormStats,
        proprio_stats: NormStats,
        cameras: tuple[str, ...],
    ):
        self.config = config
        self.action_stats = action_stats
        self.proprio_stats = proprio_stats
        self.cameras = tuple(cameras)
        self.env_action_dim = len(action_stats.mean)
        sizes = {"the action": self.env_action_dim}
        if config.use_proprio:
            sizes["proprioception"] = len(proprio_stats.mean)
        for name, size in sizes.items():
            if size > config.action_dim:
                raise ValueError(
                    f"{name} has {size} dimensions, the policy is padded to action_dim="
                    f"{config.action_dim}: choose a config with action_dim >= {size}"
                )

    def init(self, key: jax.Array) -> Params:
        """Random parameters {"actor", "critic"}, float32."""
        actor_key, noise_key, critic_key = jax.random.split(key, 3)
        actor = init(actor_key, self.config)
        if self._learns_noise:
            actor["noise_network"] = flow.init_noise_network(
                noise_key, self.config.expert.width, self.config.action_dim, self.config.flow
            )
        features = self.config.language.width
        return {"actor": actor, "critic": critic.init(critic_key, features, self.config.critic)}

    def check(self, observation: Observation) -> None:
        """Raises a ValueError that names the field that the policy cannot read.

        Under `jit` values are unknown and only shapes are checked: call it on the host.
        """
        inputs.check(observation, self.config, self.cameras)

    def encode(
        self,
        params: Params,
        observation: Observation,
        camera_mask: Mapping[str, Array] | None = None,
    ) -> Prefix:
        """The prefix. `camera_mask`: camera -> bool [B], False where that view must be ignored."""
        return self._encode(params["actor"], observation, camera_mask)

    def sample(self, params: Params, prefix: Prefix, key: jax.Array) -> ActionSample:
        """A stochastic chunk by Flow-SDE or Flow-Noise (`config.flow.method`)."""
        actor, config = params["actor"], self.config.flow
        start_key, key = jax.random.split(key)
        noise = self._noise(start_key, prefix)
        velocity_at = self._velocity(actor, prefix)
        if config.method == "sde":
            x, chain, log_prob = flow.sample_sde(velocity_at, noise, key, config)
        else:
            x, chain, log_prob = flow.sample_noise(
                velocity_at, self._std(actor), noise, key, config
            )
        return ActionSample(self._to_robot(x), chain, self._sum(log_prob))

    def log_prob(self, params: Params, prefix: Prefix, chain) -> jax.Array:
        """Log-probability [B] of a stored chain, over the robot's action dimensions."""
        actor, config = params["actor"], self.config.flow
        velocity_at = self._velocity(actor, prefix)
        if config.method == "sde":
            return self._sum(flow.sde_log_prob(velocity_at, chain, config))
        return self._sum(flow.noise_log_prob(velocity_at, self._std(actor), chain, config))

    def values(self, params: Params, prefix: Prefix) -> jax.Array:
        """Values of every ensemble member, [E, B]; no gradient reaches the actor."""
        return critic.apply(params["critic"], prefix.features)

    def value(self, params: Params, prefix: Prefix) -> jax.Array:
        """The ensemble's minimum, [B]."""
        return self.values(params, prefix).min(axis=0)

    def loss(
        self, actor: Params, observation: Observation, actions: Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Flow-matching loss of expert chunks: |v(x_t, t) − (ε − a)|², mean over all entries
        (π0, arXiv 2410.24164, equation 1).

        Args:
            actor: `params["actor"]`.
            actions: float32 [B, k, A], robot's units.

        The prefix is computed once and serves `config.times_per_example` flow times.
        """
        times_per_example = self.config.times_per_example
        prefix = self._encode(actor, observation, with_features=False)
        clean = self._to_model(actions)[:, None]
        time_key, noise_key = jax.random.split(key)
        times = flow.sample_times(time_key, (clean.shape[0], times_per_example))
        noise = jax.random.normal(noise_key, (*times.shape, *clean.shape[2:]))
        x, target = flow.interpolate(clean, noise, times)
        predicted, _ = velocity(actor, self.config, prefix, x, times)
        error = jnp.square(predicted - target)
        real = error[..., : self.env_action_dim].mean()
        return error.mean(), {"loss": error.mean(), "velocity_error": real}

    def act(self, params: Params, observation: Observation, key: jax.Array) -> jax.Array:
        """Actions [B, k, A] for evaluation: random initial noise, then the deterministic flow in
        `config.eval_steps` Euler steps."""
        actor = params["actor"]
        prefix = self._encode(actor, observation, with_features=False)
        noise = self._noise(key, prefix)
        x = flow.sample_ode(self._velocity(actor, prefix), noise, self.config.eval_steps)
        return self._to_robot(x)

    @property
    def _learns_noise(self) -> bool:
        return self.config.flow.method == "noise" and self.config.flow.learned_noise

    def _encode(self, actor, observation, camera_mask=None, with_features=True) -> Prefix:
        self.check(observation)
        images = inputs.images(observation, self.config, self.cameras)
        batch, views = images.shape[:2]
        image_mask = jnp.ones((batch, views), bool)
        if camera_mask is not None:
            image_mask = jnp.stack([camera_mask[camera] for camera in self.cameras], axis=1)
        state = None
        if not self.config.pi05:
            state = jnp.zeros((batch, self.config.action_dim))
            if self.config.use_proprio:
                state = normalize(
                    jnp.asarray(observation.proprio), self.proprio_stats, self.config.normalization
                )
                state = inputs.pad(state, self.config.action_dim, "observation.proprio")
        prompt = inputs.prompt(observation, self.config)
        return encode(actor, self.config, images, image_mask, prompt, state, with_features)

    def _velocity(self, actor: Params, prefix: Prefix) -> flow.VelocityFunction:
        return lambda x, times: velocity(actor, self.config, prefix, x, times)

    def _std(self, actor: Params):
        config = self.config.flow
        if not self._learns_noise:
            return lambda features: jnp.asarray(config.noise_std)
        return lambda features: flow.learned_std(
            actor["noise_network"], features, config.noise_std_range
        )

    def _noise(self, key: jax.Array, prefix: Prefix) -> jax.Array:
        batch = prefix.cache.mask.shape[0]
        return jax.random.normal(key, (batch, self.config.chunk, self.config.action_dim))

    def _sum(self, log_prob: jax.Array) -> jax.Array:
        """[B, ..., k, action_dim] -> [B], without the padded dimensions."""
        real = log_prob[..., : self.env_action_dim]
        return real.sum(tuple(range(1, real.ndim)))

    def _to_model(self, actions: Array) -> jax.Array:
        actions = jnp.asarray(actions)
        if actions.shape[-2:] != (self.config.chunk, self.env_action_dim):
            raise ValueError(
                f"actions have shape {actions.shape}: expected [B, {self.config.chunk}, "
                f"{self.env_action_dim}]"
            )
        actions = normalize(actions, self.action_stats, self.config.normalization)
        return inputs.pad(actions, self.config.action_dim, "actions")

    def _to_robot(self, x: jax.Array) -> jax.Array:
        x = x[..., : self.env_action_dim]
        x = unnormalize(x, self.action_stats, self.config.normalization)
        return jnp.clip(x, -1.0, 1.0)
