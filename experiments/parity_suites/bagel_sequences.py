"""Golden comparisons of whole sequences: packed training samples, understanding, generation."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbpo_jax.nn import navit, qwen2_mot, vae
from mbpo_jax.nn.qwen2_mot import Cache, Segment
from mbpo_jax.nn.vae import VAEConfig
from mbpo_jax.types import Params
from mbpo_jax.world_model import bagel, generation
from mbpo_jax.world_model.checkpoint import dotted, is_stacked, released_names
from mbpo_jax.world_model.config import GuidanceConfig, UMMConfig
from mbpo_jax.world_model.guidance import is_active

Row = tuple[str, float, float, bool]  # name, largest difference, tolerance, within it

TOLERANCE = 3e-5  # hidden states, caches, logits, autoencoder
FLOW_TOLERANCE = 1e-4  # velocities and latents of a guided generation
RELATIVE_TOLERANCE = 1e-5  # losses and gradient norms
ATTENTION = ("causal", "full", "noise")


@dataclasses.dataclass(frozen=True)
class Golden:
    """A fixture folder: its model, special tokens (a `bagel.Tokenizer` without `encode`) and
    bagel_config.json."""

    folder: Path
    config: UMMConfig
    params: Params
    tokenizer: Any
    sizes: dict


def row(name: str, found, expected, tolerance: float = TOLERANCE) -> Row:
    """Largest absolute difference; another shape, or NaN, is an infinite one."""
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        return (f"{name} {found.shape} != {expected.shape}", np.inf, tolerance, False)
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    largest = float(np.max(difference, initial=0.0))
    largest = np.inf if np.isnan(largest) else largest
    return (name, largest, tolerance, largest <= tolerance)


def row_relative(name: str, found, expected, tolerance: float = RELATIVE_TOLERANCE) -> Row:
    """Largest difference relative to the largest expected magnitude."""
    scale = max(float(np.max(np.abs(expected), initial=0.0)), 1e-30)
    return row(name, np.asarray(found) / scale, np.asarray(expected) / scale, tolerance)


def sample_latents(params: Params, config: VAEConfig, images, noise) -> jax.Array:
    """Scaled posterior samples of images [B, H, W, 3]; `noise` is standard normal [B, h, w, z]."""
    mean, log_variance = vae.moments(params, config, images)
    return vae.scale_latents(config, mean + jnp.exp(0.5 * log_variance) * noise)


def export_arrays(params: Params) -> dict[str, np.ndarray]:
    """Arrays under their released names, in PyTorch's layouts."""
    named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = dotted(path)
        sources = released_names(path, leaf.shape)
        for i, name in enumerate(sources):
            array = np.asarray(leaf[i] if is_stacked(path) else leaf)
            named[name] = np.ascontiguousarray(_to_pytorch(path, name, array))
    return named


def _to_pytorch(path: str, name: str, array: np.ndarray) -> np.ndarray:
    """From our layout (one layer) to PyTorch's: [in, out] -> [out, in], HWIO -> OIHW."""
    if not path.endswith(".kernel"):
        return array
    return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)


# Packed training sequences


def training_rows(golden: Golden, name: str, z: dict) -> list[Row]:
    """Masks, positions, hidden states, logits, losses and gradients of packed samples."""
    model = {k: v for k, v in golden.params.items() if k != "vae"}
    (_, found), gradients = jax.jit(
        jax.value_and_grad(lambda p: _packed_loss(golden, p, z), has_aux=True)
    )(model)
    rows = []
    for key, value in found.items():
        loss = key in ("ce_mean", "ce_reweighted", "mse_mean", "loss")
        rows.append((row_relative if loss else row)(key, value, z[key]))

    named = export_arrays(gradients)
    for key in z:
        if key.startswith("grad/"):
            rows.append(row_relative(key, named[key.removeprefix("grad/")], z[key], TOLERANCE))
    norms = json.loads((golden.folder / f"{name}_grad_norms.json").read_text(encoding="utf-8"))
    for parameter, norm in norms.items():
        if parameter.endswith("pos_embed.pos_embed"):
            continue  # frozen tables
        mine = np.linalg.norm(named[parameter])
        # A key bias moves all scores of a ViT query alike: its gradient is zero but for rounding.
        zero = norm is None or norm == 0 or parameter.endswith("self_attn.k_proj.bias")
        if (zero and parameter.startswith("vit_model")) or not norm:
            rows.append(row(f"grad_norm/{parameter}", mine, norm or 0.0, TOLERANCE))
        else:
            rows.append(row_relative(f"grad_norm/{parameter}", mine, norm))
    return rows


def _packed_loss(golden, params, z):
    """(loss, named arrays) of all packed samples, as the public trainer reduces them."""
    config = golden.config
    found: dict[str, Any] = {}
    length = int(z["sequence_length"])
    generation_slots = z.get("packed_vae_token_indexes", np.zeros(0, int))

    text = qwen2_mot.embed_text(params["mot"], config.mot, z["packed_text_ids"])
    packed = jnp.zeros((length, config.mot.hidden_size)).at[z["packed_text_indexes"]].set(text)
    vit, start = [], 0
    for n in z["vit_token_seqlens"]:
        patches, ids = (z[f"packed_vit_{k}"][start : start + n] for k in ("tokens", "position_ids"))
        features = navit.encode(params["vit"], config.vit, patches[None], ids)
        vit.append(bagel.connect(params, config, features, ids)[0])
        start += n
    packed = packed.at[z["packed_vit_token_indexes"]].set(jnp.concatenate(vit))
    if "padded_images" in z:
        clean, found["padded_latent"] = _packed_latents(golden, z)
        t = generation.training_times(z["packed_timesteps"], float(z["timestep_shift"]))
        found["effective_timesteps"] = t
        noised = (1 - t[:, None]) * clean + t[:, None] * z["flow_noise"]
        embedded = bagel.embed_latents(
            params, config, noised[None], z["packed_latent_position_ids"], t[None]
        )
        packed = packed.at[generation_slots].set(embedded[0])
    found["llm_input"] = packed

    layers, last, start, split = [], jnp.zeros_like(packed), 0, 0
    for i, count in enumerate(z["splits_per_sample"]):
        segments, slots = [], ([], [])
        for j in range(split, split + count):
            here = np.arange(start, start + z["split_lens"][j])
            start += z["split_lens"][j]
            of_gen = np.isin(here, generation_slots)
            for expert, chosen in enumerate((here[~of_gen], here[of_gen])):
                slots[expert].append(chosen)
            mode = ATTENTION[z["attn_modes"][j]]
            segments.append(
                Segment(packed[None, here[~of_gen]], packed[None, here[of_gen]], None, mode)
            )
        split += count
        slots = [np.concatenate(s) for s in slots]
        order = np.concatenate(slots)
        cache = qwen2_mot.empty_cache(config.mot, 1)
        mask = qwen2_mot.attention_mask(segments)
        first = order.min()
        unpacked = np.zeros_like(mask)
        unpacked[np.ix_(order - first, order - first)] = mask
        found[f"mask_{i}"] = unpacked
        positions = qwen2_mot.segment_positions(segments, cache.position)[0][0]
        found.setdefault("packed_position_ids", jnp.zeros(length, jnp.int32))
        found["packed_position_ids"] = found["packed_position_ids"].at[order].set(positions)
        hidden = qwen2_mot.layer_outputs(params["mot"], config.mot, segments, cache)
        layers.append((order, jnp.concatenate(hidden, axis=2)[:, 0]))
        final = qwen2_mot.forward(params["mot"], config.mot, segments, cache)
        last = last.at[order].set(jnp.concatenate(final, axis=1)[0])
    for i in range(config.mot.num_layers):
        states = jnp.zeros_like(packed)
        for order, hidden in layers:
            states = states.at[order].set(hidden[i])
        found[f"layer{i}_out"] = states
    found["last_hidden"] = last

    loss = 0.0
    if "ce_loss_indexes" in z:
        logits = qwen2_mot.logits(params["mot"], last[z["ce_loss_indexes"]])
        labels = z["packed_label_ids"]
        ce = jax.nn.logsumexp(logits, axis=-1) - logits[np.arange(len(labels)), labels]
        weights = z["ce_loss_weights"]
        found |= {"ce_logits": logits, "ce": ce, "ce_mean": ce.mean()}
        if "ce_reweighted" in z:
            found["ce_reweighted"] = jnp.sum(weights * ce) / weights.sum()
        loss += ce.mean()
    if "mse_loss_indexes" in z:
        velocity = bagel.read_latents(params, last[z["mse_loss_indexes"]])
        noisy = np.asarray(z["packed_timesteps"]) > -np.inf
        mse = jnp.square(velocity - (z["flow_noise"] - clean)[noisy])
        found |= {"velocity": velocity, "mse": mse, "mse_mean": mse.mean()}
        loss += mse.mean()
    return loss, {**found, "loss": loss}


def _packed_latents(golden, z):
    """Clean latent tokens of all pictures, and the latents of the padded batch (NCHW)."""
    config = golden.config
    pixels, noise = (np.moveaxis(z[k], 1, -1) for k in ("padded_images", "vae_posterior_noise"))
    latents = sample_latents(golden.params["vae"], config.vae, pixels, noise)
    patch = config.latent_patch
    tokens = [
        navit.patchify(x[None, : h * patch, : w * patch], patch)[0]
        for x, (h, w) in zip(latents, z["patchified_vae_latent_shapes"])
    ]
    return jnp.concatenate(tokens), jnp.moveaxis(latents, -1, 1)


# Understanding


def understanding_rows(golden: Golden, name: str, z: dict) -> list[Row]:
    """Prefix caches, greedy decoding, and the one-pass answer of each question."""
    params, config, tokenizer = golden.params, golden.config, golden.tokenizer
    rows = []
    for case in dict.fromkeys(key.split("/")[0] for key in z):
        segments = []
        for i in range(sum(k.startswith(f"{case}/image") and "pixels" in k for k in z)):
            pixels = np.moveaxis(z[f"{case}/image{i}_vit_pixels"], 0, -1)[None]
            cells = [n // config.vit.patch_size for n in pixels.shape[1:3]]
            features = navit.forward(params["vit"], config.vit, pixels)
            segments.append(bagel.vit_segment(params, config, tokenizer, features, *cells))
        ids = [tokenizer.bos_id, *z[f"{case}/question_ids"], tokenizer.eos_id]
        segments.append(bagel.text_segment(params, config, np.asarray([ids])))
        cache = qwen2_mot.empty_cache(config.mot, 1)
        cache = bagel.extend(params, config, segments, cache)[0]
        rows.append(row(f"{case}/kv_k", cache.keys[:, 0].swapaxes(1, 2), z[f"{case}/kv_k"]))
        rows.append(row(f"{case}/kv_v", cache.values[:, 0].swapaxes(1, 2), z[f"{case}/kv_v"]))
        position = z[f"{case}/start/packed_query_position_ids"]
        rows.append(row(f"{case}/start/packed_query_position_ids", cache.position, position, 0.0))

        tokens, logits, token = [], [], tokenizer.bos_id
        for _ in range(len(z[f"{case}/tokens"])):
            tokens.append(token)
            segment = bagel.text_segment(params, config, np.asarray([[token]]))
            cache, hidden, _ = bagel.extend(params, config, [segment], cache)
            logits.append(qwen2_mot.logits(params["mot"], hidden[0, -1]))
            token = int(jnp.argmax(logits[-1]))
        start = bagel.text_segment(params, config, np.asarray([[tokenizer.bos_id]]))
        hidden, _ = bagel.forward(params, config, [*segments, start])
        answer = qwen2_mot.logits(params["mot"], hidden[0, -1])
        pair = answer[np.asarray([golden.sizes["yes_token_id"], golden.sizes["no_token_id"]])]
        rows += [
            row(f"{case}/tokens", tokens, z[f"{case}/tokens"], 0.0),
            row(f"{case}/step_logits", jnp.stack(logits), z[f"{case}/step_logits"]),
            row(f"{case}/yes_no_logits", pair, z[f"{case}/yes_no_logits"]),
            row(f"{case}/p_yes", jax.nn.softmax(pair)[0], z[f"{case}/p_yes"]),
            row(
                f"{case}/logprob_yes_no",
                pair - jax.nn.logsumexp(answer),
                z[f"{case}/logprob_yes_no"],
            ),
        ]
    return rows


# Generation


def generation_rows(golden: Golden, name: str, z: dict) -> list[Row]:
    """Contexts step by step, caches, and every guided run."""
    rows, segments = _context_rows(golden, z)
    config = dataclasses.replace(
        golden.config, guidance=GuidanceConfig(text_scale=2.0, image_scale=2.0)
    )
    contexts = jax.jit(lambda p: generation.build_contexts(p, config, segments))(golden.params)
    texts = [s for s in segments if s.attention == "causal"]
    last_text = segments[-1].attention == "causal"
    before = segments[:-1] if last_text else segments
    groups = {
        "gen": (contexts.full, [before, segments[-1:]] if last_text else [segments]),
        "cfg_text": (contexts.text_free, [before]),
        "cfg_img": (contexts.image_free, [texts]),
    }
    for key, (cache, parts) in groups.items():
        if f"kv/{key}/k" in z:
            order = np.argsort(np.concatenate(_slots(parts)))
            for part, heads in (("k", cache.keys), ("v", cache.values)):
                tokens = heads[:, 0].swapaxes(1, 2)[:, order]
                rows.append(row(f"kv/{key}/{part}", tokens, z[f"kv/{key}/{part}"]))
    block = {"cfg_text": contexts.text_free, "cfg_img": contexts.image_free}
    rows += [
        row(f"{k}/cfg_packed_position_ids", c.position, z[f"{k}/cfg_packed_position_ids"][:1], 0.0)
        for k, c in block.items()
    ]
    full = contexts.full.position
    rows.append(row("latent/packed_position_ids", full, z["latent/packed_position_ids"][:1], 0.0))

    velocities = _velocities_at(golden, *_token_grid(golden.config, z))
    runs = json.loads((golden.folder / f"{name}_runs.json").read_text(encoding="utf-8"))
    runs = {run: settings for run, settings in runs.items() if isinstance(settings, dict)}
    for run, settings in runs.items():
        rows += _run_rows(golden, contexts, velocities, f"run/{run}", settings, z)
    return rows


def _slots(groups: list[list[Segment]]) -> list[np.ndarray]:
    """Where each cached token stands in the public code's order, group by group as cached."""
    slots, start = [np.zeros(0, int)], 0
    for group in groups:
        und, gen = [], []
        for segment in group:
            n, m = segment.und.shape[1], segment.gen.shape[1]
            here = np.arange(start, start + n + m)
            # Latents stand between the two markers.
            und.append(here if m == 0 else here[[0, -1]])
            gen.append(here[:0] if m == 0 else here[1:-1])
            start += n + m
        slots += [*und, *gen]
    return slots


def _context_rows(golden, z):
    """Rows of every cache update, and the segments of the full context."""
    config, params = golden.config, golden.params
    steps = dict.fromkeys(key.split("/")[1] for key in z if key.startswith("ctx/"))
    steps = sorted(steps, key=lambda s: (int(s[1 : s.index("_")]), "vit" in s))
    empty = qwen2_mot.empty_cache(config.mot, 1)
    caches: dict[str, Cache] = {"gen": empty, "cfgimg": empty}
    rows, segments, images = [], [], 0
    for step in steps:
        _, kind, who = step.split("_")
        arrays = {k.split("/")[-1]: v for k, v in z.items() if k.startswith(f"ctx/{step}/")}
        if kind == "vae":
            noise = z[f"image{images}_posterior_noise"]
            images += 1
        else:
            noise = None
        segment = _context_segment(golden, kind, arrays, noise)
        if who == "gen":
            segments.append(segment)
        positions = qwen2_mot.segment_positions([segment], caches[who].position)[0][0]
        caches[who], und, gen = bagel.extend(params, config, [segment], caches[who])
        order = np.argsort(np.concatenate(_slots([[segment]])))
        inputs = jnp.concatenate([segment.und, segment.gen], axis=1)[0][order]
        hidden = jnp.concatenate([und, gen], axis=1)[0][order]
        ids = "packed_text_position_ids" if kind == "text" else "packed_position_ids"
        rows += [
            row(f"ctx/{step}/llm_input", inputs, arrays["llm_input"]),
            row(f"ctx/{step}/last_hidden", hidden, arrays["last_hidden"]),
            row(f"ctx/{step}/{ids}", positions[order], arrays[ids], 0.0),
            row(f"ctx/{step}/new_rope", caches[who].position, arrays["new_rope"], 0.0),
        ]
    return rows, segments


def _context_segment(golden, kind, arrays, noise):
    config, params, tokenizer = golden.config, golden.params, golden.tokenizer
    if kind == "text":
        return bagel.text_segment(params, config, arrays["packed_text_ids"][None])
    if kind == "vit":
        ids = arrays["packed_vit_position_ids"]
        rows, columns = (int(n) + 1 for n in divmod(ids.max(), config.vit.max_patches_per_side))
        features = navit.encode(params["vit"], config.vit, arrays["packed_vit_tokens"][None], ids)
        return bagel.vit_segment(params, config, tokenizer, features, rows, columns)
    pixels, noise = (np.moveaxis(x, 1, -1) for x in (arrays["padded_images"], noise))
    latents = sample_latents(params["vae"], config.vae, pixels, noise)
    tokens = navit.patchify(latents, config.latent_patch)
    shape = (int(n) for n in arrays["patchified_vae_latent_shapes"][0])
    return bagel.latent_segment(params, config, tokenizer, tokens, *shape)


def _token_grid(config, z):
    stride = config.vae.downsample * config.latent_patch
    return tuple(int(n) // stride for n in z["image_shape"])


def _velocities_at(golden, rows, columns):
    """(cache, states [n, tokens, v], times [n]) -> velocities under one context, compiled once."""

    def velocities(cache, states, times):
        def one(step):
            x, t = step
            args = (golden.params, golden.config, golden.tokenizer, [cache], x[None], t[None])
            return generation.predict(*args, rows, columns)[0]

        return jax.lax.map(one, (jnp.asarray(states), jnp.asarray(times)))

    return jax.jit(velocities)


def _run_rows(golden, contexts, velocities, run, settings, z):
    params, tokenizer = golden.params, golden.tokenizer
    config = dataclasses.replace(
        golden.config,
        num_timesteps=settings["num_timesteps"],
        sample_timestep_shift=settings["timestep_shift"],
        guidance=GuidanceConfig(
            text_scale=settings["cfg_text_scale"],
            image_scale=settings["cfg_img_scale"],
            interval=tuple(settings["cfg_interval"]),
            renorm=settings["cfg_renorm_type"],
            renorm_min=settings["cfg_renorm_min"],
        ),
    )
    shape = _token_grid(config, z)
    noise = jnp.asarray(z["init_noise"][None])
    x, states, used = jax.jit(
        lambda p, c: generation.trajectory(p, config, tokenizer, c, noise, *shape)
    )(params, contexts)
    latents = navit.unpatchify(x, *shape, config.latent_patch)
    decoded = vae.decode(params["vae"], config.vae, latents)
    # The public code truncates where the world model rounds.
    picture = np.asarray(np.clip(decoded[0] * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8)

    times = generation.sampling_times(config.num_timesteps, config.sample_timestep_shift)
    guide = config.guidance
    # Recorded by the interval alone, even where a text scale of 1 switches guidance off.
    by_interval = dataclasses.replace(guide, text_scale=np.inf)
    scales = [
        (guide.text_scale, guide.image_scale) if is_active(by_interval, t) else (1.0, 1.0)
        for t in times[:-1]
    ]
    flow = FLOW_TOLERANCE
    rows = [
        row(f"{run}/timesteps", times, z[f"{run}/timesteps"]),
        row(f"{run}/x_t", states[:, 0], z[f"{run}/x_t"], flow),
        row(f"{run}/v_t", used[:, 0], z[f"{run}/v_t"], flow),
        row(f"{run}/latent_tokens", x[0], z[f"{run}/latent_tokens"], flow),
        row(f"{run}/latent_nchw", jnp.moveaxis(latents, -1, 1), z[f"{run}/latent_nchw"], flow),
        row(f"{run}/image_uint8", picture, z[f"{run}/image_uint8"], 1.0),
        row(f"{run}/scales_used", np.asarray(scales), z[f"{run}/scales_used"], 0.0),
    ]
    if f"{run}/image_float" in z:
        image = jnp.moveaxis(decoded, -1, 1)
        rows.append(row(f"{run}/image_float", image, z[f"{run}/image_float"], flow))
    branches = {
        "v_cond": contexts.full,
        "v_cfg_text": contexts.text_free,
        "v_cfg_img": contexts.image_free,
    }

    for key, cache in branches.items():
        if f"{run}/{key}" in z:
            found = velocities(cache, z[f"{run}/x_t"], times[:-1])
            rows.append(row(f"{run}/{key}", found, z[f"{run}/{key}"], flow))
    return rows
