"""Golden comparisons of packed training sequences: masks, states, losses and gradients."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.parity_suites.bagel_golden import (
    ATTENTION,
    TOLERANCE,
    Golden,
    Row,
    nhwc,
    row,
    row_relative,
    sample_latents,
)
from mbpo_jax.nn import navit, qwen2_mot
from mbpo_jax.nn.qwen2_mot import Segment
from mbpo_jax.types import Params
from mbpo_jax.world_model import bagel, generation
from mbpo_jax.world_model.checkpoint import dotted, is_stacked, released_names


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
    pixels, noise = nhwc(z["padded_images"]), nhwc(z["vae_posterior_noise"])
    latents = sample_latents(golden.params["vae"], config.vae, pixels, noise)
    patch = config.latent_patch
    tokens = [
        navit.patchify(x[None, : h * patch, : w * patch], patch)[0]
        for x, (h, w) in zip(latents, z["patchified_vae_latent_shapes"])
    ]
    return jnp.concatenate(tokens), jnp.moveaxis(latents, -1, 1)


def export_arrays(params: Params) -> dict[str, np.ndarray]:
    """Arrays under their released names, in PyTorch's layouts."""
    named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = dotted(path)
        sources = released_names(path, leaf.shape)
        for i, name in enumerate(sources):
            array = np.asarray(leaf[i] if is_stacked(path) else leaf)
            named[name] = np.ascontiguousarray(_to_pytorch(path, array))
    return named


def _to_pytorch(path: str, array: np.ndarray) -> np.ndarray:
    """From our layout (one layer) to PyTorch's: [in, out] -> [out, in], HWIO -> OIHW."""
    if not path.endswith(".kernel"):
        return array
    return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
