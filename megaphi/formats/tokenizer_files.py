"""The tokenizer that travels with a model: found, copied, asked for its end-of-text token."""

import shutil
from pathlib import Path
from typing import Any

from megaphi.formats.files import TOKENIZER_BYTES, read_json_object

END_OF_TEXT = "<|endoftext|>"
CODEGEN_END_OF_TEXT_ID = 50256
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def find_tokenizer(source: Path) -> Path | None:
    """The directory with the tokenizer.json that belongs to a model, if there is one.

    It is looked for in a checkpoint's `tokenizer/`, in that of its run, and in a Hugging Face
    directory itself.
    """
    candidates = [source / "tokenizer", source]
    if source.name.startswith("step-"):
        candidates.append(source.parent / "tokenizer")
    return next((path for path in candidates if (path / "tokenizer.json").is_file()), None)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer files of a directory, and nothing else; return their names.

    Raises:
        ValueError: a file is too large for what it should be.
    """
    target.mkdir(exist_ok=True)
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        if (source / name).stat().st_size > TOKENIZER_BYTES:
            raise ValueError(f"{source / name}: too large for a tokenizer's file")
        shutil.copyfile(source / name, target / name)
    return names


def end_of_text_id(tokenizer_dir: Path | None, vocab_size: int) -> int | None:
    """Id of the token between documents.

    It is what the tokenizer calls its `eos_token` (`<|endoftext|>` if it does not say). Without a
    tokenizer it is CodeGen's, where the vocabulary is large enough.

    Raises:
        ValueError: the tokenizer's files are not readable, or its token is outside `vocab_size`.
    """
    if tokenizer_dir is None:
        return CODEGEN_END_OF_TEXT_ID if vocab_size > CODEGEN_END_OF_TEXT_ID else None
    path = tokenizer_dir / "tokenizer.json"
    tokenizer = read_json_object(path, TOKENIZER_BYTES)
    token: Any = None
    if (tokenizer_dir / "tokenizer_config.json").is_file():
        token = read_json_object(tokenizer_dir / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    token = token if isinstance(token, str) else END_OF_TEXT
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict):
            ids[str(entry.get("content"))] = entry.get("id")
    identity = ids.get(token)
    if identity is None:
        return None
    if type(identity) is not int or not 0 <= identity < vocab_size:
        raise ValueError(f"{path}: {token} has the id {identity}, the model has {vocab_size} ids")
    return identity
