"""Golden comparisons of what is computed over cached contexts: answers and guided pictures."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from experiments.parity_suites.bagel_golden import Golden, Row, nhwc, row, sample_latents
from mbpo_jax.nn import navit, qwen2_mot, vae
from mbpo_jax.nn.qwen2_mot import Cache, Segment
from mbpo_jax.world_model import bagel, generation
from mbpo_jax.world_model.config import GuidanceConfig
from mbpo_jax.world_model.guidance import is_active

FLOW_TOLERANCE = 1e-4  # velocities and latents of a guided generation


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
    pixels = nhwc(arrays["padded_images"])
    latents = sample_latents(params["vae"], config.vae, pixels, nhwc(noise))
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
