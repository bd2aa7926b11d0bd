"""Actions as text."""

import numpy as np
import pytest

from mbpo_jax.world_model.actions import ActionText, chunk_text, discretise

from .conftest import WordTokenizer


def test_integers_by_hand():
    actions = np.array([-1.0, -0.5, 0.0, 0.25, 1.0, -3.0, 2.0, 0.0039, 0.0040])
    # round((a + 1) * 128): 0.0039 * 128 = 0.4992, 0.0040 * 128 = 0.512; beyond +-1 is clipped.
    expected = [0, 64, 128, 160, 256, 0, 256, 128, 129]
    np.testing.assert_array_equal(discretise(actions), expected)


def test_text_by_hand():
    assert chunk_text(np.array([[0, 128], [256, 7]])) == "Step 1: [0, 128]; Step 2: [256, 7]"


def test_tokens_equal_those_of_the_text():
    tokenizer = WordTokenizer()
    writer = ActionText(tokenizer, chunk=2, action_dim=2)
    ids, mask = writer(np.array([[[-1.0, 0.0], [1.0, -0.9375]], [[1.0, 1.0], [1.0, 1.0]]]))
    assert ids.shape == mask.shape
    found = [list(np.asarray(i)[np.asarray(m)]) for i, m in zip(ids, mask)]
    texts = ["Step 1: [0, 128]; Step 2: [256, 8]", "Step 1: [256, 256]; Step 2: [256, 256]"]
    for row, text in zip(found, texts):
        assert row == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]


def test_tokenizer_that_merges_numbers_with_text():
    class Merging(WordTokenizer):
        def encode(self, text):
            return [len(text)]

    with pytest.raises(ValueError, match="does not split numbers"):
        ActionText(Merging(), 2, 2)
