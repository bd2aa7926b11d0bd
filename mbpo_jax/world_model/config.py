"""Sizes and choices of UMM-World, and its named variants."""

import dataclasses

from mbpo_jax.nn.navit import NaViTConfig
from mbpo_jax.nn.qwen2_mot import MoTConfig
from mbpo_jax.nn.vae import VAEConfig


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
    """Classifier-free guidance of an image's velocity by text and by images (BAGEL).

    text_scale: 1 switches guidance off altogether, whatever image_scale is.
    image_scale: 1 leaves the image branch out.
    interval: guidance acts where interval[0] < t <= interval[1].
    renorm: "global", "channel" (of the guided velocity, per token) or "text_channel" (of the
        text-guided velocity, per token, before image guidance).
    renorm_min: lower limit of the rescaling factor; 1 switches renormalisation off.
    """

    text_scale: float = 1.0
    image_scale: float = 1.0
    interval: tuple[float, float] = (0.4, 1.0)
    renorm: str = "text_channel"
    renorm_min: float = 0.0


@dataclasses.dataclass(frozen=True)
class UMMConfig:
    """A unified multimodal world model (BAGEL's structure at any size)."""

    mot: MoTConfig
    vit: NaViTConfig
    vae: VAEConfig | None  # None where views are composed of pixels
    vae_image_size: int  # pixels per side of a picture entering the VAE, or cut into patches
    vit_image_size: int  # pixels per side of a picture entering the ViT
    latent_patch: int  # latents per side of one token; pixels, where views are composed
    max_latent_side: int  # side of the grid that the latent position table indexes
    # "velocity": rectified flow on latents. "composed": no latents; one pass gives the next picture
    # as a mixture of the current one, of that moved, and of new pixels (`composition`), every
    # view's stage reads the actions, and views are trained behind imagined earlier ones, as they
    # are imagined.
    prediction: str = "velocity"
    # Later views are generated from the earlier views at t+k (interleaved view decoding); if False,
    # every view on its own from all current views and the actions.
    interleaved: bool = True
    actions_as: str = "text"  # "text" (`Step i: [...]`) or "embedding" (one token per step)
    augment_shift: int = 0  # "composed": pixels by which training pictures are moved at most
    augment_colour: float = 0.0  # "composed": part by which their colours are changed at most
    # 0: proprioception is held fixed in imagination. Otherwise its values at t+k, this many, are
    # predicted from the current ones, all current views and the actions.
    proprio_dim: int = 0
    targets_per_example: int = 1  # noised targets (independent times) behind one training context
    train_timestep_shift: float = 4.0
    sample_timestep_shift: float = 4.0
    num_timesteps: int = 50  # sampling times including the final 0: one evaluation fewer
    evaluate_every: int = 1  # steps per evaluation; those between extrapolate the velocity
    guidance: GuidanceConfig = GuidanceConfig()
    question: str = "Is the task done?"  # asked after the image and the instruction
    freeze_vit: bool = True
    kl_weight: float = 1e-6  # of the VAE's training loss
    lpips_weight: float = 0.0  # likewise; counts only where the `metrics` extra is installed

    @property
    def latent_side(self) -> int:
        """Latent tokens (or pixel patches) per side of a picture."""
        return self.vae_image_size // self.token_stride

    @property
    def token_size(self) -> int:
        """Values in one latent token (or pixel patch)."""
        return self.latent_patch**2 * (self.vae.z_channels if self.vae else 3)

    @property
    def token_stride(self) -> int:
        """Pixels per side of one token."""
        return self.latent_patch * (self.vae.downsample if self.vae else 1)


def micro() -> UMMConfig:
    """About 3.5 M parameters; trains from scratch on two CPU cores in minutes."""
    return UMMConfig(
        mot=MoTConfig(800, 192, 4, 6, 2, 512, rope_theta=1e4, unroll=True),
        vit=NaViTConfig(96, 2, 4, 192, patch_size=16, max_patches_per_side=4),
        vae=None,
        vae_image_size=64,
        vit_image_size=64,
        latent_patch=8,
        max_latent_side=8,
        prediction="composed",
        actions_as="embedding",
        augment_shift=2,
        augment_colour=0.1,
        proprio_dim=8,
        freeze_vit=False,
    )


def small() -> UMMConfig:
    """About 50 M parameters; trains from scratch on one GPU."""
    return UMMConfig(
        mot=MoTConfig(800, 384, 8, 6, 2, 1536, dtype="bfloat16"),
        vit=NaViTConfig(256, 6, 4, 1024, patch_size=8, max_patches_per_side=16),
        vae=None,
        vae_image_size=128,
        vit_image_size=128,
        latent_patch=8,
        max_latent_side=16,
        prediction="composed",
        actions_as="embedding",
        proprio_dim=8,
        augment_shift=4,
        augment_colour=0.1,
        freeze_vit=False,
    )


def latent() -> UMMConfig:
    """About 2.3 M parameters, with an autoencoder as BAGEL has one: for comparing orders of
    computation on the same work as the public server's."""
    return UMMConfig(
        mot=MoTConfig(800, 128, 3, 4, 2, 256, rope_theta=1e4, unroll=True),
        vit=NaViTConfig(96, 2, 4, 192, patch_size=16, max_patches_per_side=4),
        vae=VAEConfig(64, (1,), 1, 32, norm_groups=8, patch_size=8),
        vae_image_size=64,
        vit_image_size=64,
        latent_patch=2,
        max_latent_side=4,
        actions_as="embedding",
        targets_per_example=2,
        train_timestep_shift=4.0,
        sample_timestep_shift=1.0,
        num_timesteps=2,
        freeze_vit=False,
    )


def latent_small() -> UMMConfig:
    """About 60 M parameters; `latent` at the size of `small`."""
    return UMMConfig(
        mot=MoTConfig(800, 384, 8, 6, 2, 1536, dtype="bfloat16"),
        vit=NaViTConfig(256, 6, 4, 1024, patch_size=8, max_patches_per_side=16),
        vae=VAEConfig(64, (1, 2, 2), 2, 16, patch_size=2),
        vae_image_size=128,
        vit_image_size=128,
        latent_patch=2,
        max_latent_side=8,
        actions_as="embedding",
        targets_per_example=2,
        train_timestep_shift=4.0,
        sample_timestep_shift=1.0,
        num_timesteps=11,
        freeze_vit=False,
        lpips_weight=0.1,
    )


def bagel() -> UMMConfig:
    """BAGEL-7B-MoT (14 B parameters, 7 B active), with the paper's sampler settings."""
    return UMMConfig(
        mot=MoTConfig(152064, 3584, 28, 28, 4, 18944, dtype="bfloat16", remat=True),
        vit=NaViTConfig(1152, 26, 16, 4304, 14, 70, dtype="bfloat16"),
        vae=VAEConfig(128, (1, 2, 4, 4), 2, 16, 0.3611, 0.1159),
        vae_image_size=256,
        vit_image_size=224,
        latent_patch=2,
        max_latent_side=64,
        guidance=GuidanceConfig(text_scale=6.0, image_scale=2.0),
    )


VARIANTS = {
    "micro": micro,
    "small": small,
    "bagel": bagel,
    "latent": latent,
    "latent_small": latent_small,
}


def variant(name: str) -> UMMConfig:
    """The configuration called `name`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in VARIANTS:
        raise ValueError(f"No world model called {name!r}; there are {', '.join(VARIANTS)}.")
    return VARIANTS[name]()


def check_config(config: UMMConfig, vocab_size: int) -> None:
    """Raises ValueError where the entries, or they and a tokenizer of so many tokens, do not fit
    together."""
    if vocab_size > config.mot.vocab_size:
        raise ValueError(
            f"The tokenizer has {vocab_size} tokens, the model's vocab_size is "
            f"{config.mot.vocab_size}: raise the latter."
        )
    choices = {
        "prediction": ("velocity", "composed"),
        "actions_as": ("text", "embedding"),
    }
    for field, values in choices.items():
        if getattr(config, field) not in values:
            raise ValueError(f"{field} is {getattr(config, field)!r}, expected one of {values}.")
    if (config.vae is None) != (config.prediction == "composed"):
        raise ValueError(
            f"prediction is {config.prediction!r} and vae is {config.vae}: views are composed of "
            "pixels without an autoencoder, and otherwise made of its latents."
        )
    if config.evaluate_every < 1:
        raise ValueError(f"evaluate_every is {config.evaluate_every}, expected 1 or more.")
    stride = config.token_stride
    if config.vae_image_size % stride or config.latent_side > config.max_latent_side:
        raise ValueError(
            f"vae_image_size {config.vae_image_size} must be a multiple of {stride} and at most "
            f"{stride * config.max_latent_side}."
        )
    if config.vit_image_size % config.vit.patch_size:
        raise ValueError(
            f"vit_image_size {config.vit_image_size} must be a multiple of the ViT's patch size "
            f"{config.vit.patch_size}."
        )
