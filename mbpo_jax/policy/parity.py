"""Compares the policy with golden arrays made by openpi and by πRL's public code."""

import json
from pathlib import Path

import numpy as np

from mbpo_jax.models.gemma import GemmaConfig
from mbpo_jax.models.siglip import SiglipConfig
from mbpo_jax.policy.config import Pi0Config

Row = tuple[str, float, float, bool]  # name, largest difference, tolerance, within it

NETWORK_TOLERANCE = 2e-5  # relative where values exceed 1
FLOW_TOLERANCE = 1e-6


def run(fixtures: str | Path) -> list[Row]:
    """Rows for every golden folder at or below `fixtures`.

    Raises:
        ValueError: there is no golden data below `fixtures`.
    """
    fixtures = Path(fixtures)
    rows = []
    for path in sorted(fixtures.rglob("io.npz")):
        rows += _network_rows(path.parent)
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


def nest(flat: dict[str, np.ndarray]) -> dict:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
