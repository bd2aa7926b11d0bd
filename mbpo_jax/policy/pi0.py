"""The policy: a flow-matching distribution over action chunks in the robot's units."""

import dataclasses
from collections.abc import Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mbpo_jax.nn.normalization import NormStats, normalize, unnormalize
from mbpo_jax.policy import augment, critic, flow, inputs, lora, network
from mbpo_jax.policy.config import FlowConfig, Pi0Config
from mbpo_jax.policy.network import Prefix
from mbpo_jax.types import ActionSample, Array, Observation, Params


class FlowPolicy:
    """The policy in the robot's units; implements `mbpo_jax.types.Policy`.

    Parameters are {"actor": the network in openpi's tree, "critic": its value function}. Every
    method is pure and takes one batch axis.

    Args:
        action_stats: statistics of the actions; their length is the robot's action dimension A.
        proprio_stats: statistics of proprioception (read by π0 only).
        cameras: names in the order of the image tokens; the head camera first.
        action_limits: (low, high) of each action dimension in the robot's units, to which every
            chunk is clipped (`Embodiment.action_limits`).

    Raises:
        ValueError: actions or proprioception have more dimensions than `config.action_dim`, or
            there are not as many limits as actions.
    """

    def __init__(
        self,
        config: Pi0Config,
        action_stats: NormStats,
        proprio_stats: NormStats,
        cameras: tuple[str, ...],
        action_limits: Sequence[tuple[float, float]],
    ):
        self.config = config
        self.action_stats = action_stats
        self.proprio_stats = proprio_stats
        self.cameras = tuple(cameras)
        self.env_action_dim = len(action_stats.mean)
        self.action_limits = np.asarray(action_limits, np.float32)
        if self.action_limits.shape != (self.env_action_dim, 2):
            raise ValueError(
                f"the action has {self.env_action_dim} dimensions, action_limits have shape "
                f"{self.action_limits.shape}: give the (low, high) of each dimension"
            )
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
        actor_key, noise_key, lora_key, critic_key = jax.random.split(key, 4)
        actor = network.init(actor_key, self.config)
        if self._learns_noise:
            actor["noise_network"] = flow.init_noise_network(
                noise_key, self.config.expert.width, self.config.action_dim, self.config.flow
            )
        if self.config.lora.rank:
            actor["lora"] = lora.init(lora_key, actor, self.config.lora)
        features = self.config.language.width
        return {"actor": actor, "critic": critic.init(critic_key, features, self.config.critic)}

    def with_flow(self, config: FlowConfig) -> "FlowPolicy":
        """The same policy as another distribution over chunks; it takes the same parameters."""
        config = dataclasses.replace(self.config, flow=config)
        return FlowPolicy(
            config, self.action_stats, self.proprio_stats, self.cameras, self.action_limits
        )

    def for_inference(self, params: Params) -> Params:
        """The same policy, faster wherever no gradient is computed: every method takes these
        parameters and gives the same result."""
        actor = network.for_inference(self._network(params["actor"]), self.config)
        return {**params, "actor": actor}

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
        """A stochastic chunk, in the way that `config.flow.method` says."""
        actor, config = params["actor"], self.config.flow
        start_key, key = jax.random.split(key)
        noise = self._noise(start_key, prefix)
        velocity_at, at = self._velocity(actor, prefix), self._at_times(actor)
        if config.method == "sde":
            x, chain, log_prob = flow.sample_sde(velocity_at, noise, key, config, at)
        elif config.method == "matching":
            x, chain, log_prob = flow.sample_matching(velocity_at, noise, key, config, at)
        elif config.method == "smooth":
            x, chain, log_prob = flow.sample_smooth(velocity_at, noise, key, config, at)
        else:
            x, chain, log_prob = flow.sample_noise(
                velocity_at, self._std(actor), noise, key, config, at
            )
        return ActionSample(self._to_robot(x), chain, self._sum(log_prob))

    def log_prob(self, params: Params, prefix: Prefix, chain) -> jax.Array:
        """Log-probability [B] of a stored chain, over the robot's action dimensions."""
        actor, config = params["actor"], self.config.flow
        velocity_at, at = self._velocity(actor, prefix), self._at_times(actor)
        if config.method == "sde":
            return self._sum(flow.sde_log_prob(velocity_at, chain, config, at))
        if config.method == "matching":
            return self._sum(flow.matching_log_prob(velocity_at, chain, at))
        if config.method == "smooth":
            return self._sum(flow.smooth_log_prob(velocity_at, chain, config, at))
        return self._sum(flow.noise_log_prob(velocity_at, self._std(actor), chain, config, at))

    def values(self, params: Params, prefix: Prefix) -> jax.Array:
        """Values of every ensemble member, [E, B]; no gradient reaches the actor."""
        return critic.apply(params["critic"], prefix.features)

    def value(self, params: Params, prefix: Prefix) -> jax.Array:
        """The ensemble's minimum, [B]."""
        return self.values(params, prefix).min(axis=0)

    def loss(
        self,
        actor: Params,
        observation: Observation,
        actions: Array,
        key: jax.Array,
        quality: Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Flow-matching loss of expert chunks: |v(x_t, t) − (ε − a)|², mean over all entries
        (π0, arXiv 2410.24164, equation 1).

        Args:
            actor: `params["actor"]`.
            actions: float32 [B, k, A], robot's units.
            quality: [B], how good each chunk is, from 0 to 1 (`inputs.with_quality`); for an
                advantage-conditioned policy. All are the best if it is None.

        The prefix is computed once and serves `config.times_per_example` flow times.
        """
        times_per_example = self.config.times_per_example
        time_key, noise_key, augment_key, shown_key = jax.random.split(key, 4)
        shown = jax.random.bernoulli(
            shown_key, 1 - self.config.condition_dropout, (len(observation.prompt.tokens),)
        )
        prefix = self._encode(
            actor,
            observation,
            with_features=False,
            augment_key=augment_key if self.config.augment else None,
            quality=quality,
            shown=shown,
        )
        clean = self._to_model(actions)[:, None]
        times = flow.sample_times(time_key, (clean.shape[0], times_per_example))
        noise = jax.random.normal(noise_key, (*times.shape, *clean.shape[2:]))
        x, target = flow.interpolate(clean, noise, times)
        predicted, _ = self._velocity(actor, prefix)(x, self._at_times(actor)(times))
        error = jnp.square(predicted - target)
        real = error[..., : self.env_action_dim].mean()
        return error.mean(), {"loss": error.mean(), "velocity_error": real}

    def act(
        self,
        params: Params,
        observation: Observation,
        key: jax.Array | None,
        quality: Array | None = None,
    ) -> jax.Array:
        """Actions [B, k, A] for evaluation: random initial noise (without a key none), then the
        deterministic flow in `config.eval_steps` Euler steps. `quality` is what an
        advantage-conditioned policy is asked for, as in `loss`."""
        actor = params["actor"]
        prefix = self._encode(actor, observation, with_features=False, quality=quality)
        velocity = self._velocity(actor, prefix)
        if self.config.advantage_conditioned and self.config.guidance != 1:
            hidden = jnp.zeros(prefix.cache.mask.shape[0], bool)
            free = self._encode(actor, observation, with_features=False, shown=hidden)
            velocity = flow.guided(velocity, self._velocity(actor, free), self.config.guidance)
        noise = self._noise(key, prefix)
        x = flow.sample_ode(velocity, noise, self.config.eval_steps, self._at_times(actor))
        return self._to_robot(x)

    def trainable(self, params: Params) -> Params:
        """The tree of `params` with False where `config.frozen` forbids training."""
        return {
            "actor": lora.trainable(params["actor"], self.config.frozen),
            "critic": jax.tree.map(lambda _: True, params["critic"]),
        }

    @property
    def _learns_noise(self) -> bool:
        return self.config.flow.method == "noise" and self.config.flow.learned_noise

    def _network(self, actor: Params) -> dict:
        """The plain network of an actor: frozen weights cut off, adapters merged."""
        return lora.merge(lora.stop_frozen(actor, self.config.frozen), self.config.lora)

    def _encode(
        self,
        actor: Params,
        observation: Observation,
        camera_mask: Mapping[str, Array] | None = None,
        with_features: bool = True,
        augment_key: jax.Array | None = None,
        quality: Array | None = None,
        shown: Array | None = None,
    ) -> Prefix:
        self.check(observation)
        images = inputs.images(observation, self.config, self.cameras)
        if augment_key is not None:
            still = tuple(name not in self.config.wrist_cameras for name in self.cameras)
            images = augment.augment(images, augment_key, still)
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
        if self.config.advantage_conditioned:
            quality = jnp.ones(batch) if quality is None else jnp.asarray(quality, jnp.float32)
            shown = jnp.ones(batch, bool) if shown is None else shown
            prompt = inputs.with_quality(prompt, self.config, quality, shown)
        return network.encode(
            self._network(actor), self.config, images, image_mask, prompt, state, with_features
        )

    def _velocity(self, actor: Params, prefix: Prefix) -> flow.VelocityFunction:
        return network.velocity(self._network(actor), self.config, prefix)

    def _at_times(self, actor: Params) -> flow.TimeFunction:
        weights = self._network(actor)
        return lambda times: network.at_times(weights, self.config, times)

    def _std(self, actor: Params):
        config = self.config.flow
        if not self._learns_noise:
            return lambda features: jnp.asarray(config.noise_std)
        return lambda features: flow.learned_std(
            actor["noise_network"], features, config.noise_std_range
        )

    def _noise(self, key: jax.Array | None, prefix: Prefix) -> jax.Array:
        shape = prefix.cache.mask.shape[0], self.config.chunk, self.config.action_dim
        return jnp.zeros(shape) if key is None else jax.random.normal(key, shape)

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
        chex.assert_shape(x, (None, self.config.chunk, self.config.action_dim))
        x = x[..., : self.env_action_dim]
        x = unnormalize(x, self.action_stats, self.config.normalization)
        return jnp.clip(x, *self.action_limits.T)
