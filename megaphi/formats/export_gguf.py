"""GGUF files for llama.cpp, written from a checkpoint."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from megaphi.durable import partial_file
from megaphi.errors import RunError

# llama.cpp's mixture that most people mean by Q4_K: a few matrices in 6 bits
_QUANTIZER, _MIXTURES = "llama-quantize", {"Q4_K": "Q4_K_M"}


def export_gguf(
    source: str | Path,
    out: Path,
    *,
    type_name: str = "F16",
    tokenizer_dir: Path | None = None,
    name: str | None = None,
    license_id: str | None = None,
    verify: bool = False,
) -> dict[str, Any]:
    """Write a GGUF file for llama.cpp.

    Memory: the largest tensor, twice.

    Args:
        source: run, checkpoint or Hugging Face directory.
        out: file to create.
        type_name: F32, F16, BF16, Q8_0, or Q4_K, which `llama-quantize` makes of an F32 file.
        tokenizer_dir: tokenizer to embed; None takes the model's own.
        name: of the model.
        license_id: SPDX identifier.
        verify: before publishing read back with llama.cpp's reader and compare with the source, bit
            by bit, or within the bounds of a quantized type.

    Returns:
        What was written, for people and scripts.

    Raises:
        ValueError: the source is no model, has no tokenizer or one that llama.cpp cannot follow,
            `out` is not free, a weight is too large for the type, or a program or library is
            missing.
        CheckpointError: the checkpoint is damaged.
        RunError: the quantizer failed, or what was read back differs.
    """
    from megaphi.formats.gguf import Labels, require_gguf, verify_gguf, write_gguf
    from megaphi.formats.gguf_vocabulary import read_vocabulary
    from megaphi.formats.provenance import read_provenance
    from megaphi.formats.tokenizer_files import find_tokenizer
    from megaphi.formats.weights import open_weights, resolve_model

    require_gguf()
    quantizer = _find_quantizer(type_name)
    with partial_file(out) as partial:
        directory = resolve_model(source)
        weights = open_weights(directory)
        tokenizer_dir = tokenizer_dir or find_tokenizer(directory)
        if tokenizer_dir is None:
            raise ValueError(f"{directory}: no tokenizer.json; name its directory as `tokenizer`")
        vocabulary = read_vocabulary(tokenizer_dir, weights.config.vocab_size)
        provenance = read_provenance(directory)
        labels = Labels(name or provenance.name, license_id)
        if quantizer is None:
            tensors = write_gguf(partial, weights, type_name, vocabulary, provenance, labels)
        else:
            whole = out.with_name(f"{out.name}.partial-F32")
            try:
                tensors = write_gguf(whole, weights, "F32", vocabulary, provenance, labels)
                _quantize(quantizer, whole, partial, _MIXTURES[type_name])
            finally:
                whole.unlink(missing_ok=True)
        error = None
        if verify:
            error = verify_gguf(partial, weights, None if quantizer else type_name)
    return {
        "source": str(directory),
        "out": str(out),
        "tensors": tensors,
        "bytes": out.stat().st_size,
        "files": 1,
        "dtype": type_name,
        "vocabulary": len(vocabulary.tokens),
        "verified": verify,
        "quantization_error": error,
    }


def _find_quantizer(type_name: str) -> str | None:
    """llama.cpp's quantizer where the type needs it.

    Raises:
        ValueError: it is not installed.
    """
    if type_name not in _MIXTURES:
        return None
    found = shutil.which(_QUANTIZER)
    if found is None:
        raise ValueError(
            f"`type` {type_name} is made by llama.cpp's {_QUANTIZER}, which is not on PATH; build "
            f"llama.cpp (cmake --build build --target {_QUANTIZER}), or take `type` Q8_0"
        )
    return found


def _quantize(program: str, source: Path, target: Path, mixture: str) -> None:
    """Run llama.cpp's quantizer.

    Raises:
        RunError: it failed; its last line is named.
    """
    done = subprocess.run(
        [program, str(source), str(target), mixture],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stdout.decode(errors="replace").strip().splitlines() or ["no output"]
        raise RunError(f"{program} ended with status {done.returncode}: {lines[-1][:200]}")
