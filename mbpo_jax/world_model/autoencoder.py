"""Camera images to scaled latents, and back."""

import dataclasses

import jax
import jax.numpy as jnp

from mbpo_jax.nn import navit, vae
from mbpo_jax.shapes import Array, Float, UInt8
from mbpo_jax.types import Params
from mbpo_jax.world_model import perceptual
from mbpo_jax.world_model.config import UMMConfig


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """The VAE (parameters "vae") between images of `image_size` pixels per side and latents."""

    config: UMMConfig
    image_size: int

    def loss(
        self, vae_params: Params, images: UInt8[Array, "B H W 3"], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Reconstruction (absolute + squared error), a small KL to the standard normal, and LPIPS
        where the config weighs it and it is installed.

        Returns:
            The loss and {"vae/l1", "vae/psnr", "vae/kl", "vae/lpips"} (the last only if it counts).
        """
        config = self.config.vae
        pixels = to_pixels(images)
        mean, log_variance = vae.moments(vae_params, config, pixels)
        noise = jax.random.normal(key, mean.shape)
        raw = mean + jnp.exp(0.5 * log_variance) * noise
        error = vae.decode(vae_params, config, vae.scale_latents(config, raw)) - pixels
        l1, l2 = jnp.abs(error).mean(), jnp.square(error).mean()
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
        psnr = -10.0 * jnp.log10(l2 / 4.0)
        loss = l1 + l2 + self.config.kl_weight * kl
        metrics = {"vae/l1": l1, "vae/psnr": psnr, "vae/kl": kl}
        distance = perceptual.lpips() if self.config.lpips_weight else None
        if distance:
            metrics["vae/lpips"] = distance(pixels + error, pixels).mean()
            loss += self.config.lpips_weight * metrics["vae/lpips"]
        return loss, metrics

    def moments(self, params: Params, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B h w zz"]:
        """Mean and log-variance of the posterior, one after the other."""
        pixels = resize(to_pixels(images), self.config.vae_image_size)
        return jnp.concatenate(vae.moments(params["vae"], self.config.vae, pixels), axis=-1)

    def latents(self, moments: Float[Array, "B h w zz"], key: Array) -> Float[Array, "B h w z"]:
        """Scaled posterior samples."""
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        raw = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        return vae.scale_latents(self.config.vae, raw)

    def decode(self, params: Params, tokens: Float[Array, "B n v"]) -> Float[Array, "B H W 3"]:
        """Pixels in about [-1, 1], not clipped, of latent tokens."""
        side = self.config.latent_side
        latents = navit.unpatchify(tokens, side, side, self.config.latent_patch)
        return resize(vae.decode(params["vae"], self.config.vae, latents), self.image_size)


def to_pixels(images: UInt8[Array, "*B"]) -> Float[Array, "*B"]:
    """Bytes as pixels in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(pixels: Float[Array, "*B"]) -> UInt8[Array, "*B"]:
    """Pixels in [-1, 1] as rounded bytes, clipped."""
    return jnp.round(jnp.clip((pixels + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8)


def resize(images: Float[Array, "B H W 3"], size: int) -> Float[Array, "B size size 3"]:
    """Square images of another size, cubic."""
    if images.shape[1:3] == (size, size):
        return images
    return jax.image.resize(images, (images.shape[0], size, size, 3), "cubic")
