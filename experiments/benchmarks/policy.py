"""Times of the policy beside openpi's on the same sizes: sampling and a training step."""

import dataclasses
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.flops import matmul_flops
from experiments.benchmarks.timing import Run, interleave, matmul_peak, measured, timed
from experiments.benchmarks.training import training_run
from mbpo_jax.nn.gemma import GemmaConfig
from mbpo_jax.nn.normalization import NormStats
from mbpo_jax.nn.siglip import SiglipConfig
from mbpo_jax.policy.config import Pi0Config, variants
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.types import Observation, Prompt

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")  # openpi always has three
DENOISE_STEPS = 10
PEER = Path(__file__).parents[2] / "third_party" / "openpi" / "benchmark_peer.py"
MISSING = (
    "Times of openpi are left out: it needs an environment of its own, because it pins other\n"
    "versions of JAX and Flax. third_party/openpi/README.md says how to make it (three commands);\n"
    "then pass its interpreter: --openpi=DIR/bin/python"
)


def sizes() -> dict[str, Pi0Config]:
    """`tiny` (the golden data's), `small` and `pi05`, as they are run: one flow time per example,
    as openpi does, float32 on CPU, bfloat16 products on an accelerator."""
    heads = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 16}
    tiny = Pi0Config(
        vision=SiglipConfig(32, 2, 80, 2, patch_size=14, image_size=56),
        language=GemmaConfig(width=64, depth=3, mlp_dim=128, **heads),
        expert=GemmaConfig(width=32, depth=3, mlp_dim=64, **heads),
        vocab_size=256,
        max_prompt_tokens=16,
        action_dim=7,
    )
    on_cpu = jax.default_backend() == "cpu"
    configs = {"tiny": tiny, "small": variants()["small"], "pi05": variants()["pi05"]}
    return {
        name: dataclasses.replace(
            config,
            times_per_example=1,
            eval_steps=DENOISE_STEPS,
            dtype="float32" if on_cpu else "bfloat16",
            unroll=on_cpu and name != "pi05",
        )
        for name, config in configs.items()
    }


def run(size: str, batch_sizes: dict[str, int], repeats: int, openpi: str | None) -> list[dict]:
    """A row per kind of work ("sample", "train"): seconds, FLOP/s, share of the machine's measured
    matrix peak and, where `openpi` names the Python of an environment with openpi, its seconds and
    the ratio of ours to them with its interval.
    """
    config = sizes()[size]
    peak = matmul_peak(jnp.dtype(config.dtype), 1024 if jax.default_backend() == "cpu" else 8192)
    rows = []
    for work, batch in batch_sizes.items():
        ours, flops = _ours(config, work, batch)
        with _peer(openpi, config, work, batch) as peer:
            runs = {"ours": ours} | ({"peer": peer} if peer else {})
            seconds = interleave(runs, repeats, f"{size}, {work} batch {batch}")
        row = {"size": size, "work": work, "batch": batch}
        rows.append(row | measured(seconds, flops, peak))
    return rows


def _ours(config: Pi0Config, work: str, batch: int) -> tuple[Run, float]:
    """The run, and the floating-point operations of its matrix products."""
    policy = build(config)
    params = jax.jit(policy.init)(jax.random.key(0))
    observation = inputs(config, batch)
    key = jax.random.key(1)
    if work == "sample":
        act, params = jax.jit(policy.act), jax.jit(policy.for_inference)(params)
        return timed(act, params, observation, key), matmul_flops(
            policy.act, params, observation, key
        )

    actions = jnp.zeros((batch, config.chunk, config.action_dim))

    def loss_fn(actor, frozen, batch, key):
        return policy.loss(actor, *batch, key)

    return training_run(loss_fn, params["actor"], {}, (observation, actions))


def build(config: Pi0Config) -> FlowPolicy:
    """The policy of a robot with openpi's cameras and as many actions as the config has."""
    stats = neutral_stats(config.action_dim)
    return FlowPolicy(config, stats, stats, CAMERAS, [(-1.0, 1.0)] * config.action_dim)


def neutral_stats(size: int) -> NormStats:
    """Statistics [size] under which normalisation changes nothing."""
    return NormStats(*(np.full(size, x, np.float32) for x in (0, 1, -1, 1)))


def inputs(config: Pi0Config, batch: int) -> Observation:
    """Observations of noise."""
    rng = np.random.default_rng(0)
    size = config.vision.image_size
    tokens = rng.integers(1, config.vocab_size, (batch, config.max_prompt_tokens)).astype(np.int32)
    prompt = Prompt(tokens, np.ones(tokens.shape, bool))
    images = {c: rng.integers(0, 256, (batch, size, size, 3)).astype(np.uint8) for c in CAMERAS}
    proprio = np.zeros((batch, config.action_dim), np.float32)
    return jax.device_put(Observation(images, proprio, prompt, prompt))


@contextmanager
def _peer(
    interpreter: str | None, config: Pi0Config, work: str, batch: int
) -> Iterator[Run | None]:
    """openpi in a process of its own, which answers every line with the seconds of one run.

    Raises:
        RuntimeError: the process ended; its own message is on the terminal.
    """
    if not interpreter:
        yield None
        return
    job = {"work": work, "batch": batch, "steps": DENOISE_STEPS, **dataclasses.asdict(config)}
    process = subprocess.Popen(
        [interpreter, str(PEER), json.dumps(job)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask() -> float:
        if process.poll() is None:
            process.stdin.write("run\n")
            process.stdin.flush()
            if answer := process.stdout.readline():
                return float(answer)
        raise RuntimeError(
            f"{interpreter} {PEER} ended with code {process.wait()}; is rlinf-openpi installed "
            "there as third_party/openpi/README.md says?"
        )

    try:
        yield ask
    finally:
        process.kill()
        process.wait()
