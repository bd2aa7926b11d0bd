"""UMM-World: frame-skip dynamics with interleaved view decoding, and reward decoding, in one
unified multimodal model (VLA-MBPO, arXiv 2603.20607, section 4).

The first view at t+k is generated from all current views and the actions; every later view from its
own current frame and the views already generated for t+k, without the actions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mbpo_jax.nn import navit, qwen2_mot, vae
from mbpo_jax.nn.qwen2_mot import Segment
from mbpo_jax.shapes import Array, Float
from mbpo_jax.types import Observation, Params, Prompt, RewardExample, Transition, WorldState
from mbpo_jax.world_model import bagel, generation
from mbpo_jax.world_model.actions import ActionText
from mbpo_jax.world_model.autoencoder import Autoencoder, resize, to_pixels, to_uint8
from mbpo_jax.world_model.bagel import Tokenizer
from mbpo_jax.world_model.config import UMMConfig, check_config
from mbpo_jax.world_model.frames import Frame, check_views, flatten, restore
from mbpo_jax.world_model.guidance import Contexts
from mbpo_jax.world_model.statistics import neutral_statistics, proprio_statistics

Moments = Mapping[str, Array]  # per camera, what `Autoencoder.moments` gives


class UMMWorld:
    """Implements `WorldModel`; every method is a pure function of its arguments.

    Args:
        cameras: views in decoding order, head view first.
        image_size: pixels per side of the observations' (square) images.
        action_dim, chunk: shape [chunk, action_dim] of the actions of one prediction.
        action_limits: (low, high) of each action dimension in the robot's units, which the model
            sees as -1 and 1; by default actions are in [-1, 1].

    Raises:
        ValueError: the configuration, the tokenizer and the image sizes do not fit together.
    """

    def __init__(
        self,
        config: UMMConfig,
        cameras: Sequence[str],
        image_size: int,
        action_dim: int,
        chunk: int,
        tokenizer: Tokenizer,
        action_limits: Sequence[tuple[float, float]] | None = None,
    ):
        check_config(config, tokenizer.vocab_size)
        self.config, self.cameras, self.tokenizer = config, tuple(cameras), tokenizer
        self.image_size, self.action_dim, self.chunk = image_size, action_dim, chunk
        self.autoencoder = Autoencoder(config, image_size)
        limits = np.asarray(action_limits or [(-1.0, 1.0)] * action_dim, np.float32)
        self.action_centre, self.action_scale = limits.mean(axis=1), np.ptp(limits, axis=1) / 2
        self.yes_id, self.no_id = (_answer_id(tokenizer, word) for word in ("Yes", "No"))
        self.question = [tokenizer.bos_id, *tokenizer.encode(config.question), tokenizer.eos_id]
        if config.actions_as == "text":
            self.action_text = ActionText(tokenizer, chunk, action_dim)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Top-level keys of the parameters that dynamics and reward training leave alone."""
        keys = ("vae", "position_tables", "statistics")
        return (*keys, "vit") if self.config.freeze_vit else keys

    def init(self, key: Array) -> Params:
        """Fresh parameters {"mot", "vit", "adapters", "position_tables", "vae", "statistics"}."""
        model_key, vae_key = jax.random.split(key)
        params = bagel.init(self.config, self.action_dim, model_key)
        params["vae"] = vae.init(self.config.vae, vae_key)
        params["statistics"] = neutral_statistics(self.config, self.cameras, self.action_dim)
        return params

    def measured(self, transitions: Transition) -> Params:
        """The statistics of these transitions [N], for a model that is trained on them from
        scratch; what a released model has stays as it is."""
        return proprio_statistics(self.config, transitions)

    def for_inference(self, params: Params) -> Params:
        """The same model in less memory: the transformers' matrices in the dtype of their products,
        which convert them anyway, so that no output changes."""

        def matrices(tree, dtype):
            def one(path, x):
                is_matrix = path[-1].key in ("kernel", "embedding")
                return x.astype(dtype) if is_matrix else x

            return jax.tree_util.tree_map_with_path(one, tree)

        dtypes = {"mot": self.config.mot.dtype, "vit": self.config.vit.dtype}
        return {**params} | {name: matrices(params[name], d) for name, d in dtypes.items()}

    # Imagination

    def precompute(self, params: Params, observation: Observation, key: Array) -> dict[str, Array]:
        """Per view its clean latent tokens [*B, n, v].

        Raises:
            ValueError: a view is missing, or an image has another shape.
        """
        self._check(observation)
        batch, (observation,) = flatten(observation)
        return restore(self._tokens(params, observation.images, key), batch)

    def encode(
        self, params: Params, observation: Observation, key: Array, precomputed: Any = None
    ) -> WorldState:
        """The state that imagination starts from; its memory is a `Frame` of each view.

        A step gives its frames on to the next one: latents go through the autoencoder's encoder
        here and never again.

        Args:
            precomputed: what `precompute` gave for this observation, where it was called before.

        Raises:
            ValueError: a view is missing, or an image has another shape.
        """
        self._check(observation)
        if precomputed is None:
            precomputed = self.precompute(params, observation, key)
        batch, (observation, tokens) = flatten(observation, precomputed)
        frames = self._frames(params, observation.images, tokens, self._featured)
        return restore(WorldState(observation, frames), batch)

    def step(self, params: Params, state: WorldState, actions: Array, key: Array) -> WorldState:
        """The state k environment steps later: every view, and proprioception if
        `config.proprio_dim` says so (otherwise it stays as it is).

        Args:
            actions: float32 [*B, k, A], clipped to their limits.

        Raises:
            ValueError: the chunk has another shape.
        """
        self._check(state.observation, actions)
        batch, (state, actions) = flatten(state, actions)
        observation = state.observation
        frames = {c: self.seen(params, state.memory[c]) for c in self.cameras}
        prefix = [self._prompt(params, observation)]
        cached = generation.build_contexts(params, self.config, prefix)
        action = self._action(params, actions)

        proprio = observation.proprio
        done: dict[str, Frame] = {}
        for i, camera in enumerate(self.cameras):
            conditions = self._conditions(params, camera, frames, done, action)
            contexts = generation.build_contexts(params, self.config, conditions, cached)
            if i == 0 and self.config.proprio_dim:
                query = [self._proprio_query(params, proprio)]
                hidden, _ = bagel.forward(params, self.config, query, contexts.full)
                proprio = self._next_proprio(params, proprio, hidden)
            noise = jax.random.normal(jax.random.fold_in(key, i), frames[camera].tokens.shape)
            tokens = self.view_tokens(params, [*prefix, *conditions], contexts, noise)
            pixels = self.autoencoder.decode(params, tokens)
            done[camera] = self._finish(params, camera, pixels, tokens)
        images = {c: to_uint8(done[c].pixels) for c in self.cameras}
        observation = observation.replace(images=images, proprio=proprio)
        return restore(WorldState(observation, done), batch)

    def view_tokens(
        self,
        params: Params,
        segments: Sequence[Segment],
        contexts: Contexts,
        noise: Float[Array, "B n v"],
    ) -> Float[Array, "B n v"]:
        """Sampled tokens of one view behind `contexts`, which hold `segments`."""
        del segments  # for subclasses that build contexts in another order
        side = self.config.latent_side
        return generation.generate(params, self.config, self.tokenizer, contexts, noise, side, side)

    def success_probability(self, params: Params, state: WorldState) -> Float[Array, "*B"]:
        """P(Yes) [*B] that the task is done, from the first view, in one forward pass."""
        batch, (state,) = flatten(state)
        features = state.memory[self.cameras[0]].features
        logits = self._answer_logits(params, features, state.observation)
        pair = logits[:, jnp.asarray([self.yes_id, self.no_id])]
        return restore(jax.nn.softmax(pair, axis=-1)[:, 0], batch)

    # Losses

    def dynamics_loss(
        self,
        params: Params,
        transition: Transition,
        key: Array,
        moments: tuple[Moments, Moments] | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Flow-matching loss of every view's stage, conditioned on true frames, averaged, and the
        squared error of predicted proprioception where the config asks for it.

        Args:
            moments: `Autoencoder.moments` of the current and of the next images, where they were
                computed before: the autoencoder is frozen.

        Returns:
            The loss and {"dynamics/<camera>", "dynamics/proprio": its parts}.

        Raises:
            ValueError: a view is missing, or an image or the chunk has another shape.
        """
        self._check(transition.observation, transition.actions)
        self._check(transition.observation.replace(images=transition.next_images))
        _, (transition, moments) = flatten(transition, moments)
        observation = transition.observation
        now, later = moments or (None, None)
        keys = jax.random.split(key, 2 + len(self.cameras))
        images, next_images = observation.images, transition.next_images
        tokens = self._tokens(params, images, keys[0], now)
        next_tokens = self._tokens(params, next_images, keys[1], later)
        frames = self._frames(params, images, tokens, self.cameras)
        following = self._frames(params, next_images, next_tokens, self.cameras[:-1])
        prompt, action = self._prompt(params, observation), self._action(params, transition.actions)

        metrics, done = {}, {}
        for camera, camera_key in zip(self.cameras, keys[2:]):
            conditions = self._conditions(params, camera, frames, done, action)
            target = following[camera]
            query = []
            if camera == self.cameras[0] and self.config.proprio_dim:
                query = [self._proprio_query(params, observation.proprio)]
            loss, hidden = self._stage_loss(
                params, [prompt, *conditions], target, query, camera_key
            )
            metrics[f"dynamics/{camera}"] = loss
            if query:
                goal = transition.next_proprio - observation.proprio
                goal = goal / params["statistics"]["proprio"]["change"]
                error = bagel.read_proprio(params, hidden[:, -1]) - goal
                metrics["dynamics/proprio"] = jnp.mean(jnp.square(error))
            done[camera] = target
        return sum(metrics.values()) / len(metrics), metrics

    def _stage_loss(self, params, context, target, query, key):
        """Loss of one view, and the understanding tokens' hidden states: the last are those of
        `query`, which sees the context and no target."""
        config, count = self.config, self.config.targets_per_example
        clean = jax.lax.stop_gradient(target.tokens)
        time_key, noise_key = jax.random.split(key)
        draws = jax.random.normal(time_key, (count, clean.shape[0]))
        times = generation.training_times(draws, config.train_timestep_shift)
        noise = jax.random.normal(noise_key, (count, *clean.shape))
        t = times[..., None, None]
        noised = (1 - t) * clean + t * noise
        segments = [self._latent_segment(params, x, t) for x, t in zip(noised, times)]
        und, hidden = bagel.forward(params, config, [*context, *segments, *query])
        output = bagel.read_latents(params, hidden[:, -count * clean.shape[1] :])
        output = jnp.moveaxis(output.reshape(clean.shape[0], count, *clean.shape[1:]), 1, 0)
        return jnp.mean(jnp.square(output - (noise - clean))), und

    def reward_loss(self, params: Params, example: RewardExample) -> tuple[Array, dict[str, Array]]:
        """Cross-entropy of the answer token "Yes" or "No", over the whole vocabulary.

        Returns:
            The loss and {"reward/ce", "reward/accuracy"}.
        """
        self._check(example.observation)
        _, (example,) = flatten(example)
        features = self.first_view_features(params, example.observation)
        logits = self._answer_logits(params, features, example.observation)
        is_yes = example.label > 0.5
        answer = jnp.where(is_yes, self.yes_id, self.no_id)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, answer).mean()
        correct = (logits[:, self.yes_id] > logits[:, self.no_id]) == is_yes
        return loss, {"reward/ce": loss, "reward/accuracy": correct.mean()}

    # Sequences

    def _conditions(self, params, camera, frames, done, action):
        """Segments that `camera` at t+k is conditioned on, after the prompt."""
        if camera == self.cameras[0] or not self.config.interleaved:
            seen, texts = frames.values(), [action]
        else:
            seen, texts = [frames[camera], *done.values()], []
        return [s for frame in seen for s in self._condition(params, frame)] + texts

    def _condition(self, params, frame):
        picture = self._picture(params, frame.features)
        return [self._latent_segment(params, frame.tokens), picture]

    def _latent_segment(self, params, tokens, t=None):
        side = self.config.latent_side
        return bagel.latent_segment(params, self.config, self.tokenizer, tokens, side, side, t)

    def _picture(self, params, features):
        side = self.config.vit_image_size // self.config.vit.patch_size
        return bagel.vit_segment(params, self.config, self.tokenizer, features, side, side)

    def _prompt(self, params, observation):
        prompt: Prompt = observation.world_prompt
        return bagel.text_segment(params, self.config, prompt.tokens, prompt.mask)

    def _action(self, params, actions):
        actions = jnp.clip((actions - self.action_centre) / self.action_scale, -1.0, 1.0)
        if self.config.actions_as == "text":
            return bagel.text_segment(params, self.config, *self.action_text(actions))
        return bagel.action_segment(params, self.config, self.tokenizer, actions)

    def _proprio_query(self, params, proprio):
        stats = params["statistics"]["proprio"]
        standard = (proprio - stats["mean"]) / stats["std"]
        return bagel.proprio_segment(params, self.config, standard)

    def _next_proprio(self, params, proprio, hidden):
        """What the last of the `hidden` states, that of `_proprio_query`, says of a chunk later."""
        change = bagel.read_proprio(params, hidden[:, -1])
        return proprio + params["statistics"]["proprio"]["change"] * change

    def first_view_features(
        self, params: Params, observation: Observation
    ) -> Float[Array, "B m F"]:
        """ViT features of the view that rewards are read from."""
        return self._features(params, to_pixels(observation.images[self.cameras[0]]))

    def answer_segments(
        self, params: Params, features: Float[Array, "B m F"], observation: Observation
    ) -> list[Segment]:
        """What the answer "Yes" or "No" follows: the first view, the instruction, the question and
        the bos that starts the answer."""
        ids = jnp.asarray([*self.question, self.tokenizer.bos_id])
        ids = jnp.broadcast_to(ids, (features.shape[0], len(ids)))
        picture, prompt = self._picture(params, features), self._prompt(params, observation)
        return [picture, prompt, bagel.text_segment(params, self.config, ids)]

    def _answer_logits(self, params, features, observation):
        segments = self.answer_segments(params, features, observation)
        hidden, _ = bagel.forward(params, self.config, segments)
        return qwen2_mot.logits(params["mot"], hidden[:, -1])

    # Frames

    @property
    def _featured(self):
        """Cameras whose frames always have ViT features: those that a later view or the reward is
        decoded from."""
        return self.cameras[:-1] or self.cameras

    def seen(self, params: Params, frame: Frame) -> Frame:
        """The frame with ViT features, which are computed if it has none."""
        if frame.features is not None:
            return frame
        return frame.replace(features=self._features(params, frame.pixels))

    def _tokens(self, params, images, key, moments=None):
        """Clean latent tokens of all views, encoded in one batch."""

        def stacked(views):
            return jnp.concatenate([views[c] for c in self.cameras])

        pooled = stacked(moments) if moments else self.autoencoder.moments(params, stacked(images))
        latents = jax.lax.stop_gradient(self.autoencoder.latents(pooled, key))
        tokens = navit.patchify(latents, self.config.latent_patch)
        return dict(zip(self.cameras, jnp.split(tokens, len(self.cameras))))

    def _frames(self, params, images, tokens, with_features):
        """Frames of all views, with ViT features, computed in one batch, for the cameras named."""
        pixels = {c: to_pixels(images[c]) for c in self.cameras}
        features = dict.fromkeys(self.cameras)
        if with_features:
            stacked = jnp.concatenate([pixels[c] for c in with_features])
            parts = jnp.split(self._features(params, stacked), len(with_features))
            features |= dict(zip(with_features, parts))
        return {c: Frame(pixels[c], tokens[c], features[c]) for c in self.cameras}

    def _finish(self, params, camera, pixels, tokens=None):
        """The imagined frame of a view, with ViT features if it is among `_featured`."""
        frame = Frame(jnp.clip(pixels, -1.0, 1.0), tokens, None)
        return self.seen(params, frame) if camera in self._featured else frame

    def _features(self, params, pixels):
        config = self.config
        features = navit.forward(params["vit"], config.vit, resize(pixels, config.vit_image_size))
        return jax.lax.stop_gradient(features) if config.freeze_vit else features

    def _check(self, observation, actions=None):
        check_views(observation.images, self.cameras, self.image_size)
        values = observation.proprio.shape[-1]
        if self.config.proprio_dim not in (0, values):
            raise ValueError(
                f"Proprioception has {values} values, proprio_dim is {self.config.proprio_dim}: "
                "set it to that, or to 0 to hold proprioception fixed in imagination."
            )
        chunk = (self.chunk, self.action_dim)
        if actions is not None and actions.shape[-2:] != chunk:
            raise ValueError(f"The action chunk is {actions.shape[-2:]}, expected {chunk}.")


def _answer_id(tokenizer, word):
    ids = tokenizer.encode(word)
    if len(ids) != 1:
        raise ValueError(f"The tokenizer writes the answer {word!r} as {len(ids)} tokens, not 1.")
    return ids[0]
