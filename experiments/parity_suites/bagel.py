"""Compares the world model with golden arrays made by BAGEL's public PyTorch code.

A fixture folder holds a tiny checkpoint in the released layout and .npz files of recorded arrays:
embeddings, masks and norms, autoencoder, ViT, guidance arithmetic, picture transforms (here);
packed training sequences (`bagel_training`), understanding and guided generation
(`bagel_inference`).
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.parity_suites import image_transform
from experiments.parity_suites.bagel_golden import (
    ATTENTION,
    Golden,
    Row,
    load,
    nhwc,
    row,
    sample_latents,
)
from experiments.parity_suites.bagel_inference import generation_rows, understanding_rows
from experiments.parity_suites.bagel_training import training_rows
from mbpo_jax.nn import navit, qwen2_mot, vae
from mbpo_jax.nn.layers import rotate
from mbpo_jax.nn.qwen2_mot import Segment
from mbpo_jax.world_model import bagel as model
from mbpo_jax.world_model import generation, guidance
from mbpo_jax.world_model.config import GuidanceConfig


def run(fixtures: str | Path) -> list[Row]:
    """Rows (name, largest difference, tolerance, within it) for every golden folder at or below
    `fixtures`, in float32 at the precision of products in use.

    Raises:
        ValueError: there is no golden data below `fixtures`.
    """
    folders = [path.parent for path in sorted(Path(fixtures).rglob("bagel_config.json"))]
    if not folders:
        raise ValueError(f"no golden data in {fixtures}: expected folders with bagel_config.json")
    return [row for folder in folders for row in folder_rows(folder)]


def folder_rows(folder: Path) -> list[Row]:
    """Rows of all the files that are there."""
    golden = load(folder)
    parts = {
        "embed": embedding_rows,
        "vae": vae_rows,
        "vit": vit_rows,
        "cfg_math": guidance_rows,
        "transforms": transform_rows,
        "und_infer": understanding_rows,
    }
    rows = resize_rows(golden)
    for path in sorted(folder.glob("*.npz")):
        part = parts.get(path.stem)
        if path.stem.startswith("train_"):
            part = training_rows
        elif path.stem.startswith("gen_"):
            part = generation_rows
        if part is not None:
            arrays = dict(np.load(path))
            rows += [(f"{path.stem}/{r[0]}", *r[1:]) for r in part(golden, path.stem, arrays)]
    return rows


def embedding_rows(golden: Golden, name: str, z: dict) -> list[Row]:
    """Time features and embedding, position tables, rotations, times, masks and norms."""
    params, config = golden.params, golden.config
    positions, mot = z["rope_positions"], config.mot
    cos, sin = qwen2_mot.rope_angles(
        positions, mot.head_dim, mot.rope_theta, int(np.max(positions)) + 1
    )
    rows = [
        row("t_freq", model.time_features(z["t"]), z["t_freq"]),
        row("t_emb", model.embed_time(params, z["t"]), z["t_emb"]),
        row("rope_cos", np.concatenate([cos, cos], -1), z["rope_cos"]),
        row("rope_sin", np.concatenate([sin, sin], -1), z["rope_sin"]),
        row(
            "rope_q_out",
            rotate(z["rope_q"][None], cos[..., None, :], sin[..., None, :])[0],
            z["rope_q_out"],
        ),
    ]
    sides = {"latent": config.max_latent_side, "vit": config.vit.max_patches_per_side}
    for key, side in sides.items():
        table = model.position_table(side, config.mot.hidden_size)
        rows.append(row(f"{key}_pos_embed", table, z[f"{key}_pos_embed"]))
    for key in z:
        if key.startswith("train_t_shift"):
            times = generation.training_times(z["train_t_raw"], float(key.split("shift")[1]))
            rows.append(row(key, times, z[key]))
        if key.startswith("sample_t_N"):
            count, shift = key.removeprefix("sample_t_N").split("_shift")
            rows.append(row(key, generation.sampling_times(int(count), float(shift)), z[key]))
        if key.startswith("mask") and "_" not in key:
            segments = [
                Segment(np.zeros((1, n, 1)), np.zeros((1, 0, 1)), None, ATTENTION[mode])
                for n, mode in zip(z[f"{key}_split_lens"], z[f"{key}_modes"])
            ]
            rows.append(row(key, qwen2_mot.attention_mask(segments), z[key], 0.0))
    norm, mot_eps = params["mot"]["norm"], config.mot.norm_eps
    layer_norm = navit.layer_norm(z["ln_in"], params["vit"]["post_layernorm"], config.vit.norm_eps)
    group_norm = vae.group_norm(params["vae"]["encoder"]["norm_out"], nhwc(z["gn_in"]), config.vae)
    und, gen = (
        qwen2_mot.rms_norm(z["rms_in"], norm[expert]["scale"], mot_eps)
        for expert in qwen2_mot.EXPERTS
    )
    return [
        *rows,
        row("rms_norm", und, z["rms_norm"]),
        row("rms_norm_moe_gen", gen, z["rms_norm_moe_gen"]),
        row("ln_out", layer_norm, z["ln_out"]),
        row("gn_out", group_norm, nhwc(z["gn_out"])),
    ]


def vae_rows(golden: Golden, name: str, z: dict) -> list[Row]:
    """Moments, sampled latents, decoded pictures, and three tensors from inside."""
    params, config = golden.params["vae"], golden.config.vae
    rows = []
    for key in z:
        view, _, kind = key.partition("_")
        if kind == "moments":
            moments = jnp.concatenate(
                vae.moments(params, config, nhwc(z[f"{view}_pixels"])), axis=-1
            )
            rows.append(row(key, moments, nhwc(z[key])))
        if kind == "latent" and f"{view}_noise" in z:
            noise, pixels = nhwc(z[f"{view}_noise"]), nhwc(z[f"{view}_pixels"])
            latents = sample_latents(params, config, pixels, noise)
            rows.append(row(key, latents, nhwc(z[key])))
        if kind == "decoded":
            decoded = vae.decode(params, config, nhwc(z[f"{view}_latent"]))
            rows.append(row(key, decoded, nhwc(z[key])))
        if kind == "enc_down0":
            x = _encoder_levels(params, config, z[f"{view}_pixels"], 1)
            rows.append(row(key, x, nhwc(z[key])))
        if kind == "enc_mid_attn":
            x = _encoder_levels(params, config, z[f"{view}_pixels"], len(config.multipliers))
            x = vae.middle_attention(params["encoder"]["mid"], x, config)
            rows.append(row(key, x, nhwc(z[key])))
        if kind == "dec_mid_attn":
            x = nhwc(z[f"{view}_latent"]) / config.scale_factor + config.shift_factor
            x = vae.convolve(params["decoder"]["conv_in"], vae.pad(x))
            x = vae.middle_attention(params["decoder"]["mid"], x, config)
            rows.append(row(key, x, nhwc(z[key])))
    return rows


def _encoder_levels(params, config, pixels, count):
    x = vae.convolve(params["encoder"]["conv_in"], vae.pad(nhwc(pixels)))
    for i in range(count):
        x = vae.encoder_level(params["encoder"]["down"][str(i)], x, config)
    return x


def vit_rows(golden: Golden, name: str, z: dict) -> list[Row]:
    """Patches, position ids, ViT and connector of packed pictures."""
    params, config = golden.params, golden.config
    views = [nhwc(z[key][None]) for key in z if key.endswith("_pixels")]
    patch, side = config.vit.patch_size, config.vit.max_patches_per_side
    patches = [navit.patchify(view, patch) for view in views]
    ids = [navit.grid_ids(v.shape[1] // patch, v.shape[2] // patch, side) for v in views]
    first = jax.tree.map(lambda x: x[0], params["vit"]["layers"])
    found = {"patches": patches, "position_ids": [i[None] for i in ids]}
    found["embeddings"] = [
        navit.embed(params["vit"], config.vit, p, i) for p, i in zip(patches, ids)
    ]
    found["layer0"] = [navit.encoder_layer(first, config.vit, x) for x in found["embeddings"]]
    found["features"] = [navit.forward(params["vit"], config.vit, v) for v in views]
    found["llm_input"] = [
        model.connect(params, config, f, i) for f, i in zip(found["features"], ids)
    ]
    table = params["position_tables"]["vit"]
    found["vit_pos_embed"] = [table[i][None] for i in ids]
    found["connector"] = [x - table[i] for x, i in zip(found["llm_input"], ids)]
    return [row(key, np.concatenate(parts, axis=1)[0], z[key]) for key, parts in found.items()]


def guidance_rows(golden: Golden, name: str, z: dict) -> list[Row]:
    """Every case of cfg_math_cases.json."""
    cases = json.loads((golden.folder / "cfg_math_cases.json").read_text(encoding="utf-8"))
    rows = []
    for case in cases:
        prefix = "small_" if case["inputs"].startswith("small") else ""
        velocities = (z[f"{prefix}{k}"][None] for k in ("c", "u_text", "u_img"))
        config = GuidanceConfig(
            text_scale=case["text_scale"],
            image_scale=case["img_scale"],
            renorm=case["renorm_type"],
            renorm_min=case["renorm_min"],
        )
        key = f"out_{case['index']:02d}"
        rows.append(row(key, guidance.combine(config, *velocities)[0], z[key]))
    return rows


def transform_rows(golden: Golden, name: str, z: dict) -> list[Row]:
    """Resized pictures: the VAE's, and the ViT's from the raw and from the VAE's picture."""
    rows = []
    for key in z:
        if not key.endswith("_resized_uint8"):
            continue
        view = key.removesuffix("_resized_uint8")
        raw = z[f"{view}_uint8"]
        for_vae = _transform(golden, "vae_transform", raw)
        found = {
            f"{view}_vae": for_vae,
            f"{view}_vit": _transform(golden, "vit_transform", raw),
            f"{view}_vit_after_vae_resize": _transform(golden, "vit_transform", for_vae),
        }
        rows.append(row(key, for_vae, z[key], 0.0))
        for k, picture in found.items():
            rows.append(row(k, picture.transpose(2, 0, 1) / 127.5 - 1.0, z[k], 1e-6))
    return rows


def _transform(golden, rule, picture):
    sizes = golden.sizes[rule]
    width, height = image_transform.resized_shape(
        picture.shape[1],
        picture.shape[0],
        sizes["max_image_size"],
        sizes["min_image_size"],
        sizes["image_stride"],
        golden.sizes["max_pixels"],
    )
    return image_transform.resize(picture, width, height)


def resize_rows(golden: Golden) -> list[Row]:
    """One row: the resize rule on every size of resize_table.json."""
    path = golden.folder / "resize_table.json"
    if not path.exists():
        return []
    cases = json.loads(path.read_text(encoding="utf-8"))
    found = [
        image_transform.resized_shape(
            *case["in_wh"],
            case["max_size"],
            case["min_size"],
            case["stride"],
            case["max_pixels"],
            case["img_num"],
        )
        for case in cases
    ]
    return [row("resize_table", np.asarray(found), np.asarray([c["out_wh"] for c in cases]), 0.0)]
