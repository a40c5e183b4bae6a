"""Weights of checkpoints: assembled from shards that torch wrote, refused when they do not fit."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from megaphi.config import Model
from megaphi.formats.files import parse_size, same_bits
from megaphi.formats.manifest import CheckpointError, verify_checkpoint, write_manifest
from megaphi.formats.weight_files import write_shards
from megaphi.formats.weights import (
    CheckpointWeights,
    load_model,
    resolve_model,
    write_model_config,
    write_weights_checkpoint,
)
from megaphi.model.phi import Phi, parameter_shapes

# 37 rows do not divide by 3 processes: the last shard is shorter
CONFIG = Model(
    num_layers=2,
    hidden_size=16,
    num_heads=2,
    vocab_size=37,
    intermediate_size=24,
    max_sequence_length=32,
)


def random_tensors(config: Model = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in parameter_shapes(config).items()
    }


def handmade(
    directory: Path,
    files: dict[str, tuple[dict[str, Tensor], dict[str, list[int]] | None]],
    config: Model = CONFIG,
) -> Path:
    """A checkpoint whose manifest is right, whatever its tensors are."""
    directory.mkdir(parents=True)
    write_model_config(directory, config)
    for name, (tensors, offsets) in files.items():
        metadata = {"format": "pt"}
        if offsets is not None:
            info = {key: {"saved_offsets": value} for key, value in offsets.items()}
            metadata["DCP_SHARDING_INFO"] = json.dumps(info)
        save_file({k: v.contiguous() for k, v in tensors.items()}, directory / name, metadata)
    write_manifest(directory, {}, {"step": 0})
    return directory


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def test_shapes_are_those_of_the_model() -> None:
    built = {name: tuple(value.shape) for name, value in Phi(CONFIG).state_dict().items()}
    assert built == parameter_shapes(CONFIG)
    assert list(built) == list(parameter_shapes(CONFIG))


def _save_shards(rank: int, directory: str, store: str) -> None:
    """One of three processes that save the model cut along rows, columns, or not at all."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    mesh = init_device_mesh("cpu", (3,))
    tensors = {}
    for index, (name, full) in enumerate(random_tensors().items()):
        by_columns = full.dim() == 2 and index % 2 == 1
        placement = Shard(1) if by_columns else Replicate() if index % 5 == 4 else Shard(0)
        tensors[f"model.{name}"] = distribute_tensor(full, mesh, [placement])
        tensors[f"optimizer.first_moment.{name}"] = distribute_tensor(-full, mesh, [placement])
    writer = dcp.HuggingFaceStorageWriter(directory, save_distributed=True)
    dcp.save(tensors, storage_writer=writer)
    dist.destroy_process_group()


def test_shards_of_three_processes_are_assembled(tmp_path: Path) -> None:
    directory = tmp_path / "step-00000007"
    directory.mkdir()
    mp.spawn(_save_shards, (str(directory), str(tmp_path / "store")), nprocs=3)
    write_model_config(directory, CONFIG)
    write_manifest(directory, {}, {"step": 7})

    weights = CheckpointWeights(resolve_model(directory))
    expected = random_tensors()
    assert len(list(directory.glob("*.safetensors"))) == 3
    assert list(weights) == list(expected)
    assert weights.config == CONFIG
    assert weights.dtypes == {torch.float32}
    for name, tensor in weights.items():
        assert same_bits(tensor, expected[name]), name


def test_weights_checkpoint_is_what_torch_reads(tmp_path: Path, monkeypatch) -> None:
    expected = {name: tensor.bfloat16() for name, tensor in random_tensors().items()}
    monkeypatch.setattr("megaphi.formats.weights.SHARD_BYTES", 2000)
    directory = tmp_path / "new" / "base"
    write_weights_checkpoint(directory, CONFIG, expected.items(), None, {"origin": "test"})

    assert verify_checkpoint(directory)["origin"] == "test"
    assert len(list(directory.glob("model-*-of-*.safetensors"))) > 2
    assert [path.name for path in directory.parent.iterdir()] == ["base"]
    read = {f"model.{name}": torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(directory)), no_dist=True)
    for name, tensor in expected.items():
        assert same_bits(read[f"model.{name}"], tensor), name
        assert same_bits(CheckpointWeights(directory)[name], tensor), name


def test_tokenizer_travels_with_the_weights_and_nothing_else(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "merges.txt").write_text("a b")
    (tokenizer / "tokenization_evil.py").write_text("raise SystemExit")
    write_weights_checkpoint(tmp_path / "out", CONFIG, random_tensors().items(), tokenizer, {})
    copied = sorted(path.name for path in (tmp_path / "out" / "tokenizer").iterdir())
    assert copied == ["merges.txt", "tokenizer.json"]
    loaded = load_model(tmp_path / "out", device="cpu", dtype=torch.float32)
    assert loaded.tokenizer_dir == tmp_path / "out" / "tokenizer"


@pytest.mark.parametrize("kind", ["missing", "unknown", "shape", "broken stream"])
def test_failed_write_leaves_nothing(tmp_path: Path, kind: str) -> None:
    tensors = random_tensors()

    def stream():
        for name, tensor in tensors.items():
            if kind == "missing" and name == "head.bias":
                continue
            if kind == "shape" and name == "head.bias":
                tensor = tensor[1:]
            if kind == "broken stream" and name == "head.bias":
                raise OSError("disk on fire")
            yield name, tensor
        if kind == "unknown":
            yield "blocks.9.out.bias", tensors["head.bias"]

    with pytest.raises(OSError if kind == "broken stream" else ValueError):
        write_weights_checkpoint(tmp_path / "out", CONFIG, stream(), None, {})
    assert list(tmp_path.iterdir()) == []


def test_existing_directory_is_refused_unless_empty(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_weights_checkpoint(out, CONFIG, random_tensors().items(), None, {})
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="already exists"):
        write_weights_checkpoint(out, CONFIG, random_tensors(seed=1).items(), None, {})
    assert (out / "manifest.json").read_bytes() == before


def test_loaded_model_computes_like_the_saved_one(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, residual_dropout=0.5, attention_dropout=0.5)
    tensors = random_tensors(config)
    write_weights_checkpoint(tmp_path / "out", config, tensors.items(), None, {})
    model = Phi(config)
    model.load_state_dict(tensors)
    tokens = torch.randint(0, config.vocab_size, (2, 9))
    loaded = load_model(tmp_path / "out", device="cpu", dtype=torch.float32)
    assert loaded.config == config
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    torch.testing.assert_close(loaded.model(tokens), model(tokens), rtol=0, atol=0)
    half = load_model(tmp_path / "out", device="cpu", dtype=torch.bfloat16).model
    assert half.head.weight.dtype == torch.bfloat16
    assert same_bits(half.head.weight, tensors["head.weight"].bfloat16())


# What MODEL may be


def test_newest_checkpoint_that_verifies_is_the_model(tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    for step in (1, 2, 10):
        directory = run / f"step-{step:08d}"
        write_weights_checkpoint(directory, CONFIG, random_tensors().items(), None, {"step": step})
    assert resolve_model(run).name == "step-00000010"
    damaged = run / "step-00000010" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    assert resolve_model(run).name == "step-00000002"
    assert str(damaged) in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"step-00000010/model\.safetensors.*SHA-256"):
        resolve_model(run / "step-00000010")
    for step in (1, 2):
        (run / f"step-{step:08d}" / "model.json").unlink()
    with pytest.raises(CheckpointError, match="3 checkpoints"):
        resolve_model(run)


def test_what_is_no_model_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="hub"):
        resolve_model("microsoft/phi-1")
    with pytest.raises(ValueError, match="not a model"):
        resolve_model(tmp_path)
    write_weights_checkpoint(tmp_path / "out", CONFIG, random_tensors().items(), None, {})
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no manifest"):
        resolve_model(tmp_path / "out")


# Files that lie; their manifests are right


def _halves(name: str = "model.head.weight") -> dict[str, tuple[dict, dict]]:
    """Two files that hold the head in two shards, and everything else in the first."""
    tensors = whole(random_tensors())
    full = tensors.pop(name)
    offsets = {key: [0] * value.dim() for key, value in tensors.items()}
    return {
        "a.safetensors": ({**tensors, name: full[:20]}, {**offsets, name: [0, 0]}),
        "b.safetensors": ({name: full[20:]}, {name: [20, 0]}),
    }


def test_two_honest_halves_are_read(tmp_path: Path) -> None:
    weights = CheckpointWeights(handmade(tmp_path / "c", _halves()))
    assert same_bits(weights["head.weight"], random_tensors()["head.weight"])


def _set_offsets(value: object) -> Callable[[dict], None]:
    def change(files: dict) -> None:
        files["b.safetensors"][1]["model.head.weight"] = value

    return change


def _set_tensor(change: Callable[[Tensor], Tensor]) -> Callable[[dict], None]:
    def apply(files: dict) -> None:
        tensors = files["b.safetensors"][0]
        tensors["model.head.weight"] = change(tensors["model.head.weight"])

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set_offsets([19, 0]), "overlaps its shard"),
        (_set_offsets([0, 0]), "overlaps its shard"),
        (_set_offsets([21, 0]), "does not fit"),
        (_set_offsets([20, 1]), "does not fit"),
        (_set_offsets([2**62, 0]), "does not fit"),
        (_set_offsets([2**63, 0]), "offsets"),
        (_set_offsets([-1, 0]), "offsets"),
        (_set_offsets([True, 0]), "offsets"),
        (_set_offsets([20.0, 0]), "offsets"),
        (_set_offsets([20]), "offsets"),
        (_set_offsets("20,0"), "offsets"),
        (_set_tensor(lambda t: t[1:]), "a shard is missing"),
        (_set_tensor(lambda t: t[:0]), "a shard is missing"),
        (_set_tensor(lambda t: t[..., None]), "offsets"),
        (_set_tensor(lambda t: t.long()), "I64"),
        (_set_tensor(lambda t: t.double()), "F64"),
        (_set_tensor(lambda t: t.to(torch.float8_e4m3fn)), "F8_E4M3"),
        (_set_tensor(lambda t: t.half()), "F16, but F32"),
        (lambda files: files.pop("b.safetensors"), "a shard is missing"),
    ],
)
def test_shards_that_do_not_tile_are_refused(tmp_path: Path, change, message: str) -> None:
    files = _halves()
    change(files)
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointWeights(handmade(tmp_path / "c", files))
    assert "model.head.weight" in str(caught.value)
    assert ".safetensors" in str(caught.value)


def _drop(name: str) -> Callable[[dict], None]:
    return lambda tensors: tensors.pop(name)


def _put(name: str, tensor: Tensor) -> Callable[[dict], None]:
    return lambda tensors: tensors.__setitem__(name, tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("model.blocks.1.fc2.bias"), "no file holds model.blocks.1.fc2.bias"),
        (_put("model.blocks.2.fc2.bias", torch.ones(16)), "model.blocks.2.fc2.bias is no param"),
        (_put("model.head.bias", torch.ones(38)), "model.head.bias of shape"),
        (_put("model.head.bias", torch.ones(37, 1)), "model.head.bias of shape"),
        (_put("model.head.bias", torch.tensor(1.0)), "model.head.bias of shape"),
    ],
)
def test_other_models_tensors_are_refused(tmp_path: Path, change, message: str) -> None:
    tensors = whole(random_tensors())
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        CheckpointWeights(handmade(tmp_path / "c", {"a.safetensors": (tensors, None)}))


@pytest.mark.parametrize("info", ["[", "[" * 100_000, "[]", "7", '{"model.head.bias": 3}'])
def test_malformed_sharding_information_is_refused(tmp_path: Path, info: str) -> None:
    directory = handmade(tmp_path / "c", {})
    metadata = {"format": "pt", "DCP_SHARDING_INFO": info}
    save_file(whole(random_tensors()), directory / "a.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        CheckpointWeights(directory)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 8,
        (2**62).to_bytes(8, "little") + b"{}",
        (30).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[4',
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
    ],
)
def test_damaged_tensor_files_are_refused(tmp_path: Path, content: bytes) -> None:
    directory = handmade(tmp_path / "c", {"a.safetensors": (whole(random_tensors()), None)})
    (directory / "b.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        CheckpointWeights(directory)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"num_layers": 1000000000}',
        '{"num_layers": 4611686018427387904}',
        '{"num_layers": true}',
        '{"num_layers": 2.0}',
        '{"num_layers": "2"}',
        '{"layers": 2}',
        '{"layer_norm_epsilon": NaN}',
        '{"hidden_size": 18}',
        "9" * 5000,
    ],
)
def test_malformed_model_section_is_refused(tmp_path: Path, text: str) -> None:
    directory = handmade(tmp_path / "c", {"a.safetensors": (whole(random_tensors()), None)})
    (directory / "model.json").write_text(text)
    with pytest.raises(CheckpointError):
        CheckpointWeights(directory)


def test_missing_model_section_is_named(tmp_path: Path) -> None:
    directory = handmade(tmp_path / "c", {"a.safetensors": (whole(random_tensors()), None)})
    (directory / "model.json").unlink()
    with pytest.raises(CheckpointError, match=r"model\.json"):
        CheckpointWeights(directory)
    shutil.rmtree(directory)


# Files


def test_files_stay_under_the_limit(tmp_path: Path) -> None:
    sizes = [400, 400, 400, 1200, 100]
    tensors = {f"t{index}": torch.full((size,), float(index)) for index, size in enumerate(sizes)}
    written = write_shards(tmp_path, tensors.items(), max_bytes=3200, metadata={"format": "pt"})
    names = [f"model-{number:05d}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [written.files[name] for name in tensors] == [names[i] for i in (0, 0, 1, 2, 3)]
    assert written.bytes == 4 * sum(sizes)
    for name, tensor in tensors.items():
        with safe_open(tmp_path / written.files[name], "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert same_bits(file.get_tensor(name), tensor)


def test_sizes_are_read_as_people_write_them() -> None:
    texts = ["5GB", "200 mb", "1GiB", "64KiB", "1.5kB", "123"]
    assert [parse_size(t) for t in texts] == [5 * 10**9, 2 * 10**8, 2**30, 65536, 1500, 123]
    for text in ("", "GB", "-1GB", "0", "5XB", "nan", "inf"):
        with pytest.raises(ValueError, match="not understood"):
            parse_size(text)


def test_same_bits_sees_signs_and_nans() -> None:
    zero, nan = torch.zeros(2), torch.full((2,), float("nan"))
    assert same_bits(nan, nan.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.half())
    assert not same_bits(zero, zero[None])
