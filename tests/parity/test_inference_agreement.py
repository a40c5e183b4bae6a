"""One model in three programs: ours, transformers and llama.cpp name the same tokens and logits.

With random weights, where any wrong row, sign or position shows at once, and with trained ones,
where attention reaches back and probabilities are peaked.
"""

import json
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from torch import Tensor

from megaphi.config import Model
from megaphi.formats.export_gguf import export_gguf
from megaphi.formats.export_hugging_face import export_hugging_face
from megaphi.formats.weights import load_model, write_weights_checkpoint
from megaphi.generate import generate
from megaphi.model.phi import Phi
from tests.data_pipeline.llm_server import llama_server

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
pytest.importorskip("gguf", reason='needs pip install "megaphi[gguf]"')

NEW_TOKENS = 200
VOCAB_SIZE = 320
CONFIG = Model(
    num_layers=2,
    hidden_size=64,
    num_heads=2,
    vocab_size=VOCAB_SIZE,
    max_sequence_length=512,
    rotary_fraction=0.5,
)
PROMPT = "def add_three(first, second):\n    "


def lesson(number: int) -> str:
    """A function whose name, arguments and body hang together."""
    operation, sign = [("add", "+"), ("take", "-"), ("times", "*")][number % 3]
    word = ["two", "three", "five", "seven"][number % 4]
    first = ["first", "left", "a", "x"][number // 3 % 4]
    second = ["second", "right", "b", "y"][number // 3 % 4]
    amount = {"two": 2, "three": 3, "five": 5, "seven": 7}[word]
    return (
        f"def {operation}_{word}({first}, {second}):\n"
        f'    """{operation} {first} and {second}, then {word}."""\n'
        f"    result = {first} {sign} {second}\n"
        f"    return result {sign} {amount}\n\n"
    )


def make_tokenizer(directory: Path) -> tokenizers.Tokenizer:
    """Byte-level BPE with runs of blanks as added tokens, like CodeGen's; fewer ids than rows."""
    trained = tokenizers.ByteLevelBPETokenizer()
    texts = [lesson(number) for number in range(48)]
    trained.train_from_iterator(texts, vocab_size=300, show_progress=False)
    trained.add_special_tokens(["<|endoftext|>"])
    trained.add_tokens([" " * 8, " " * 4])
    directory.mkdir(parents=True)
    trained.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


def random_model() -> Phi:
    generator = torch.Generator().manual_seed(0)
    model = Phi(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 1.0, generator=generator)
            if name != "embedding.tokens.weight":
                scale = 1.5 / parameter.shape[1] ** 0.5 if parameter.dim() == 2 else 0.1
                parameter.mul_(scale).add_(1.0 if name.endswith("norm.weight") else 0.0)
    return model.eval()


def trained_model(tokenizer: tokenizers.Tokenizer) -> Phi:
    """Trained until it has learnt the lessons' form; the loss says so."""
    torch.manual_seed(0)
    model = Phi(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.05)
    order = torch.randperm(960).tolist()
    ids = tokenizer.encode("".join(lesson(number) for number in order)).ids
    stream, length = torch.tensor(ids), 96
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    loss = torch.tensor(0.0)
    for step in range(160):
        starts = torch.randint(0, len(ids) - length - 1, (8,)).tolist()
        rows = torch.stack([stream[start : start + length + 1] for start in starts])
        loss = model(rows[:, :-1], rows[:, 1:]) / rows[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / 160)
        optimizer.step()
    assert float(loss) < 0.8
    return model.eval()


@dataclass(frozen=True)
class Exported:
    """One model in the three programs' forms."""

    is_trained: bool
    ours: Phi
    theirs: Any  # a PhiForCausalLM
    gguf: Path
    tokenizer: tokenizers.Tokenizer


@pytest.fixture(scope="module", params=["random", "trained"])
def exported(request, tmp_path_factory) -> Exported:
    root = tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer(root / "tokenizer")
    model = random_model() if request.param == "random" else trained_model(tokenizer)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    write_weights_checkpoint(root / "model", CONFIG, state.items(), root / "tokenizer", {})
    export_hugging_face(root / "model", root / "hf", verify=True)
    # from the checkpoint, not by way of the Hugging Face directory
    export_gguf(root / "model", root / "model.gguf", type_name="F32", verify=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(root / "hf").eval()
    ours = load_model(root / "model", device="cpu", dtype=torch.float32).model
    return Exported(request.param == "trained", ours, theirs, root / "model.gguf", tokenizer)


def ask_llama(url: str, path: str, body: dict) -> dict:
    request = urllib.request.Request(
        url.removesuffix("/v1") + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def llama_continues(url: str, ids: list[int], count: int) -> dict:
    """What llama.cpp's server answers; the most probable token at each step."""
    body = {
        "prompt": ids,
        "n_predict": count,
        "temperature": 0.0,
        "cache_prompt": False,
        "return_tokens": True,
        "n_probs": VOCAB_SIZE if count == 1 else 0,
    }
    return ask_llama(url, "/completion", body)


def llama_log_probabilities(url: str, ids: list[int]) -> np.ndarray:
    """The log-probabilities [v] of the token after `ids`."""
    (step,) = llama_continues(url, ids, 1)["completion_probabilities"]
    row = np.full(VOCAB_SIZE, np.nan)
    for entry in step["top_logprobs"]:
        row[entry["id"]] = entry["logprob"]
    return row


@torch.no_grad()
def log_probabilities(logits_tv: Tensor) -> np.ndarray:
    return logits_tv.double().log_softmax(-1).numpy()


def test_three_programs_agree(exported: Exported) -> None:
    prompt = exported.tokenizer.encode(PROMPT).ids
    end = exported.tokenizer.token_to_id("<|endoftext|>")
    (ours,) = generate(exported.ours, [prompt], max_new_tokens=NEW_TOKENS, eos_id=end)
    assert len(ours) == NEW_TOKENS
    # not one token again and again, which would hide a wrong position
    assert len(set(ours)) > 12
    answer = exported.theirs.generate(
        torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    assert answer[0, len(prompt) :].tolist() == ours

    whole = torch.tensor([prompt + ours[:-1]])
    with torch.no_grad():
        expected, found = exported.theirs(whole).logits, exported.ours(whole)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    with llama_server(exported.gguf) as url:
        # the same text becomes the same ids: blanks, added tokens, bytes beyond ASCII
        for text in (PROMPT, "x  =   1\n        y = ' '", "naïve ☃ 12 <", lesson(5)):
            answer = ask_llama(url, "/tokenize", {"content": text})
            assert answer["tokens"] == exported.tokenizer.encode(text).ids, text
        free = llama_continues(url, prompt, NEW_TOKENS)["tokens"]
        forced = [
            llama_continues(url, prompt + ours[:place], 1)["tokens"][0]
            for place in range(NEW_TOKENS)
        ]
        # the server keeps back the probabilities of a token that is half a character
        whole_characters = [
            place
            for place, token in enumerate(ours)
            if "\ufffd" not in exported.tokenizer.decode([token], skip_special_tokens=False)
        ]
        places = whole_characters[:: len(whole_characters) // 20]
        table = np.stack([llama_log_probabilities(url, prompt + ours[:place]) for place in places])
    # llama.cpp keeps keys and values in half precision: of two tokens that are as good as equally
    # probable it may take the other, and random weights make some of those
    steps = found[0, len(prompt) - 1 :]
    best_two = steps.topk(2).values
    clear = (best_two[:, 0] - best_two[:, 1] > 0.02).tolist()
    assert sum(clear) > 0.9 * NEW_TOKENS
    assert [t for t, sure in zip(forced, clear, strict=True) if sure] == [
        t for t, sure in zip(ours, clear, strict=True) if sure
    ]
    if exported.is_trained:
        assert free == ours
    assert len(places) >= 20
    assert places[-1] > NEW_TOKENS * 3 // 4
    reference = log_probabilities(steps)[places]
    assert not np.isnan(table).any()
    likely = reference > -15
    assert likely.sum() > 20 * len(places)
    assert np.abs(table - reference)[likely].max() < 1e-2
