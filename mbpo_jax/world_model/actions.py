"""Actions as BAGEL text: `Step 1: [a, b, …]; Step 2: […]`, integers 0..256, inside jit."""

import jax.numpy as jnp
import numpy as np

from mbpo_jax.shapes import Array, Bool, Float, Int
from mbpo_jax.world_model.bagel import Tokenizer

LEVELS = 257


def discretise(actions: Float[Array, "*B"]) -> Int[Array, "*B"]:
    """round((a + 1) * 128) of actions clipped to [-1, 1]: -1 -> 0, 0 -> 128, 1 -> 256."""
    return jnp.round((jnp.clip(actions, -1.0, 1.0) + 1.0) * 128.0).astype(jnp.int32)


class ActionText:
    """Token ids of an action chunk between bos and eos, with a static shape under jit.

    The text is a fixed frame with holes; a hole takes the tokens of a number from a table, as many
    slots as the longest number needs, the rest masked.

    Raises:
        ValueError: the tokenizer merges numbers with the text around them, so that the pieces do
            not add up to the whole text's tokens.
    """

    def __init__(self, tokenizer: Tokenizer, chunk: int, action_dim: int):
        self.chunk, self.action_dim = chunk, action_dim
        numbers = [tokenizer.encode(str(i)) for i in range(LEVELS)]
        self.width = max(map(len, numbers))
        self.number_ids = np.zeros((LEVELS, self.width), np.int32)
        self.number_mask = np.zeros((LEVELS, self.width), bool)
        for i, ids in enumerate(numbers):
            self.number_ids[i, : len(ids)] = ids
            self.number_mask[i, : len(ids)] = True

        # `frame` holds the fixed tokens, and -1 - i in the slots of the chunk's i-th number.
        frame = [tokenizer.bos_id]
        for step in range(chunk):
            frame += tokenizer.encode("]; Step " if step else "Step ")
            frame += tokenizer.encode(str(step + 1)) + tokenizer.encode(": [")
            for dim in range(action_dim):
                frame += tokenizer.encode(", ") if dim else []
                frame += [-1 - (step * action_dim + dim)] * self.width
        self.frame = np.asarray([*frame, *tokenizer.encode("]"), tokenizer.eos_id], np.int32)
        self._check(tokenizer)

    def _check(self, tokenizer):
        integers = np.arange(self.chunk * self.action_dim) * 37 % LEVELS
        integers = integers.reshape(self.chunk, self.action_dim)
        ids, mask = self.fill(integers)
        text = chunk_text(integers)
        expected = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        if list(np.asarray(ids)[np.asarray(mask)]) != expected:
            raise ValueError(
                f"This tokenizer does not split numbers from the text around them: {text[:60]!r} "
                "is not the sum of its pieces. Use actions_as='embedding'."
            )

    def fill(
        self, integers: Int[Array, "*B k A"]
    ) -> tuple[Int[Array, "*B n"], Bool[Array, "*B n"]]:
        """Token ids and validity of integer actions in 0..256."""
        hole = np.where(self.frame < 0, -1 - self.frame, 0)
        is_hole = self.frame < 0
        slot = np.zeros_like(self.frame)
        for i in range(1, len(self.frame)):
            slot[i] = slot[i - 1] + 1 if is_hole[i] and self.frame[i] == self.frame[i - 1] else 0
        flat = jnp.reshape(integers, (*integers.shape[:-2], -1))[..., hole]
        ids = jnp.where(is_hole, jnp.asarray(self.number_ids)[flat, slot], self.frame)
        return ids, jnp.where(is_hole, jnp.asarray(self.number_mask)[flat, slot], True)

    def __call__(
        self, actions: Float[Array, "*B k A"]
    ) -> tuple[Int[Array, "*B n"], Bool[Array, "*B n"]]:
        """Token ids and validity of actions in [-1, 1] (clipped)."""
        return self.fill(discretise(actions))


def chunk_text(integers: np.ndarray) -> str:
    """The text of integer actions [k, A]."""
    steps = (", ".join(str(int(i)) for i in row) for row in integers)
    return "; ".join(f"Step {i}: [{row}]" for i, row in enumerate(steps, start=1))
