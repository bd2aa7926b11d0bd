"""Sizes and options of the policy, and the named variants."""

import dataclasses

from mbpo_jax.nn.gemma import GemmaConfig
from mbpo_jax.nn.layers import LayerLoop
from mbpo_jax.nn.siglip import SiglipConfig

FLOW_METHODS = ("sde", "noise", "matching", "smooth")


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """The flow as a distribution over chunks, used in policy optimisation."""

    # "sde": one random stochastic step; "noise": every step is Gaussian; "matching": deterministic
    # steps, and the flow-matching loss of the whole chunk stands for its log-probability; "smooth":
    # deterministic steps, then Gaussian noise that varies slowly within the chunk.
    method: str = "sde"
    steps: int = 3  # denoising steps N
    matching_pairs: int = 4  # "matching": (time, noise) pairs at which a chunk's loss is taken
    noise_level: float = 0.5  # a of Flow-SDE
    # Standard deviation of a Flow-Noise step when it is not learned, and of each smooth mode.
    noise_std: float = 0.1
    smooth_modes: int = 1  # "smooth": cosines in time that the noise is made of; 1: a constant
    learned_noise: bool = False  # Flow-Noise: a small network gives the deviation
    noise_std_range: tuple[float, float] = (0.08, 0.16)  # bounds of the learned deviation
    noise_widths: tuple[int, ...] = (128, 64)  # hidden layers of the noise network

    def __post_init__(self):
        if self.method not in FLOW_METHODS:
            raise ValueError(
                f"unknown flow.method {self.method!r}; there are {', '.join(FLOW_METHODS)}"
            )
        if self.smooth_modes < 1:
            raise ValueError(f"flow.smooth_modes is {self.smooth_modes}: use 1 or more")
        if self.matching_pairs < 1:
            raise ValueError(f"flow.matching_pairs is {self.matching_pairs}: use 1 or more")
        if self.steps < 2:
            raise ValueError(f"flow.steps is {self.steps}: at least 2 denoising steps are needed")


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    """The value function on the prefix."""

    widths: tuple[int, ...] = (1024, 512, 256, 128)  # hidden layers
    ensemble: int = 1  # members; `FlowPolicy.value` takes their minimum


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters; `Pi0Config.frozen` says what is frozen beside them."""

    rank: int = 0  # 0: no adapters
    alpha: float = 16.0  # their product is scaled by alpha / rank
    modules: tuple[str, ...] = ("PaliGemma/llm/layers/(attn|mlp)",)  # patterns of weight paths


@dataclasses.dataclass(frozen=True)
class Pi0Config:
    """π0.5, or π0 with `pi05=False`, at any size."""

    vision: SiglipConfig
    language: GemmaConfig
    expert: GemmaConfig
    vocab_size: int
    max_prompt_tokens: int  # longest prompt that is accepted
    action_dim: int  # actions and proprioception are zero-padded to this many dimensions
    chunk: int = 10  # environment steps k in an action chunk
    pi05: bool = True  # False: π0 (state token, time in the tokens, no adaptive norms)
    use_proprio: bool = False  # π0 only: the state token carries proprioception (else zeros)
    normalization: str = "quantile"  # of actions and proprioception: "quantile" or "zscore"
    flow: FlowConfig = FlowConfig()
    critic: CriticConfig = CriticConfig()
    lora: LoraConfig = LoraConfig()
    frozen: tuple[str, ...] = ()  # patterns of paths of parameters that are not trained
    augment: bool = False  # random crop, rotation and colour of the frames in the SFT loss
    wrist_cameras: tuple[str, ...] = ()  # never cropped or rotated
    advantage_conditioned: bool = False  # a token of a chunk's quality ends the prompt (π*0.6)
    quality_levels: int = 2  # that the token tells apart; 2: bad and good
    condition_dropout: float = 0.3  # share of SFT examples that do not see that token
    guidance: float = 1.0  # classifier-free guidance towards the best quality in `FlowPolicy.act`
    eval_steps: int = 10  # Euler steps of the deterministic sampler
    times_per_example: int = 1  # flow times per encoded prefix in the SFT loss
    resize_images: bool = False  # resize square frames to vision.image_size; else other sizes fail
    truncate_prompt: bool = False  # cut a prompt above max_prompt_tokens; else it fails
    dtype: str = "float32"  # of matrix products; parameters, norms and softmax stay float32
    remat: bool = False  # recompute layers in the backward pass instead of storing them
    unroll: bool = False  # unroll the loop over layers: faster for small models on a CPU

    @property
    def layer_loop(self) -> LayerLoop:
        return LayerLoop(remat=self.remat, unroll=self.unroll)

    def __post_init__(self):
        if self.pi05 and self.use_proprio:
            raise ValueError(
                "use_proprio needs the state token of π0: set pi05=False, or use_proprio=False"
            )
        if self.times_per_example < 1:
            raise ValueError(f"times_per_example is {self.times_per_example}: use 1 or more")
        if not 2 <= self.quality_levels < self.vocab_size:
            raise ValueError(
                f"quality_levels is {self.quality_levels}: tell apart 2 or more, each with a token "
                f"of the {self.vocab_size}"
            )


def variants() -> dict[str, Pi0Config]:
    """`micro` (CPU, trained from scratch), `small` (one GPU), `pi05` (openpi's released size)."""
    return {"micro": _micro(), "small": _small(), "pi05": _pi05()}


def _micro() -> Pi0Config:
    heads = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 32}
    return Pi0Config(
        vision=SiglipConfig(128, 2, 256, 4, patch_size=16, image_size=64),
        language=GemmaConfig(width=128, depth=3, mlp_dim=256, **heads),
        expert=GemmaConfig(width=128, depth=3, mlp_dim=256, **heads),
        vocab_size=512,
        max_prompt_tokens=16,
        action_dim=8,
        normalization="zscore",
        critic=CriticConfig(widths=(128, 64)),
        eval_steps=5,
        times_per_example=4,
        unroll=True,
    )


def _small() -> Pi0Config:
    heads = {"num_heads": 8, "num_kv_heads": 1, "head_dim": 64}
    return Pi0Config(
        vision=SiglipConfig(256, 4, 1024, 4, patch_size=16, image_size=128),
        language=GemmaConfig(width=512, depth=8, mlp_dim=1024, **heads),
        expert=GemmaConfig(width=256, depth=8, mlp_dim=512, **heads),
        vocab_size=512,
        max_prompt_tokens=32,
        action_dim=8,
        normalization="zscore",
        critic=CriticConfig(widths=(512, 256, 128)),
        times_per_example=4,
        resize_images=True,
        dtype="bfloat16",
    )


def _pi05() -> Pi0Config:
    heads = {"num_heads": 8, "num_kv_heads": 1, "head_dim": 256}
    return Pi0Config(
        vision=SiglipConfig(1152, 27, 4304, 16, patch_size=14, image_size=224),
        language=GemmaConfig(width=2048, depth=18, mlp_dim=16384, **heads),
        expert=GemmaConfig(width=1024, depth=18, mlp_dim=4096, **heads),
        vocab_size=257_152,
        max_prompt_tokens=200,
        action_dim=32,
        resize_images=True,
        dtype="bfloat16",
        remat=True,
    )
