"""UMM-World whose views are composed of pixels (`composition`): the form that trains from scratch.

The structure is BAGEL's as in `umm_world`: a Mixture-of-Transformers with one stage per view, each
behind the views already imagined for t+k, and the reward read in one pass. What differs: a view's
own picture enters as pixel patches at the places where its next picture is predicted, the actions
and proprioception stand before every view's stage, and one evaluation gives the next picture.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mbpo_jax.nn import navit
from mbpo_jax.nn.layers import linear
from mbpo_jax.nn.qwen2_mot import Segment, empty_cache
from mbpo_jax.shapes import Array, Float
from mbpo_jax.types import Observation, Params, Transition, WorldState
from mbpo_jax.world_model import bagel, composition
from mbpo_jax.world_model.autoencoder import to_pixels, to_uint8
from mbpo_jax.world_model.frames import Frame, flatten, restore
from mbpo_jax.world_model.statistics import composition_statistics, neutral_statistics
from mbpo_jax.world_model.umm_world import UMMWorld

_PROPRIO_WEIGHT = 0.2  # of proprioception in the loss, beside the views' mean


class ComposedWorld(UMMWorld):
    """`UMMWorld` with `config.prediction == "composed"`."""

    def init(self, key: Array) -> Params:
        """Fresh parameters {"mot", "vit", "adapters", "position_tables", "statistics"}."""
        model_key, views_key = jax.random.split(key)
        params = bagel.init(self.config, self.action_dim, model_key)
        width, patch = self.config.mot.hidden_size, self.config.latent_patch
        params["adapters"]["views"] = composition.init(views_key, self.cameras, patch, width)
        statistics = neutral_statistics(self.config, self.cameras, self.action_dim)
        return {**params, "statistics": statistics}

    def measured(self, transitions: Transition) -> Params:
        """The statistics of these transitions [N]."""
        return composition_statistics(self.config, self.cameras, transitions)

    def precompute(self, params: Params, observation: Observation, key: Array) -> None:
        """None: a picture enters as it is."""
        return None

    def encode(
        self, params: Params, observation: Observation, key: Array, precomputed: Any = None
    ) -> WorldState:
        """The state that imagination starts from; its memory is a `Frame` of each view.

        Raises:
            ValueError: a view is missing, or an image has another shape.
        """
        self._check(observation)
        batch, (observation,) = flatten(observation)
        frames = {c: Frame(to_pixels(observation.images[c]), None, None) for c in self.cameras}
        frames |= {c: self.seen(params, frames[c]) for c in self._featured}  # as after a step
        return restore(WorldState(observation, frames), batch)

    def step(self, params: Params, state: WorldState, actions: Array, key: Array) -> WorldState:
        """The state k environment steps later, as `UMMWorld.step`; nothing in it is random."""
        self._check(state.observation, actions)
        batch, (state, actions) = flatten(state, actions)
        frames, _, proprio = self._advance(params, state.observation, state.memory, actions)
        images = {c: to_uint8(frames[c].pixels) for c in self.cameras}
        observation = state.observation.replace(images=images, proprio=proprio)
        return restore(WorldState(observation, frames), batch)

    def dynamics_loss(
        self, params: Params, transition: Transition, key: Array, moments: None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Squared error of every view's next picture as a share of what a picture changes by (1 is
        copying the last frame), averaged over the views, and of predicted proprioception likewise.

        Later views stand behind the imagined earlier ones, whose gradient they do not reach.

        Returns:
            The loss and {"dynamics/<camera>", "dynamics/proprio": its parts}.

        Raises:
            ValueError: a view is missing, or an image or the chunk has another shape.
        """
        self._check(transition.observation, transition.actions)
        self._check(transition.observation.replace(images=transition.next_images))
        _, (transition,) = flatten(transition)
        config, observation = self.config, transition.observation
        frames, goals = {}, {}
        for i, camera in enumerate(self.cameras):
            pair = [to_pixels(x[camera]) for x in (observation.images, transition.next_images)]
            shift, colour = config.augment_shift, config.augment_colour
            now, later = composition.augment(pair, jax.random.fold_in(key, i), shift, colour)
            frames[camera], goals[camera] = Frame(now, None, None), later
        _, pictures, proprio = self._advance(params, observation, frames, transition.actions)

        statistics = params["statistics"]
        metrics = {
            f"dynamics/{c}": jnp.mean(jnp.square(pictures[c] - goals[c]))
            / statistics["pixel_change"][c] ** 2
            for c in self.cameras
        }
        loss = sum(metrics.values()) / len(metrics)
        if config.proprio_dim:
            error = (proprio - transition.next_proprio) / statistics["proprio"]["change"]
            metrics["dynamics/proprio"] = jnp.mean(jnp.square(error))
            loss += _PROPRIO_WEIGHT * metrics["dynamics/proprio"]
        return loss, metrics

    def _advance(
        self, params: Params, observation: Observation, frames: dict[str, Frame], actions: Array
    ) -> tuple[dict[str, Frame], dict[str, Array], Array]:
        """A chunk later: frames, the pictures behind them before clipping, proprioception."""
        prefix = [self._prompt(params, observation), self._action(params, actions)]
        proprio = observation.proprio
        if self.config.proprio_dim:
            prefix.append(self._proprio_query(params, proprio))
        cache = empty_cache(self.config.mot, len(actions))
        cache, hidden, _ = bagel.extend(params, self.config, prefix, cache)
        if self.config.proprio_dim:
            proprio = self._next_proprio(params, proprio, hidden)

        done: dict[str, Frame] = {}
        pictures = {}
        for camera in self.cameras:
            others = done if done and self.config.interleaved else frames
            conditions = [
                self._picture(params, self.seen(params, frame).features)
                for name, frame in others.items()
                if name != camera
            ]
            current = frames[camera].pixels
            target = self._target(params, camera, current)
            _, hidden = bagel.forward(params, self.config, [*conditions, target], cache)
            out = params["adapters"]["views"][camera]["out"]
            output = linear(out, hidden.astype(jnp.float32))
            pictures[camera] = composition.compose(output, current, self.config.latent_patch)
            done[camera] = self._finish(params, camera, jax.lax.stop_gradient(pictures[camera]))
        return done, pictures, proprio

    def _target(self, params: Params, camera: str, pixels: Float[Array, "B H W 3"]) -> Segment:
        """The patches of a view's current picture, where its next one is read."""
        patches = navit.patchify(pixels, self.config.latent_patch)
        x = linear(params["adapters"]["views"][camera]["in"], patches)
        side = self.config.latent_side
        ids = navit.grid_ids(side, side, self.config.max_latent_side)
        x = x + params["position_tables"]["latent"][ids]
        ends = bagel.markers(params, self.config, self.tokenizer, len(x))
        return Segment(ends, x.astype(self.config.mot.dtype), None, "noise")

    def _action(self, params: Params, actions: Array) -> Segment:
        if self.config.actions_as == "text":
            return super()._action(params, actions)
        stats = params["statistics"]["actions"]
        low, high = self.action_centre - self.action_scale, self.action_centre + self.action_scale
        actions = (jnp.clip(actions, low, high) - stats["mean"]) / stats["std"]
        return bagel.action_segment(params, self.config, self.tokenizer, actions)
