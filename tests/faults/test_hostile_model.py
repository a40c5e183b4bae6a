"""A model directory from a stranger: refused with one line, and nothing happens.

All cases run in one child process, under an audit hook that notes every pickle, every
program and socket, every file opened for writing outside of the output and every look at a secret
that lies beside the model. Its address space is limited, so that memory stays bounded.
"""

import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from megaphi.config import Model
from megaphi.formats.export_hugging_face import export_hugging_face
from megaphi.formats.manifest import write_manifest
from megaphi.formats.weights import write_weights_checkpoint
from megaphi.model.phi import Phi
from tests.helpers import REPOSITORY

CONFIG = Model(num_layers=1, hidden_size=32, num_heads=2, vocab_size=300, max_sequence_length=64)
DEEP = "[" * 100_000
COMMANDS = ("from-hf", "to-gguf", "generate", "evaluate")


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.path}",))


def make_hf(directory: Path) -> Path:
    """A sound Hugging Face directory."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(["def f(x):\n    return x\n"] * 9, vocab_size=280)
    trained.add_special_tokens(["<|endoftext|>"])
    tokenizer = directory.parent / f"{directory.name}-tokenizer"
    tokenizer.mkdir(parents=True)
    trained.save(str(tokenizer / "tokenizer.json"))
    source = directory.parent / f"{directory.name}-source"
    state = {name: tensor.detach() for name, tensor in Phi(CONFIG).state_dict().items()}
    write_weights_checkpoint(source, CONFIG, state.items(), tokenizer, {"step": 3})
    export_hugging_face(source, directory)
    return directory


def write_raw(path: Path, header: object, data: bytes = b"") -> None:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_header(directory: Path, change: Callable[[dict], object]) -> None:
    """Change the header of a sound file, its data as it was."""
    path = directory / "model.safetensors"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    write_raw(path, header, content[8 + size :])


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def only_pickles(directory: Path, name: str) -> None:
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(pickle.dumps(Canary(directory.parent / "canary")))


def object_array(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    array = np.array([Canary(directory.parent / "canary")], dtype=object)
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    (directory / "weights.npy").write_bytes(stream.getvalue())


def torch_checkpoint(directory: Path) -> None:
    """What torch.distributed.checkpoint writes: the layout is a pickle."""
    for path in directory.iterdir():
        path.unlink()
    (directory / ".metadata").write_bytes(pickle.dumps(Canary(directory.parent / "canary")))
    (directory / "__0_0.distcp").write_bytes(b"x" * 100)


def program(directory: Path, name: str = "modeling_phi.py") -> None:
    (directory / name).write_text(f"open({str(directory.parent / 'canary')!r}, 'w')")


def link(directory: Path, name: str, target: str) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(target)


def pipe(directory: Path, name: str) -> None:
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)


def index(directory: Path, name: str) -> None:
    values = {"weight_map": {"lm_head.bias": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(values))


BIAS = "lm_head.bias"
# each: what is done to a sound directory, a word of the reason
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "only a .pt": (lambda d: only_pickles(d, "model.pt"), "pickled weights can run code"),
    "only a .bin": (lambda d: only_pickles(d, "pytorch_model.bin"), "pickled weights can run code"),
    "a .npy of objects": (object_array, "pickled weights can run code"),
    "torch's .metadata": (
        torch_checkpoint,
        "a pickle of torch.distributed|pickled weights can run code",
    ),
    "a program": (program, "custom model code"),
    "auto_map": (
        lambda d: (
            program(d, "modeling_x.py"),
            (d / "modeling_x.py").rename(d.parent / "modeling_x.py"),
            change_config(d, auto_map={"AutoModelForCausalLM": "modeling_x.Phi"}),
        ),
        "auto_map asks for custom code",
    ),
    "auto_map of the tokenizer": (
        lambda d: (d / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "x"}}'),
        "auto_map asks for custom code",
    ),
    "config of depth 1e5": (
        lambda d: (d / "config.json").write_text('{"a":' + DEEP),
        "nested too deeply",
    ),
    "config of 100 MB": (
        lambda d: (d / "config.json").write_text("[" + "[]," * 33_000_000 + "[]]"),
        "too large",
    ),
    "index of depth 1e5": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map":' + DEEP),
        "nested too deeply",
    ),
    "shape of 2^62": (
        lambda d: change_header(d, lambda h: h[BIAS].update(shape=[2**62])),
        "not a readable safetensors file",
    ),
    "shape of 2^62 x 4": (
        lambda d: change_header(d, lambda h: h[BIAS].update(shape=[2**62, 4])),
        "not a readable safetensors file",
    ),
    "shape of 2^62 x 0": (
        lambda d: change_header(
            d,
            lambda h: h.update(
                {"model.layers.0.extra": dict(h[BIAS], shape=[2**62, 0], data_offsets=[0, 0])}
            ),
        ),
        "no part of this model|not a readable",
    ),
    "negative offset": (
        lambda d: change_header(d, lambda h: h[BIAS].update(data_offsets=[-1200, 0])),
        "not a readable safetensors file",
    ),
    "overlapping offsets": (
        lambda d: change_header(d, lambda h: h[BIAS].update(data_offsets=[0, 1200])),
        "not a readable safetensors file",
    ),
    "offsets past the end": (
        lambda d: change_header(d, lambda h: h[BIAS].update(data_offsets=[2**40, 2**40 + 1200])),
        "not a readable safetensors file",
    ),
    "header of depth 1e5": (
        lambda d: write_raw(d / "model.safetensors", b'{"a":' + DEEP.encode()),
        "not a readable safetensors file",
    ),
    "header of 99 MB": (
        lambda d: write_raw(d / "model.safetensors", b" " * 99_000_000),
        "a header of 99000000 bytes",
    ),
    "header said to be of 2^63": (
        lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}"),
        "a header of 9223372036854775808 bytes",
    ),
    "1e9 layers": (lambda d: change_config(d, num_hidden_layers=10**9), "cannot be 1000000000"),
    "2^30 ids": (lambda d: change_config(d, vocab_size=2**30), "has the shape"),
    "path out of the index": (
        lambda d: index(d, "../secret/model.safetensors"),
        "not the plain name of a safetensors file",
    ),
    "absolute path in the index": (
        lambda d: index(d, str(d.parent / "secret" / "model.safetensors")),
        "not the plain name of a safetensors file",
    ),
    "weights are a link": (
        lambda d: link(d, "model.safetensors", "../secret/model.safetensors"),
        "a link to a place outside",
    ),
    "config is a link": (
        lambda d: link(d, "config.json", str(d.parent / "secret" / "config.json")),
        "a link to a place outside",
    ),
    "tokenizer is a link": (
        lambda d: link(d, "tokenizer.json", "../secret/tokenizer.json"),
        "a link to a place outside",
    ),
    "a link to itself": (
        lambda d: link(d, "config.json", "config.json"),
        "leads nowhere|no config",
    ),
    "weights are a pipe": (
        lambda d: pipe(d, "model.safetensors"),
        "neither a file nor a directory",
    ),
    "tokenizer is a pipe": (
        lambda d: pipe(d, "tokenizer.json"),
        "neither a file nor a directory",
    ),
}
# what only those commands refuse that read a tokenizer
TOKENIZER_CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "tokenizer of depth 1e5": (
        lambda d: (d / "tokenizer.json").write_text('{"model":' + DEEP),
        "nested too deeply|not a tokenizer.json that can be read",
    ),
    "tokenizer with an id of 2^40": (
        lambda d: (d / "tokenizer.json").write_text(
            json.dumps(
                {
                    "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
                    "added_tokens": [{"id": 2**40, "content": "<|endoftext|>", "special": True}],
                    "pre_tokenizer": {"type": "ByteLevel"},
                }
            )
        ),
        "has the id 1099511627776|not a tokenizer.json that can be read",
    ),
}

_CHILD = """
import io, json, os, resource, signal, sys, contextlib
from pathlib import Path
import gguf, numpy, safetensors.torch, tokenizers, torch, yaml
import megaphi.formats.export_gguf, megaphi.formats.export_hugging_face, megaphi.formats.gguf
import tools.cli, tools.convert
import tools.evaluation.completions, tools.generate
from megaphi.formats.weights import resolve_model
from megaphi.errors import run_main

root = Path(sys.argv[1])
case, events = None, []
FORBIDDEN = ("pickle.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "socket.",
             "subprocess.", "ctypes.dlopen")
SECRET, WRITE = str(root / "secret"), os.O_WRONLY | os.O_RDWR | os.O_CREAT

def hook(name, arguments):
    if case is None:
        return
    out = str(case / "out")
    if name == "open" and not isinstance(arguments[0], int):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        flags = arguments[2] if isinstance(arguments[2], int) else 0
        if SECRET in path or (flags & WRITE and not path.startswith(out)):
            events.append(["open", path])
    elif name.startswith(FORBIDDEN):
        events.append([name, repr(arguments)[:200]])

def evaluate(words):
    tools.evaluation.completions.open_backend(
        resolve_model(words[0]), torch.device("cpu"), torch.float32, None)
    return 0

def run(command, model, out):
    if command == "evaluate":
        return run_main(evaluate, [model])
    words = {
        "from-hf": ["convert", "from-hf", model, out],
        "to-gguf": ["convert", "to-gguf", model, out],
        "generate": ["generate", model, "--prompt", "def", "--max-new-tokens", "2"],
    }
    return tools.cli.main(words[command])

torch.set_num_threads(1)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * os.sysconf("SC_PAGE_SIZE") + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.addaudithook(hook)
for line in sys.stdin:
    command, _, folder = line.strip().partition(" ")
    directory = root / folder
    events.clear()
    case = directory.parent
    errors = io.StringIO()
    signal.alarm(120)  # what waits for ever, as for a pipe, ends this process
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = run(command, str(directory), str(case / "out"))
    signal.alarm(0)
    case = None
    print(json.dumps([status, errors.getvalue(), events]), flush=True)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for every case, each with the directory `model`, and secrets beside them."""
    root = tmp_path_factory.mktemp("hostile")
    sound = make_hf(root / "sound")
    cases = {**CASES, **TOKENIZER_CASES, "sound itself": (lambda _: None, "")}
    for name, (change, _) in cases.items():
        case = root / name.replace(" ", "-").replace("/", "-")
        model = case / "model"
        model.mkdir(parents=True)
        (case / "secret").symlink_to(root / "secret")
        for path in sound.iterdir():
            (model / path.name).write_bytes(path.read_bytes())
        change(model)
    (root / "secret").mkdir()
    for path in sound.iterdir():
        (root / "secret" / path.name).write_bytes(path.read_bytes())
    return root


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.fixture(scope="module")
def child(root: Path) -> Iterator[subprocess.Popen[str]]:
    """The process that is asked; it has imported everything before its memory is limited."""
    pytest.importorskip("gguf", reason='needs pip install "megaphi[gguf]"')
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(root)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    yield process
    process.stdin.close()
    assert process.wait(timeout=60) == 0


def answer_of(child: subprocess.Popen[str], command: str, case: str) -> tuple[int, str, list]:
    """What a command says to a case: its status, its words, and what it did."""
    assert child.stdin is not None
    assert child.stdout is not None
    folder = f"{case.replace(' ', '-').replace('/', '-')}/model"
    print(command, folder, file=child.stdin, flush=True)
    answer = child.stdout.readline()
    assert answer, f"{command}, {case}: the process ended"
    status, error, events = json.loads(answer)
    return status, error, events


@pytest.mark.parametrize("command", COMMANDS)
def test_hostile_directories_are_refused(
    command: str, root: Path, child: subprocess.Popen[str]
) -> None:
    expected = {name: reason for name, (_, reason) in CASES.items()}
    if command != "from-hf":
        expected |= {name: reason for name, (_, reason) in TOKENIZER_CASES.items()}
    before = listing(root)
    problems = []
    for name in expected:
        status, error, events = answer_of(child, command, name)
        lines = error.splitlines()
        # the reason may be that of another guard that looks first
        fits = bool(lines) and re.search(expected[name], lines[-1])
        if status not in (1, 2) or len(lines) != 1 or not fits or events:
            problems.append((name, status, error[:400], events))
        assert "Traceback" not in error
    assert not problems, "\n".join(map(str, problems))
    assert listing(root) == before
    # else the others could be refused for any reason
    assert answer_of(child, command, "sound itself") == (0, "", [])
    out = root / "sound-itself" / "out"
    if out.is_dir():
        shutil.rmtree(out)
    out.unlink(missing_ok=True)


def test_the_canary_sings_when_it_is_unpickled(root: Path) -> None:
    case = root / "only-a-.pt"
    pickle.loads((case / "model" / "model.pt").read_bytes())
    assert (case / "canary").exists()
    (case / "canary").unlink()


# Checkpoints, which vouch for themselves with a manifest


TINY_TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"x": 0}, "merges": []},
    "added_tokens": [
        {
            "id": 1,
            "content": "<|endoftext|>",
            "special": True,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
    ],
    "pre_tokenizer": {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    },
}


def make_checkpoint(directory: Path) -> Path:
    state = {name: tensor.detach() for name, tensor in Phi(CONFIG).state_dict().items()}
    tokenizer = directory.parent / "tok"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_text(json.dumps(TINY_TOKENIZER))
    write_weights_checkpoint(directory, CONFIG, state.items(), tokenizer, {"step": 3})
    return directory


def sign_again(directory: Path, extra: dict | None = None) -> None:
    """A hostile directory's manifest fits its files: anybody can compute it."""
    import hashlib

    (directory / "manifest.json").unlink()
    write_manifest(directory, {}, {"step": 3})
    if extra is not None:
        path = directory / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["files"].update(extra)
        del manifest["sha256"]
        text = json.dumps(manifest, sort_keys=True).encode()
        manifest["sha256"] = hashlib.sha256(text).hexdigest()
        path.write_text(json.dumps(manifest))


ENTRY = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: (d / ".metadata").write_bytes(b"x"), r"\.metadata: pickles and programs"),
        (lambda d: (d / "optimizer.pt").write_bytes(b"x"), r"optimizer\.pt: pickles and programs"),
        (lambda d: (d / "rng.npy").write_bytes(b"x"), r"rng\.npy: pickles and programs"),
        (lambda d: (d / "model.py").write_text("x"), r"model\.py: pickles and programs"),
        (lambda d: link(d, "model.safetensors", "../other/model.safetensors"), "a link to a place"),
        (lambda d: link(d, "more.safetensors", "../other/model.json"), "a link to a place"),
        (lambda d: pipe(d, "more.safetensors"), "neither a file nor a directory"),
        (lambda d: (d / "model.json").write_text('{"num_layers":' + DEEP), "nested too deeply"),
        (lambda d: (d / "model.json").write_text('{"num_layers": 1e400}'), "num_layers has"),
        (lambda d: {"../other/model.safetensors": ENTRY}, "not the name of a file in"),
        (lambda d: {"/etc/hostname": ENTRY}, "not the name of a file in"),
        (lambda d: {"model.json": 3}, "has no size and SHA-256"),
        (lambda d: {"model.json": {"bytes": "1", "sha256": ""}}, "has no size and SHA-256"),
    ],
)
def test_hostile_checkpoints_are_refused(
    tmp_path: Path, change, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools.cli import main

    directory = make_checkpoint(tmp_path / "model")
    make_checkpoint(tmp_path / "other")
    extra = change(directory)
    if not any(path.is_fifo() for path in directory.iterdir()):
        sign_again(directory, extra if isinstance(extra, dict) else None)
    before = listing(tmp_path)
    for words in (
        ["convert", "to-gguf", str(directory), str(tmp_path / "out.gguf")],
        ["convert", "to-hf", str(directory), str(tmp_path / "out")],
        ["generate", str(directory), "--prompt", "x"],
    ):
        status = main(words)
        error = capsys.readouterr().err
        assert status == 1, error
        assert error.count("\n") == 1
        assert re.search(reason, error), error
    assert listing(tmp_path) == before


def test_the_hugging_face_caches_own_links_are_followed(tmp_path: Path) -> None:
    from megaphi.formats.weights import load_model

    sound = make_hf(tmp_path / "sound")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in sound.iterdir():
        path.rename(blobs / f"hash-of-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-of-{path.name}")
    loaded = load_model(snapshot, device="cpu", dtype=torch.float32)
    assert loaded.config == CONFIG
    # a blob that is itself a link leads out again
    (blobs / "hash-of-config.json").rename(tmp_path / "config.json")
    (blobs / "hash-of-config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ValueError, match="link"):
        load_model(snapshot, device="cpu", dtype=torch.float32)


def test_pickles_beside_sound_weights_are_not_looked_at(tmp_path: Path) -> None:
    """As most repositories have them; only the safetensors files count."""
    from megaphi.formats.weights import load_model

    sound = make_hf(tmp_path / "sound")
    payload = pickle.dumps(Canary(tmp_path / "canary"))
    for name in ("pytorch_model.bin", "training_args.bin", "rng.pkl"):
        (sound / name).write_bytes(payload)
    load_model(sound, device="cpu", dtype=torch.float32)
    assert not (tmp_path / "canary").exists()
    tensors = load_file(sound / "model.safetensors")
    save_file(tensors, sound / "again.safetensors")
    with pytest.raises(ValueError, match=r"again\.safetensors"):
        load_model(sound, device="cpu", dtype=torch.float32)
