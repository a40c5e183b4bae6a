"""A tokenizer.json as the vocabulary of a GGUF file.

llama.cpp tokenizes byte-level BPE itself. `phi-2` is its name for GPT-2's splitting rule, which
`tokenizers` calls ByteLevel; a tokenizer that splits or normalizes otherwise would silently get
other ids there, so it is refused. Both match added tokens on the raw text, before that rule.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaphi.formats.files import TOKENIZER_BYTES, read_json_object
from megaphi.formats.tokenizer_files import end_of_text_id

# llama.cpp's llama_token_type
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class Vocabulary:
    """What the keys `tokenizer.ggml.*` say."""

    tokens: list[str]
    """Text of each id, as many as the model has; bytes as GPT-2's letters, added tokens as is."""
    types: list[int]
    """NORMAL, CONTROL (special), USER_DEFINED (added) or UNUSED (rows beyond the tokenizer)."""
    merges: list[str]
    """Pairs in the order of their rank, separated by a blank."""
    end_of_text: int
    """Id of the token between documents."""
    pre_tokenizer: str = "phi-2"
    """llama.cpp's name of the splitting rule."""


def read_vocabulary(tokenizer_dir: Path, vocab_size: int) -> Vocabulary:
    """Translate a directory's tokenizer.json.

    Args:
        tokenizer_dir: with tokenizer.json, and tokenizer_config.json for the end of text.
        vocab_size: ids of the model; those that the tokenizer lacks become unused `[PADi]`.

    Raises:
        ValueError: the file is unsound, llama.cpp could not tokenize alike, ids collide or are
            outside of the model's, or there is no end-of-text token.
    """
    path = tokenizer_dir / "tokenizer.json"
    values = read_json_object(path, TOKENIZER_BYTES)
    model = values.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise ValueError(
            f"{path}: model.type is not BPE, only byte-level BPE goes into a GGUF file"
        )
    _check_rule(values, model, path)
    tokens: dict[int, tuple[str, int]] = {}

    def add(identity: Any, text: Any, kind: int) -> None:
        if type(identity) is not int or not 0 <= identity < vocab_size or type(text) is not str:
            raise ValueError(
                f"{path}: token {str(text)[:40]!r} has the id {str(identity)[:20]}, the model has "
                f"{vocab_size} ids"
            )
        if identity in tokens and tokens[identity][0] != text:
            raise ValueError(f"{path}: id {identity} has two tokens")
        tokens[identity] = (text, kind)

    vocabulary, added = model.get("vocab"), values.get("added_tokens") or []
    if not isinstance(vocabulary, dict) or not isinstance(added, list):
        raise ValueError(f"{path}: model.vocab is no object, or added_tokens no list")
    for text, identity in vocabulary.items():
        add(identity, text, NORMAL)
    for entry in added:
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: an entry of added_tokens is no object")
        kind = CONTROL if entry.get("special") else USER_DEFINED
        add(entry.get("id"), entry.get("content"), kind)
    end = end_of_text_id(tokenizer_dir, vocab_size)
    if end is None:
        raise ValueError(f"{path}: has no end-of-text token, which llama.cpp needs to stop")
    rows = [tokens.get(identity, (f"[PAD{identity}]", UNUSED)) for identity in range(vocab_size)]
    texts = [text for text, _ in rows]
    if len(set(texts)) != len(texts):
        raise ValueError(f"{path}: a token has two ids")
    return Vocabulary(texts, [kind for _, kind in rows], _merges(model, path), end)


def _check_rule(values: dict[str, Any], model: dict[str, Any], path: Path) -> None:
    """Raise a `ValueError` unless text is split as GPT-2 does, and not changed before that."""
    rule = values.get("pre_tokenizer")
    rule = rule if isinstance(rule, dict) else {}
    if (
        rule.get("type") != "ByteLevel"
        or rule.get("add_prefix_space")
        or not rule.get("use_regex", True)
    ):
        raise ValueError(
            f"{path}: pre_tokenizer is not GPT-2's ByteLevel, and llama.cpp would split text "
            "otherwise than this model was trained on"
        )
    if values.get("normalizer") is not None:
        raise ValueError(f"{path}: has a normalizer, which llama.cpp would not apply")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{path}: model.{key} is not supported in a GGUF file")


def _merges(model: dict[str, Any], path: Path) -> list[str]:
    """The merges as text; `tokenizers` writes "a b" or ["a", "b"], by version."""
    merges = model.get("merges")
    found: list[str] = []
    for merge in merges if isinstance(merges, list) else [None]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        pair = pair if isinstance(pair, list) else []
        sound = all(type(part) is str and part and " " not in part for part in pair)
        if len(pair) != 2 or not sound:
            raise ValueError(f"{path}: model.merges is not a list of pairs")
        found.append(" ".join(pair))
    return found
