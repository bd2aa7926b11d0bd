"""Low-rank adapters and frozen parameters (LoRA, Hu et al., arXiv 2106.09685).

An adapter of a weight W [..., in, out] is a pair a [..., in, r], b [..., r, out]; the network runs
on W + (alpha / r)·a·b. Adapters live beside the network's tree under "lora", keyed by the weight's
path, so the architecture does not know about them and the exported policy is a plain one. Patterns
are regular expressions that match from the start of a '/'-joined path.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mbpo_jax.nn.layers import lecun_normal
from mbpo_jax.policy.config import LoraConfig


def init(key: jax.Array, actor: dict, config: LoraConfig) -> dict:
    """Adapters {path: {"a", "b"}} for every weight whose path matches one of `config.modules`; b is
    zero, so they change nothing at first.

    Raises:
        ValueError: no weight matches.
    """
    adapters = {}
    for path, weight in _paths(actor):
        if weight.ndim >= 2 and _matches(path, config.modules):
            key, adapter_key = jax.random.split(key)
            *stack, fan_in, fan_out = weight.shape
            adapters[path] = {
                "a": lecun_normal(adapter_key, (*stack, fan_in, config.rank), fan_in),
                "b": jnp.zeros((*stack, config.rank, fan_out)),
            }
    if not adapters:
        raise ValueError(f"lora.modules {config.modules} match no weight of the network")
    return adapters


def merge(actor: dict, config: LoraConfig) -> dict:
    """The plain network tree, adapters added into its weights."""
    adapters = actor.get("lora", {})

    def add(path: str, weight: jax.Array) -> jax.Array:
        if path not in adapters:
            return weight
        a, b = adapters[path]["a"], adapters[path]["b"]
        return weight + config.alpha / config.rank * (a @ b)

    return _map({name: module for name, module in actor.items() if name != "lora"}, add)


def stop_frozen(actor: dict, frozen: tuple[str, ...]) -> dict:
    """No gradient is computed for weights whose path begins with one of `frozen` (patterns)."""
    if not frozen:
        return actor
    return _map(
        actor,
        lambda path, leaf: jax.lax.stop_gradient(leaf) if _matches(path, frozen) else leaf,
    )


def trainable(actor: dict, frozen: tuple[str, ...]) -> dict:
    """The actor's tree with True where a parameter is trained; for `optax.masked` and the like."""
    return _map(actor, lambda path, leaf: not _matches(path, frozen))


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(re.match(pattern, path) for pattern in patterns)


def _map(tree: Any, function: Callable[[str, Any], Any]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda keys, x: function(_join(keys), x), tree)


def _paths(tree: Any) -> list[tuple[str, Any]]:
    return [(_join(keys), leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _join(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")
