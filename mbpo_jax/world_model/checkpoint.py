"""Released BAGEL checkpoints (layout of ByteDance-Seed/BAGEL-7B-MoT): read into sharded arrays.

A directory holds `ema.safetensors` (or `model.safetensors`), `ae.safetensors`, `llm_config.json`
and `vit_config.json`. Sizes that the JSON files leave out are read off the arrays' shapes.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from mbpo_jax.nn import vae as vae_model
from mbpo_jax.nn.navit import NaViTConfig
from mbpo_jax.nn.vae import VAEConfig
from mbpo_jax.types import Params
from mbpo_jax.world_model import bagel
from mbpo_jax.world_model.config import UMMConfig

MODEL_FILES = ("ema.safetensors", "model.safetensors")
VAE_FILE = "ae.safetensors"
# BAGEL's code fixes these for its autoencoder; a vae_config.json overrides them.
FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159

_COPY_AGAIN = "Copy it again from the released checkpoint."

_ADAPTERS = {
    "time_embedder.fc1": "time_embedder.mlp.0",
    "time_embedder.fc2": "time_embedder.mlp.2",
}


def load_bagel(
    directory: str | Path,
    config: UMMConfig,
    shardings: Callable[[Params], Params] | None = None,
) -> tuple[UMMConfig, Params]:
    """Configuration and parameters {"mot", "vit", "adapters", "position_tables", "vae"}.

    Args:
        config: its choices are kept (prediction, guidance, image sizes, dtypes, ...); the sizes of
            the networks are replaced by the checkpoint's.
        shardings: from a tree of shapes to a tree of `jax.sharding.Sharding`; each device then
            reads its own part only. None puts everything on the first device.

    Raises:
        ValueError: a file is missing, truncated or another, a configuration lacks an entry, or
            arrays are missing, unexpected or of another shape; all of them are named in one
            message.
    """
    directory = Path(directory)
    with_weights = {**_open(_model_file(directory)), **_open(_existing(directory / VAE_FILE))}
    shapes = {name: tuple(f.get_slice(name).get_shape()) for name, f in with_weights.items()}
    config = read_config(directory, config, shapes)

    released = dataclasses.replace(config, actions_as="text", prediction="velocity", proprio_dim=0)
    tree = jax.eval_shape(lambda: _fresh(released, 0))
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = {dotted(path): released_names(dotted(path), leaf.shape) for path, leaf in leaves}
    _account(directory, names, {dotted(path): leaf.shape for path, leaf in leaves}, shapes)

    placed = shardings(tree) if shardings else None
    placed = jax.tree.leaves(placed) if placed is not None else [None] * len(leaves)
    arrays = [
        _read(names[dotted(path)], dotted(path), leaf.shape, with_weights, sharding)
        for (path, leaf), sharding in zip(leaves, placed)
    ]
    return config, jax.tree_util.tree_unflatten(structure, arrays)


def read_config(
    directory: Path, config: UMMConfig, shapes: dict[str, tuple[int, ...]]
) -> UMMConfig:
    """`config` with the checkpoint's sizes."""
    llm = _entries(
        _existing(directory / "llm_config.json"),
        (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
        ),
        ("rope_theta", "rms_norm_eps"),
    )
    vit = _entries(
        _existing(directory / "vit_config.json"),
        ("hidden_size", "num_attention_heads", "intermediate_size"),
        defaults={"layer_norm_eps": 1e-6},
    )
    vae = {"scale_factor": FLUX_SCALE, "shift_factor": FLUX_SHIFT}
    vae_file = directory / "vae_config.json"
    if vae_file.exists():
        vae = _entries(vae_file, defaults=vae)

    def shape(name, axes=2):
        found = shapes.get(name)
        if found is None or len(found) != axes:
            raise ValueError(
                f"The checkpoint in {directory} has no array {name!r} of {axes} axes: "
                f"{'it is missing' if found is None else f'its shape is {found}'}. {_COPY_AGAIN}"
            )
        return found

    patch_values = shape("vit_model.vision_model.embeddings.patch_embedding.weight")[1]
    widths = [0] * (1 + max(_numbers(shapes, r"encoder\.down\.(\d+)\.")))
    for i in range(len(widths)):
        widths[i] = shape(f"encoder.down.{i}.block.0.conv1.weight", 4)[0]
    channels, pixels = shape("encoder.conv_in.weight", 4)[:2]
    z_channels = shape("decoder.conv_in.weight", 4)[1]
    return dataclasses.replace(
        config,
        mot=dataclasses.replace(
            config.mot,
            vocab_size=shape("language_model.lm_head.weight")[0],
            hidden_size=llm["hidden_size"],
            num_layers=llm["num_hidden_layers"],
            num_heads=llm["num_attention_heads"],
            num_kv_heads=llm["num_key_value_heads"],
            mlp_size=llm["intermediate_size"],
            rope_theta=llm["rope_theta"],
            norm_eps=llm["rms_norm_eps"],
        ),
        vit=NaViTConfig(
            hidden_size=vit["hidden_size"],
            num_layers=1 + max(_numbers(shapes, r"vit_model\..*\.layers\.(\d+)\.")),
            num_heads=vit["num_attention_heads"],
            mlp_size=vit["intermediate_size"],
            patch_size=math.isqrt(patch_values // 3),
            max_patches_per_side=math.isqrt(shape("vit_pos_embed.pos_embed")[0]),
            norm_eps=vit["layer_norm_eps"],
            dtype=config.vit.dtype,
        ),
        vae=VAEConfig(
            channels=channels,
            multipliers=tuple(w // channels for w in widths),
            num_res_blocks=1 + max(_numbers(shapes, r"encoder\.down\.\d+\.block\.(\d+)\.")),
            z_channels=z_channels,
            scale_factor=vae["scale_factor"],
            shift_factor=vae["shift_factor"],
            norm_groups=32,
            patch_size=math.isqrt(pixels // 3),
            dtype=config.vae.dtype,
        ),
        latent_patch=math.isqrt(shape("vae2llm.weight")[1] // z_channels),
        max_latent_side=math.isqrt(shape("latent_pos_embed.pos_embed")[0]),
    )


def _entries(
    path: Path,
    counts: Sequence[str] = (),
    numbers: Sequence[str] = (),
    defaults: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, Any]:
    """Entries of a JSON file: `counts` are whole numbers from 1, the others are finite."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or no JSON: {error}. {_COPY_AGAIN}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds no map of entries. {_COPY_AGAIN}")
    found = {**defaults, **document}
    wrong = [
        f"{name} is {found.get(name, 'missing')!r:.80}"
        for name in (*counts, *numbers, *defaults)
        if type(found.get(name)) not in ((int,) if name in counts else (int, float))
        or not math.isfinite(found[name])
        or (name in counts and found[name] < 1)
    ]
    if wrong:
        raise ValueError(f"{path} lacks what it must have: {', '.join(wrong)}. {_COPY_AGAIN}")
    return {name: found[name] for name in (*counts, *numbers, *defaults)}


def _fresh(config: UMMConfig, seed: int) -> Params:
    key = jax.random.key(seed)
    return {**bagel.init(config, 1, key), "vae": vae_model.init(config.vae, key)}


def dotted(path: tuple) -> str:
    """A leaf's path in the parameters with dots."""
    return ".".join(str(entry.key) for entry in path)


def is_stacked(path: str) -> bool:
    """Whether the array at `path` holds all layers, one after the other."""
    return path.startswith(("mot.layers.", "vit.layers."))


def released_names(path: str, shape: tuple[int, ...]) -> list[str]:
    """Released names of the array at `path`; one per layer where layers are stacked."""
    room, rest = path.split(".", 1)
    if room == "position_tables":
        return [f"{rest}_pos_embed.pos_embed"]
    module, leaf = rest.rsplit(".", 1)
    leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)
    if room == "vae":
        return [f"{module}.{leaf}"]
    if room == "adapters":
        return [f"{_ADAPTERS.get(module, module)}.{leaf}"]
    if room == "vit":
        return _vit_names(module, leaf, shape)
    if module.startswith("layers."):
        _, expert, module = module.split(".", 2)
        module = _with_expert(module, expert)
        prefix = "language_model.model.layers"
        return [f"{prefix}.{i}.{module}.{leaf}" for i in range(shape[0])]
    if module.startswith("norm."):
        return [f"language_model.model.{_with_expert('norm', module[5:])}.{leaf}"]
    prefix = "language_model" if module == "lm_head" else "language_model.model"
    return [f"{prefix}.{module}.{leaf}"]


def _vit_names(module, leaf, shape):
    prefix = "vit_model.vision_model"
    if module.startswith("layers."):
        module = module.removeprefix("layers.")
        return [f"{prefix}.encoder.layers.{i}.{module}.{leaf}" for i in range(shape[0])]
    if module != "post_layernorm":
        prefix += ".embeddings"
    return [f"{prefix}.{module}.{leaf}"]


def _with_expert(module, expert):
    if expert == "und":
        return module
    if module.startswith("mlp."):
        return module.replace("mlp.", "mlp_moe_gen.", 1)
    return f"{module}_moe_gen"


def _released_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    shape = shape[1:] if is_stacked(path) else shape
    if not path.endswith(".kernel"):
        return shape
    return shape[::-1] if len(shape) == 2 else (shape[3], shape[2], shape[0], shape[1])


def _account(directory, names, ours, shapes):
    expected = {
        name: _released_shape(path, ours[path]) for path, group in names.items() for name in group
    }
    missing = sorted(set(expected) - set(shapes))
    unexpected = sorted(set(shapes) - set(expected))
    wrong = [
        f"{n}: {shapes[n]} instead of {expected[n]}"
        for n in sorted(set(expected) & set(shapes))
        if shapes[n] != expected[n]
    ]
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    if any(lists.values()):
        found = "; ".join(f"{len(v)} {k}: {', '.join(v)}" for k, v in lists.items() if v)
        raise ValueError(
            f"The checkpoint in {directory} does not fit its configuration. Arrays {found}."
        )


def _read(sources, path, shape, files, sharding):
    def part(index):
        rows = range(*index[0].indices(shape[0])) if is_stacked(path) else [0]
        inner = index[1:] if is_stacked(path) else index
        layers = [_read_one(files, sources[i], path, inner) for i in rows]
        return np.stack(layers) if is_stacked(path) else layers[0]

    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.make_array_from_callback(shape, sharding, part)


def _read_one(files, name, path, index):
    """The part `index` (in our layout) of one released array, in our layout."""
    stored: Any = files[name].get_slice(name)
    if not path.endswith(".kernel"):
        return stored[tuple(index)]
    if len(index) == 2:
        return stored[index[1], index[0]].T
    return stored[index[3], index[2], index[0], index[1]].transpose(2, 3, 1, 0)


def _open(path: Path):
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file: {error}. {_COPY_AGAIN}"
        ) from error
    return {name: file for name in file.keys()}  # noqa: SIM118 (not a dict)


def _model_file(directory: Path) -> Path:
    for name in MODEL_FILES:
        if (directory / name).exists():
            return directory / name
    raise ValueError(f"{directory} holds neither {MODEL_FILES[0]} nor {MODEL_FILES[1]}.")


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"{path} is missing: it belongs to a BAGEL checkpoint. {_COPY_AGAIN}")
    return path


def _numbers(names, pattern: str) -> list[int]:
    found = [int(m.group(1)) for m in (re.match(pattern, n) for n in names) if m]
    if not found:
        raise ValueError(f"The checkpoint has no array whose name matches {pattern!r}.")
    return found
