"""Text to token ids: a small embedded vocabulary, PaliGemma's and Qwen2's files by path."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from mbpo_jax.types import Prompt

# Every LIBERO instruction is made of these words; the last lines serve questions and real robots.
# Ids follow from the order here: appending is the only change that keeps checkpoints readable.
_WORDS = """
akita alphabet and at back basket bbq between black book both bottle bottom bowl box butter cabinet
caddy center cheese chocolate close compartment cookie cookies cream drawer dressing from front
frying in inside it juice ketchup layer left microwave middle milk moka mug next of off on open
orange pan pick place plate pot pots pudding push put rack ramekin red right salad sauce shelf soup
stack stove table the them to tomato top tray turn under up white wine wooden yellow
is task done has been robot cup pen board plug cable insert fold towel wipe positive negative
"""
_FIRST_WORDS = """
close fold insert open pick place plug push put stack turn wipe
Close Open Pick Push Put Stack Turn Is
"""
_PHRASES = ["pick up the", "put the", " and place it", " and put the", " and the"]
_PHRASES += [f" {word} the" for word in ("in", "of", "on", "to")]
_ACTION_TEXT = ["Step ", ": [", ", ", "]; ", "Yes", "No"]
_SPECIAL = ["<pad>", "<bos>", "<eos>", "<image>", "</image>"]
_NIBBLES = 16


class _Refused(ValueError):
    """A message that says all."""


class Tokenizer(Protocol):
    """Ids of a text; all below `vocab_size`."""

    vocab_size: int
    pad_id: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class WorldTokenizer(Tokenizer, Protocol):
    """A tokenizer that also has the world model's markers; `encode` adds none of them."""

    bos_id: int
    eos_id: int
    start_of_image_id: int
    end_of_image_id: int


class EmbeddedTokenizer:
    """A fixed vocabulary for robot instructions and action texts, without any file.

    Words (with the space before them), a few phrases, the integers 0..256 and the punctuation of
    action texts are one token each: a LIBERO instruction takes 3 to 14. Any other text is spelled
    out: a printable ASCII character is one token, every other byte of UTF-8 two. The longest match
    wins, and `decode` gives back exactly the text.
    """

    pad_id, bos_id, eos_id, start_of_image_id, end_of_image_id = range(len(_SPECIAL))

    def __init__(self):
        self._first_piece = len(_SPECIAL) + _NIBBLES
        printable = ["\n", *map(chr, range(32, 127))]
        integers = [str(i) for i in range(10, 257)]
        spaced = [f" {word}" for word in _WORDS.split()]
        self._pieces = [
            *printable,
            *integers,
            *_ACTION_TEXT,
            *_FIRST_WORDS.split(),
            *_PHRASES,
            *spaced,
        ]
        self._ids = {piece: self._first_piece + i for i, piece in enumerate(self._pieces)}
        longest_first = sorted(self._pieces, key=len, reverse=True)
        self._split = re.compile("|".join([*map(re.escape, longest_first), "."]), re.DOTALL)
        self.vocab_size = self._first_piece + len(self._pieces)

    def encode(self, text: str) -> list[int]:
        ids = []
        for piece in self._split.findall(text):
            if piece in self._ids:
                ids.append(self._ids[piece])
            else:
                for byte in piece.encode():
                    ids += [len(_SPECIAL) + byte // 16, len(_SPECIAL) + byte % 16]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; markers and padding have none."""
        text, nibbles = bytearray(), []
        for i in ids:
            if i >= self._first_piece:
                text += self._pieces[i - self._first_piece].encode()
            elif i >= len(_SPECIAL):
                nibbles.append(i - len(_SPECIAL))
                if len(nibbles) == 2:
                    text.append(16 * nibbles[0] + nibbles[1])
                    nibbles = []
        return text.decode(errors="replace")


class PaliGemmaTokenizer:
    """PaliGemma's SentencePiece model, in openpi's prompt format for π0 and π0.5 without state.

    Raises:
        ValueError: `path` is not a SentencePiece model.
    """

    pad_id = 0

    def __init__(self, path: str | Path):
        import sentencepiece

        if not Path(path).is_file():
            raise ValueError(f"no SentencePiece model at {path}")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model ({error})") from error
        self.vocab_size = self._model.vocab_size()

    def encode(self, text: str) -> list[int]:
        """bos, the text with underscores and line breaks as spaces, and a final line break, at
        which the answer (the actions) starts."""
        text = text.strip().replace("_", " ").replace("\n", " ")
        return self._model.encode(text, add_bos=True) + self._model.encode("\n")

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])


class QwenTokenizer:
    """Qwen2's byte-level BPE with the marker tokens that BAGEL uses.

    Args:
        directory: holds tokenizer.json, or vocab.json, merges.txt and tokenizer_config.json.

    Raises:
        ValueError: files or marker tokens are missing, or a file is damaged.
    """

    pad_id = 0

    def __init__(self, directory: str | Path):
        import tokenizers

        directory = Path(directory)
        try:
            if (directory / "tokenizer.json").is_file():
                self._model = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
            else:
                self._model = _byte_level_bpe(directory)
            self.vocab_size = max(self._model.get_vocab().values()) + 1
        except _Refused:
            raise
        except Exception as error:  # the library's own are bare
            raise ValueError(
                f"a file of the tokenizer in {directory} is damaged or another ({error}): copy the "
                "files again that come with BAGEL"
            ) from error
        self.bos_id, self.eos_id, self.start_of_image_id, self.end_of_image_id = (
            self._marker(token, directory)
            for token in ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
        )

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    def _marker(self, token: str, directory: Path) -> int:
        index = self._model.token_to_id(token)
        if index is None:
            raise ValueError(
                f"the tokenizer in {directory} has no token {token}: use the files that come with "
                "BAGEL (with tokenizer_config.json, which lists the added tokens)"
            )
        return index


def _byte_level_bpe(directory: Path):
    """Qwen2's pipeline around vocab.json and merges.txt; added tokens keep their listed ids."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    missing = [name for name in ("vocab.json", "merges.txt") if not (directory / name).is_file()]
    if missing:
        raise _Refused(f"no tokenizer in {directory}: missing tokenizer.json, or {missing}")
    model = tokenizers.Tokenizer(
        models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    )
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    config = directory / "tokenizer_config.json"
    if config.is_file():
        listed = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        for index, token in sorted((int(i), entry["content"]) for i, entry in listed.items()):
            model.add_special_tokens([token])
            if model.token_to_id(token) != index:
                raise _Refused(
                    f"{config} lists {token} as {index}, but with {directory / 'vocab.json'} it is "
                    f"{model.token_to_id(token)}: the files do not belong together"
                )
    return model


def pad_prompt(ids: Sequence[int], length: int, text: str, pad_id: int = 0) -> Prompt:
    """`ids` of `text` padded on the right: NumPy int32 [length] and bool [length].

    Raises:
        ValueError: there are more than `length` of them.
    """
    if len(ids) > length:
        raise ValueError(
            f"the prompt {text!r} takes {len(ids)} tokens, more than the budget of {length}: "
            "raise max_prompt_tokens or shorten the instruction"
        )
    tokens = np.full(length, pad_id, np.int32)
    tokens[: len(ids)] = ids
    return Prompt(tokens=tokens, mask=np.arange(length) < len(ids))
