"""openpi's checkpoints: reading their Orbax `params` directory."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from mbpo_jax.nn.gemma import GemmaConfig
from mbpo_jax.nn.siglip import SiglipConfig
from mbpo_jax.nn.stored_arrays import check_readable
from mbpo_jax.policy import network
from mbpo_jax.policy.config import Pi0Config, variants

DATA = ("manifest.ocdbt", "ocdbt.process_0", "d")  # what lies beside `_METADATA`
SIZE_FIELDS = ("vision", "language", "expert", "vocab_size", "action_dim", "pi05")


def load_openpi(path: str, config: Pi0Config, shardings: Any = None) -> dict:
    """The actor of an openpi checkpoint, float32.

    Args:
        path: a `params` directory, local or `gs://`. Leaves may end in openpi's extra `value`
            level or not.
        shardings: a tree of `jax.sharding.Sharding` like the actor, to read every array straight
            into its shards; the first device holds everything if it is None.

    Raises:
        ValueError: no checkpoint there, or one that is incomplete or corrupt, or its arrays are
            not those of `config`; one message lists what is missing, unexpected or of another
            shape, and the sizes that would fit.
    """
    path = _absolute(path)
    if not any((path / name).exists() for name in ("_METADATA", *DATA)):
        raise ValueError(
            f"no openpi checkpoint at {path}: give the `params` directory of a training step"
        )
    stored = check_readable(path, "copy it again from where it came")
    # openpi saves {"params": {..., leaf: {"value": array}}}; the two outer levels carry nothing.
    names = {key: key[1:-1] if key[-1] == "value" else key[1:] for key in stored}
    found = {"/".join(names[key]): tuple(leaf.shape) for key, leaf in stored.items()}
    expected = {
        "/".join(key): leaf.shape for key, leaf in flatten_dict(_abstract_actor(config)).items()
    }
    _check_shapes(path, found, expected, config)

    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = flatten_dict(shardings) if shardings is not None else {}
    arguments = {
        key: ocp.ArrayRestoreArgs(
            restore_type=jax.Array, dtype=jnp.float32, sharding=wanted.get(names[key], default)
        )
        for key in stored
    }
    restored = ocp.PyTreeCheckpointer().restore(
        path,
        args=ocp.args.PyTreeRestore(
            item=unflatten_dict(stored), restore_args=unflatten_dict(arguments)
        ),
    )
    return unflatten_dict({names[key]: leaf for key, leaf in flatten_dict(restored).items()})


def fitting_config(shapes: dict[str, tuple[int, ...]], config: Pi0Config) -> Pi0Config:
    """`config` with the sizes that arrays of these shapes (by '/'-joined name) have.

    Raises:
        KeyError: the arrays are not those of a π0 or π0.5.
    """
    image, layers = "PaliGemma/img", "PaliGemma/llm/layers"
    block = f"{image}/Transformer/encoderblock"
    depth, width, heads, _ = shapes[f"{block}/MultiHeadDotProductAttention_0/query/kernel"]
    patch = shapes[f"{image}/embedding/kernel"][0]
    mlp_dim = shapes[f"{block}/MlpBlock_0/Dense_0/kernel"][-1]
    grid = math.isqrt(shapes[f"{image}/pos_embedding"][1])
    members = []
    for suffix in ("", "_1"):
        layer_count, hidden, member_width = shapes[f"{layers}/mlp{suffix}/linear"]
        _, query_heads, head_dim, _ = shapes[f"{layers}/attn/attn_vec_einsum{suffix}/w"]
        grouped = shapes.get(f"{layers}/attn/kv_einsum{suffix}/w")
        kv_heads = grouped[2] if grouped else query_heads
        members.append(
            GemmaConfig(member_width, layer_count, hidden, query_heads, kv_heads, head_dim)
        )
    return dataclasses.replace(
        config,
        vision=SiglipConfig(width, depth, mlp_dim, heads, patch, patch * grid),
        language=members[0],
        expert=members[1],
        vocab_size=shapes["PaliGemma/llm/embedder/input_embedding"][0],
        action_dim=shapes["action_in_proj/kernel"][0],
        pi05="time_mlp_in/kernel" in shapes,
        use_proprio=config.use_proprio and "time_mlp_in/kernel" not in shapes,
    )


def _check_shapes(path, found: dict, expected: dict, config: Pi0Config) -> None:
    problems = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected: {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"shape: {name} is {found[name]}, the config needs {expected[name]}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    if problems:
        listing = "\n  ".join(problems)
        raise ValueError(
            f"the checkpoint {path} does not fit the config:\n  {listing}\n{_advice(found, config)}"
        )


def _advice(found: dict, config: Pi0Config) -> str:
    try:
        fitting = fitting_config(found, config)
    except (KeyError, ValueError) as error:
        return f"It is not a complete π0 or π0.5 checkpoint ({error})."

    def sizes(config: Pi0Config) -> list:
        return [getattr(config, field) for field in SIZE_FIELDS]

    for name, variant in variants().items():
        if sizes(fitting) == sizes(variant):
            return f"The variant {name!r} would fit."
    differing = [
        f"{field}={getattr(fitting, field)}"
        for field in SIZE_FIELDS
        if getattr(fitting, field) != getattr(config, field)
    ]
    return f"A config with {', '.join(differing)} would fit." if differing else ""


def _abstract_actor(config: Pi0Config) -> dict:
    return jax.eval_shape(lambda key: network.init(key, config), jax.random.key(0))


def _absolute(path: str) -> epath.Path:
    """Orbax takes absolute local paths and URLs."""
    return epath.Path(path) if "://" in str(path) else epath.Path(path).expanduser().resolve()
