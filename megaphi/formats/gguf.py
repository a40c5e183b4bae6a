"""GGUF files for llama.cpp, architecture `phi2`: written tensor by tensor, read back, compared.

llama.cpp's `phi2` graph is Hugging Face's phi (one LayerNorm, attention and MLP in parallel,
half-rotation), so tensors are those of `PhiForCausalLM` under other names and no row moves.
Matrices are stored in the chosen type, vectors (biases and LayerNorms) always in F32, as llama.cpp
expects. A matrix whose rows are no multiple of a quantization block (32 for Q8_0) stays F16.

The file and its keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The library `gguf`
(llama.cpp's own) writes and reads it; `pip install "megaphi[gguf]"` brings it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from megaphi.config import Model
from megaphi.errors import RunError
from megaphi.formats.files import overflows
from megaphi.formats.gguf_vocabulary import Vocabulary
from megaphi.formats.hf import exported
from megaphi.formats.provenance import Provenance
from megaphi.formats.weight_files import PendingTensor
from megaphi.formats.weights import ModelWeights
from megaphi.model.phi import num_parameters

if TYPE_CHECKING:
    import gguf
    import numpy as np
    from numpy.typing import NDArray

ARCHITECTURE = "phi2"
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
_EXACT_KINDS = (0, 1, 30)  # F32, F16, BF16 in gguf.GGMLQuantizationType
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.final_layernorm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.dense": "attn_output",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def require_gguf() -> None:
    """Raise a `ValueError` that names the extra if the library is missing."""
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise ValueError('GGUF files need the library gguf: pip install "megaphi[gguf]"')


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of `PhiForCausalLM`."""
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.{kind}"
    index, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{index}.{_NAMES[part]}.{kind}"


@dataclass(frozen=True)
class Labels:
    """What the user says about the model; None stays out of the file."""

    name: str
    license_id: str | None = None


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file."""

    name: str
    pending: PendingTensor
    """Its values in F32."""
    kind: "gguf.GGMLQuantizationType"

    @property
    def nbytes(self) -> int:
        """Size of the stored data."""
        import gguf

        elements, size = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.pending.shape) // elements * size

    def read(self) -> "NDArray[np.generic]":
        """The stored data: numbers, or for BF16 and quantized types bytes."""
        return encode(self.name, self.pending.read(), self.kind)


def encode(
    name: str, tensor_f32: Tensor, kind: "gguf.GGMLQuantizationType"
) -> "NDArray[np.generic]":
    """A tensor in a type of GGUF.

    Raises:
        ValueError: a value is too large for F16.
    """
    import gguf
    import numpy as np

    types = gguf.GGMLQuantizationType
    tensor_f32 = tensor_f32.contiguous()
    if kind == types.F32:
        array: NDArray[np.generic] = tensor_f32.numpy()
    elif kind == types.F16:
        halves = tensor_f32.half()
        if overflows(tensor_f32, halves):
            raise ValueError(f"{name} has values too large for F16; take `type` BF16 or F32")
        array = halves.numpy()
    elif kind == types.BF16:
        array = tensor_f32.bfloat16().view(torch.uint8).numpy()
    else:
        array = gguf.quants.quantize(tensor_f32.numpy(), kind)
    return array


def _entries(weights: ModelWeights, type_name: str) -> Iterator[_Entry]:
    """The tensors in the order of the file."""
    import gguf

    types = gguf.GGMLQuantizationType
    wanted = types[type_name]
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    for name, pending in exported(weights, weights.config, torch.float32):
        kind = wanted
        if len(pending.shape) == 1:
            kind = types.F32
        elif pending.shape[-1] % block:
            kind = types.F16
        yield _Entry(gguf_name(name), pending, kind)


def write_gguf(
    path: Path,
    weights: ModelWeights,
    type_name: str,
    vocabulary: Vocabulary,
    provenance: Provenance,
    labels: Labels,
) -> int:
    """Write a whole GGUF file; return the number of its tensors.

    Memory: the largest tensor in fp32 and in the type.

    Args:
        path: written in place; `partial_file` makes it atomic.
        weights: the model.
        type_name: a key of `_FILE_TYPES`.
        vocabulary: the tokenizer.
        provenance: where the model comes from.
        labels: name and licence.

    Raises:
        ValueError: a value is too large for the type.
    """
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    _add_model(writer, weights.config)
    _add_origin(writer, weights.config, provenance, labels)
    _add_vocabulary(writer, vocabulary)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[type_name]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    entries = list(_entries(weights, type_name))
    for entry in entries:
        # any type but uint8: with that one the library takes the shape for one of bytes
        shape, number = entry.pending.shape, np.dtype(np.float32)
        writer.add_tensor_info(entry.name, shape, number, entry.nbytes, raw_dtype=entry.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    with path.open("ab") as file:
        for entry in entries:
            _pad(file, writer.data_alignment)
            data = entry.read()
            assert data.nbytes == entry.nbytes, entry.name
            data.tofile(file)
        _pad(file, writer.data_alignment)
    return len(entries)


def _pad(file: BinaryIO, alignment: int) -> None:
    """Zeros up to the next multiple of `alignment`."""
    file.write(bytes(-file.tell() % alignment))


def _add_model(writer: "gguf.GGUFWriter", config: Model) -> None:
    """The keys from which llama.cpp builds the graph."""
    writer.add_context_length(config.max_sequence_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_freq_base(config.rotary_base)
    writer.add_vocab_size(config.vocab_size)


def _add_origin(
    writer: "gguf.GGUFWriter", config: Model, provenance: Provenance, labels: Labels
) -> None:
    """Name, licence, size, and under `megaphi.` where the weights come from."""
    writer.add_type("model")
    writer.add_name(labels.name)
    if labels.license_id is not None:
        writer.add_license(labels.license_id)
    parameters = num_parameters(config)
    size = f"{parameters / 1e9:.1f}B" if parameters >= 10**9 else f"{parameters / 1e6:.0f}M"
    writer.add_size_label(size)
    writer.add_string("megaphi.checkpoint", provenance.checkpoint)
    if provenance.identity is not None:
        writer.add_string("megaphi.manifest_sha256", provenance.identity)
    if provenance.recipe_sha256 is not None:
        writer.add_string("megaphi.recipe_sha256", provenance.recipe_sha256)
    if provenance.step is not None:
        writer.add_uint64("megaphi.step", provenance.step)
    if provenance.tokens is not None:
        writer.add_uint64("megaphi.training_tokens", provenance.tokens)


def _add_vocabulary(writer: "gguf.GGUFWriter", vocabulary: Vocabulary) -> None:
    """The tokenizer."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.end_of_text)
    writer.add_eos_token_id(vocabulary.end_of_text)
    writer.add_unk_token_id(vocabulary.end_of_text)
    writer.add_add_bos_token(False)


def verify_gguf(path: Path, weights: ModelWeights, type_name: str | None) -> float:
    """Compare every tensor of a file with its source, one in memory at a time.

    F32, F16 and BF16 must be the source's bits, rounded once. A Q8_0 value may be half a step of
    its block's scale away, and as much again as the scale itself is rounded to fp16. For other
    types, which llama.cpp chooses per tensor, the root-mean-square error of a tensor may be a
    quarter of its values'.

    Args:
        path: the file.
        weights: what it was made from.
        type_name: what it was made as; None for a file that llama.cpp has quantized.

    Returns:
        The largest root-mean-square error of a quantized tensor, relative to its values.

    Raises:
        RunError: names the tensor that differs.
    """
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    worst = 0.0
    for entry in _entries(weights, type_name or "F32"):
        stored = found.pop(entry.name, None)
        shape = entry.pending.shape
        if stored is None or tuple(int(size) for size in stored.shape[::-1]) != shape:
            raise RunError(f"{path}: {entry.name} is not in the file with the shape {list(shape)}")
        kind = stored.tensor_type
        if type_name is not None and kind != entry.kind:
            raise RunError(f"{path}: {entry.name} is {kind.name}, not {entry.kind.name}")
        source, data = entry.pending.read(), np.asarray(stored.data)
        if kind in _EXACT_KINDS:
            expected = encode(entry.name, source, kind)
            equal = np.array_equal(expected.reshape(-1).view("u1"), data.reshape(-1).view("u1"))
        else:
            original = source.numpy()
            error = gguf.quants.dequantize(data, kind).reshape(original.shape) - original
            relative = float(np.linalg.norm(error)) / max(float(np.linalg.norm(original)), 1e-30)
            worst = max(worst, relative)
            equal = relative <= 0.25
            if kind == gguf.GGMLQuantizationType.Q8_0:
                equal = equal and _steps_off(original, error) <= 0.5 + 127 * 2**-11 + 1e-3
        if not equal:
            raise RunError(
                f"{path}: {entry.name} was not written as it is in the source; try again"
            )
    if found:
        raise RunError(f"{path}: {next(iter(found))} was written but is not in the source")
    return worst


def _steps_off(original: "NDArray[np.float32]", error: "NDArray[np.float32]") -> float:
    """Largest error of Q8_0 values in units of their block's largest value / 127.

    Blocks too small for a normal fp16 scale are compared in units of the smallest one.
    """
    import numpy as np

    largest = np.abs(original.reshape(-1, 32)).max(axis=1, keepdims=True)
    step = np.maximum(largest / 127, 2.0**-14)
    steps: NDArray[np.float32] = np.abs(error.reshape(-1, 32)) / step
    return float(steps.max())
