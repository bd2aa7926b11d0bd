"""Compares the policy with golden arrays made by openpi and by πRL's public code."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mbpo_jax.nn import gemma, siglip
from mbpo_jax.nn.gemma import GemmaConfig
from mbpo_jax.nn.normalization import NormStats, normalize, unnormalize
from mbpo_jax.nn.siglip import SiglipConfig
from mbpo_jax.policy import flow, network
from mbpo_jax.policy.config import FlowConfig, Pi0Config
from mbpo_jax.types import Prompt

Row = tuple[str, float, float, bool]  # name, largest difference, tolerance, within it

# Differences are relative where values exceed 1.
NETWORK_TOLERANCE = 2e-5
FLOW_TOLERANCE = 1e-6
NORM_FIELDS = ("mean", "std", "q01", "q99")
LOG_PROB_TOLERANCE = 2e-5  # a float32 rounding of the mean is divided by a small deviation


def run(fixtures: str | Path) -> list[Row]:
    """Rows for every golden folder at or below `fixtures`.

    Raises:
        ValueError: there is no golden data below `fixtures`.
    """
    fixtures = Path(fixtures)
    rows = []
    for path in sorted(fixtures.rglob("io.npz")):
        rows += _network_rows(path.parent)
    for path in sorted(fixtures.rglob("norm.npz")):
        rows += _normalization_rows(path)
    for path in sorted(fixtures.rglob("flow_rl.npz")):
        rows += _flow_rows(path)
    if not rows:
        raise ValueError(
            f"no golden data in {fixtures}: expected folders with config.json, params_flat.npz and "
            "io.npz, or with flow_rl.npz"
        )
    return rows


def fixture_config(folder: Path) -> Pi0Config:
    """The model configuration that a golden folder's config.json describes."""
    sizes = json.loads((folder / "config.json").read_text())
    vision = {name: sizes["siglip"][name] for name in SiglipConfig.__dataclass_fields__}
    language, expert = (
        GemmaConfig(**{name: sizes[which][name] for name in GemmaConfig.__dataclass_fields__})
        for which in ("paligemma", "action_expert")
    )
    return Pi0Config(
        vision=SiglipConfig(**vision),
        language=language,
        expert=expert,
        vocab_size=sizes["vocab"],
        max_prompt_tokens=sizes["max_token_len"],
        action_dim=sizes["action_dim"],
        chunk=sizes["action_horizon"],
        pi05=sizes["pi05"],
    )


def row(name: str, value: jax.Array, golden: np.ndarray, tolerance: float) -> Row:
    """The largest difference of two arrays, relative where golden values exceed 1."""
    value, golden = np.asarray(value), np.asarray(golden)
    if value.shape != golden.shape:
        return f"{name}: shape {value.shape}, expected {golden.shape}", np.inf, tolerance, False
    value, golden = value.astype(np.float64), golden.astype(np.float64)
    difference = np.max(np.abs(value - golden) / np.maximum(1, np.abs(golden)), initial=0.0)
    return name, float(difference), tolerance, bool(difference <= tolerance)


def _network_rows(folder: Path) -> list[Row]:
    config = fixture_config(folder)
    cameras = json.loads((folder / "config.json").read_text())["image_keys"]
    actor = jax.tree.map(
        jnp.asarray, unflatten_dict(dict(np.load(folder / "params_flat.npz")), sep="/")
    )
    golden = np.load(folder / "io.npz")
    images, image_mask = (
        jnp.stack([golden[f"{field}/{camera}"] for camera in cameras], axis=1)
        for field in ("image", "image_mask")
    )
    prompt = Prompt(golden["tokenized_prompt"], golden["tokenized_prompt_mask"])
    state = None if config.pi05 else jnp.asarray(golden["state"])

    tokens, mask = network.prefix_tokens(actor, config, images, image_mask, prompt)
    hidden, cache = gemma.encode_prefix(actor["PaliGemma"]["llm"], tokens, mask)
    prefix = network.encode(actor, config, images, image_mask, prompt, state)
    noisy, target = flow.interpolate(golden["actions"], golden["noise"], golden["time"])
    at = functools.partial(network.at_times, actor, config)
    velocity_at = network.velocity(actor, config, prefix)
    velocity, features = velocity_at(noisy[:, None], at(jnp.asarray(golden["time"])[:, None]))
    values = {
        "prefix_tokens": tokens,
        "prefix_mask": mask,
        "prefix_out": hidden,
        "prefix_mean_valid": prefix.features,
        "kv_cache_k": cache.keys.swapaxes(2, 3),
        "kv_cache_v": cache.values.swapaxes(2, 3),
        "x_t": noisy,
        "u_t": target,
        "suffix_out": features[:, 0],
        "v_t": velocity[:, 0],
        "loss": jnp.square(velocity[:, 0] - target).mean(-1),
    }
    if "siglip/image" in golden:
        vision = actor["PaliGemma"]["img"]
        values["siglip/tokens"] = siglip.encode(vision, config.vision, golden["siglip/image"])
    if config.pi05:
        width, times = config.expert.width, jnp.asarray(golden["timeemb/times"])
        values["timeemb/adarms_cond"] = network.time_condition(actor, times, width)
    for name in golden.files:
        if name.startswith("sample_actions_"):
            values[name] = flow.sample_ode(
                velocity_at,
                golden["sample_noise"],
                int(name.rsplit("_", 1)[1]),
                at,
            )
    rows = [
        row(f"{folder.name}/{name}", value, golden[name], NETWORK_TOLERANCE)
        for name, value in values.items()
    ]
    if (folder / "grads_flat.npz").exists():
        rows += _gradient_rows(folder, actor, config, images, image_mask, prompt, state)
    return rows


def _gradient_rows(folder, actor, config, images, image_mask, prompt, state) -> list[Row]:
    """Gradients of the flow loss, the worst of each part of the network."""
    golden = np.load(folder / "io.npz")

    def loss(actor: dict) -> jax.Array:
        prefix = network.encode(actor, config, images, image_mask, prompt, state)
        x, target = flow.interpolate(golden["actions"], golden["noise"], golden["time"])
        times = jnp.asarray(golden["time"])[:, None]
        time = network.at_times(actor, config, times)
        velocity, _ = network.velocity(actor, config, prefix)(x[:, None], time)
        return jnp.square(velocity[:, 0] - target).mean()

    gradients = flatten_dict(jax.grad(loss)(actor), sep="/")
    worst: dict[str, Row] = {}
    for path, expected in np.load(folder / "grads_flat.npz").items():
        part = "/".join(path.split("/")[:2])
        found = row(f"{folder.name}/gradient/{part}", gradients[path], expected, NETWORK_TOLERANCE)
        if part not in worst or found[1] > worst[part][1]:
            worst[part] = found
    return list(worst.values())


def _normalization_rows(path: Path) -> list[Row]:
    golden = np.load(path)
    rows = []
    for key in ("state", "actions"):
        stats = NormStats(*(golden[f"stats/{key}/{field}"] for field in NORM_FIELDS))
        raw = golden[f"raw/{key}"]
        values = {
            f"quantile/{key}": normalize(raw, stats, "quantile"),
            f"zscore/{key}": normalize(raw, stats, "zscore"),
            f"unnorm_quantile/{key}": unnormalize(golden[f"quantile/{key}"], stats, "quantile"),
        }
        rows += [
            row(f"{path.parent.name}/norm/{name}", value, golden[name], NETWORK_TOLERANCE)
            for name, value in values.items()
        ]
    return rows


def _flow_rows(path: Path) -> list[Row]:
    golden = np.load(path)
    layers = [
        {
            "kernel": jnp.asarray(golden[f"{stem}.weight"].T),
            "bias": jnp.asarray(golden[f"{stem}.bias"]),
        }
        for stem in sorted(
            name.removesuffix(".weight") for name in golden.files if name.endswith(".weight")
        )
    ]
    std_range = tuple(float(bound) for bound in golden["noise_net/noise_range"])
    rows = [*_step_rows(golden, layers, std_range), *_chain_rows(golden, layers, std_range)]
    for steps in {name.split("/")[1] for name in golden.files if name.startswith("schedule/")}:
        values = {
            f"schedule/{steps}/timesteps": flow.schedule(int(steps)),
            f"schedule/{steps}/flow_sde/sigma": flow.sde_sigma(int(steps), 0.5),
        }
        rows += [row(name, value, golden[name], FLOW_TOLERANCE) for name, value in values.items()]
    return [(f"{path.parent.name}/{name}", *rest) for name, *rest in rows]


def _step_rows(golden, layers, std_range) -> list[Row]:
    """Every single step in the golden file, the worst index of each method, noise level and N."""
    x, velocity = jnp.asarray(golden["step/x_t"]), jnp.asarray(golden["step/v_t"])
    worst: dict[str, Row] = {}
    cases = sorted({name.rsplit("/", 1)[0] for name in golden.files if name.endswith("/next_off")})
    for case in cases:
        _, method, level, count, index = case.split("/")
        if method not in ("flow_ode", "flow_sde", "flow_noise"):
            continue  # πRL's third sampler, "cps", is not part of this package
        steps = int(count[1:])
        step = golden["step/idx_batch"] if index == "batched" else np.full(len(x), int(index[1:]))
        mean, std = flow.ode_step(x, velocity, steps), None
        if method == "flow_sde":
            mean, std = flow.sde_step(x, velocity, step, steps, float(level[1:]))
        elif method == "flow_noise":
            std = flow.learned_std(layers, jnp.asarray(golden["step/feature"]), std_range)
        values = {"mean": (mean, FLOW_TOLERANCE)}
        if std is not None:
            std = jnp.broadcast_to(std, mean.shape)
            values["std"] = (std, FLOW_TOLERANCE)
            for suffix in ("", "_off"):
                x_next = golden[f"{case}/next{suffix}"]
                log_prob = flow.gaussian_log_prob(x_next, mean, std)
                values[f"logprob{suffix}"] = (log_prob, LOG_PROB_TOLERANCE)
        for kind, (value, tolerance) in values.items():
            name = f"step/{method}/{level}/{count}/{kind}"
            found = row(name, value, golden[f"{case}/{kind}"], tolerance)
            if name not in worst or found[1] > worst[name][1]:
                worst[name] = found
    return list(worst.values())


def _chain_rows(golden, layers, std_range) -> list[Row]:
    """Log-probabilities of stored chains."""
    velocities, features = (
        jnp.asarray(golden[f"chain/{name}"]).swapaxes(0, 1) for name in ("v", "feature")
    )
    batch, steps = velocities.shape[:2]
    chunk, dims = golden["chain/chunk_env"]
    config = FlowConfig(method="sde", steps=steps, noise_level=0.5)
    states = jnp.asarray(golden["chain/flow_sde/single/x"])
    chosen = 2  # the golden chain's stochastic step
    chain = flow.SdeChain(states[:, chosen], states[:, chosen + 1], jnp.full(batch, chosen))
    here = slice(chosen, chosen + 1)
    sde = flow.sde_log_prob(
        lambda x, times: (velocities[:, here], features[:, here]), chain, config
    )
    noise = flow.noise_log_prob(
        lambda x, times: (velocities, features),
        lambda z: flow.learned_std(layers, z, std_range),
        flow.NoiseChain(jnp.asarray(golden["chain/flow_noise/joint/x"])),
        config,
    )
    values = {
        "chain/flow_sde/single/logprob": sde[:, :chunk, :dims],
        "chain/flow_noise/joint/logprob_steps": noise,
        # The golden reduction is the mean over the chain; the policy sums.
        "chain/flow_noise/joint/logprob": noise.mean(1)[:, :chunk, :dims],
    }
    return [row(name, value, golden[name], LOG_PROB_TOLERANCE) for name, value in values.items()]
