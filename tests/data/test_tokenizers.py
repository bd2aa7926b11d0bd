import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from mbpo_jax.data.tokenizers import (
    EmbeddedTokenizer,
    PaliGemmaTokenizer,
    QwenTokenizer,
    pad_prompt,
)

EMBEDDED = EmbeddedTokenizer()


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_embedded_is_lossless(text):
    ids = EMBEDDED.encode(text)
    assert EMBEDDED.decode(ids) == text
    assert all(0 <= i < EMBEDDED.vocab_size for i in ids)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("turn on the stove", ["turn", " on the", " stove"]),
        (
            "put both moka pots on the stove",
            ["put", " both", " moka", " pots", " on the", " stove"],
        ),
        ("Step 12: [0, 256]; ", ["Step ", "12", ": [", "0", ", ", "256", "]; "]),
        ("Yes", ["Yes"]),
        ("No", ["No"]),
        ("257", ["25", "7"]),
        ("putty", ["put", "t", "y"]),
    ],
)
def test_embedded_pieces(text, pieces):
    assert [EMBEDDED.decode([i]) for i in EMBEDDED.encode(text)] == pieces


def test_embedded_integers_are_one_token_each():
    ids = [EMBEDDED.encode(str(i)) for i in range(257)]
    assert {len(i) for i in ids} == {1}
    assert len({i[0] for i in ids}) == 257


def test_embedded_ids_are_fixed():
    # Checkpoints hold an embedding per id: these may never change.
    assert (EMBEDDED.pad_id, EMBEDDED.bos_id, EMBEDDED.eos_id) == (0, 1, 2)
    assert (EMBEDDED.start_of_image_id, EMBEDDED.end_of_image_id) == (3, 4)
    assert EMBEDDED.encode("\n") == [21]
    assert EMBEDDED.encode("256") == [21 + 96 + 246]
    # U+00E9 is the bytes C3 A9; nibble n has the id 5 + n.
    assert EMBEDDED.encode("é") == [5 + 0xC, 5 + 0x3, 5 + 0xA, 5 + 0x9]
    assert EMBEDDED.vocab_size <= 512


def test_action_text_splits_where_the_world_model_does():
    whole = "Step 1: [0, 128]; Step 2: [256, 7]"
    parts = ["Step ", "1", ": [", "0", ", ", "128", "]; Step ", "2", ": [", "256", ", ", "7", "]"]
    assert "".join(parts) == whole
    assert [i for part in parts for i in EMBEDDED.encode(part)] == EMBEDDED.encode(whole)


def test_paligemma_prompt_format(tmp_path):
    corpus = ["put the bowl on the plate", "pick up the book", "turn on the stove"] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        vocab_size=26,
        user_defined_symbols=["\n"],
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    path = tmp_path / "paligemma.model"
    path.write_bytes(model.getvalue())
    tokenizer = PaliGemmaTokenizer(path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = tokenizer.encode("  put_the bowl\non the plate\n")
    assert ids[0] == processor.bos_id()
    assert ids[-1] == processor.piece_to_id("\n")
    assert ids.count(processor.piece_to_id("\n")) == 1
    assert tokenizer.decode(ids).rstrip() == "put the bowl on the plate"
    assert tokenizer.vocab_size == 26


def test_paligemma_bad_file(tmp_path):
    with pytest.raises(ValueError, match="no SentencePiece model"):
        PaliGemmaTokenizer(tmp_path / "missing.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        PaliGemmaTokenizer(tmp_path / "text.model")


@pytest.fixture
def qwen_files(tmp_path):
    """All 256 bytes and two merges, "in" and "12", with BAGEL's markers at 258.. ."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "in", "12"])}
    markers = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\ni n\n1 2\n")
    listed = {str(258 + i): {"content": marker} for i, marker in enumerate(markers)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    return tmp_path


def test_qwen_from_vocabulary_and_merges(qwen_files):
    tokenizer = QwenTokenizer(qwen_files)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (258, 259)
    assert (tokenizer.start_of_image_id, tokenizer.end_of_image_id) == (260, 261)
    assert tokenizer.vocab_size == 262
    vocabulary = json.loads((qwen_files / "vocab.json").read_text())
    # A space belongs to the word after it (as "Ġ"); a digit never merges.
    expected = ["in", "Ġ", "in", "1", "2"]
    assert tokenizer.encode("in in12") == [vocabulary[piece] for piece in expected]
    assert tokenizer.decode(tokenizer.encode("Step 1: [0, é]")) == "Step 1: [0, é]"


def test_qwen_from_tokenizer_json(qwen_files, tmp_path):
    first = QwenTokenizer(qwen_files)
    other = tmp_path / "json"
    other.mkdir()
    first._model.save(str(other / "tokenizer.json"))
    second = QwenTokenizer(other)
    assert second.encode("put it in the bin\n") == first.encode("put it in the bin\n")
    assert second.eos_id == 259


def test_qwen_bad_files(qwen_files, tmp_path):
    config = qwen_files / "tokenizer_config.json"
    good = config.read_text()
    config.write_text(good.replace("259", "300"))
    with pytest.raises(ValueError, match="do not belong together"):
        QwenTokenizer(qwen_files)
    config.unlink()
    with pytest.raises(ValueError, match="has no token"):
        QwenTokenizer(qwen_files)
    (qwen_files / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"missing tokenizer\.json, or \['merges\.txt'\]"):
        QwenTokenizer(qwen_files)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["<!DOCTYPE html>", "[1]", '{"added_tokens_decoder": 3}'])
def test_qwen_damaged_files(qwen_files, name, content):
    (qwen_files / name).write_text(content)
    with pytest.raises(ValueError, match="token") as error:
        QwenTokenizer(qwen_files)
    assert str(qwen_files) in str(error.value)


def test_qwen_damaged_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.json").write_text("<!DOCTYPE html>")
    with pytest.raises(ValueError, match="damaged") as error:
        QwenTokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_pad_prompt():
    prompt = pad_prompt([7, 8, 9], 5, "a b c")
    np.testing.assert_array_equal(prompt.tokens, [7, 8, 9, 0, 0])
    np.testing.assert_array_equal(prompt.mask, [True, True, True, False, False])
    assert prompt.tokens.dtype == np.int32
    assert pad_prompt([7, 8, 9], 3, "a b c").mask.all()
    with pytest.raises(ValueError, match=r"'a b c' takes 3 tokens, more than the budget of 2"):
        pad_prompt([7, 8, 9], 2, "a b c")
