"""Serve a model with vLLM and compare what it writes, and how probable it finds that, with ours.

Called by `launch/compare_vllm.sh`, in our environment; vLLM runs in its own, as a server that the
`openai` client asks, as users would. It is no test of the suite: vLLM for CPUs takes gigabytes.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import tokenizers
import torch
from torch import Tensor

from megaphi.formats.export_hugging_face import export_hugging_face
from megaphi.formats.weights import load_model
from megaphi.generate import generate
from megaphi.model.phi import Phi
from tests.layouts import free_port

PROMPTS = (
    "def fibonacci(n):\n",
    "import os\n\n\ndef read_lines(path):\n",
    "class Stack:\n    def __init__(self):\n",
    "for index, value in enumerate(",
    '"""Sorting',
    "    if not isinstance(value, str):\n        raise",
    "#",
    "def test_addition():\n    assert add(1, 2) == 3\n\n\ndef test_subtraction():\n    assert",
)
START_SECONDS = 300


@contextmanager
def vllm_server(python: Path, model: Path, log: Path) -> Iterator[str]:
    """The base URL of vLLM's OpenAI-compatible server on loopback, once it answers."""
    port = free_port()
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "phi"]
    command += ["--dtype", "float32", "--enforce-eager", "--return-tokens-as-token-ids"]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("wb") as stream:
        server = subprocess.Popen(
            command, env=os.environ | settings, stdout=stream, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"vLLM did not come up: see {log}")
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=60)


@torch.no_grad()
def log_probabilities(model: Phi, prompt: list[int], tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Of each of `tokens` after `prompt`, and of the most probable token there; both [t]."""
    logits_tv = model(torch.tensor([prompt + tokens[:-1]]))[0, len(prompt) - 1 :]
    table_tv = logits_tv.double().log_softmax(-1)
    return table_tv.gather(1, torch.tensor(tokens)[:, None])[:, 0], table_tv.amax(-1)


def ask(client: openai.OpenAI, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """The most probable tokens after a prompt by vLLM, and their log-probabilities."""
    answer: Any = client.completions.create(
        model="phi",
        prompt=prompt,
        max_tokens=count,
        temperature=0.0,
        logprobs=0,
        extra_body={"ignore_eos": True},
    )
    found = answer.choices[0].logprobs
    return [int(token.removeprefix("token_id:")) for token in found.tokens], found.token_logprobs


def main() -> int:
    """Compare, print the figures and write them; exit status 1 where the programs disagree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="run, checkpoint or Hugging Face directory")
    parser.add_argument("out", type=Path)
    parser.add_argument("--vllm-python", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=200, help="to generate after each prompt")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    exported = options.out / "hf"
    if not exported.exists():
        export_hugging_face(options.model, exported, verify=True)
    ours = load_model(exported, device="cpu", dtype=torch.float32).model
    tokenizer = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]

    started = time.perf_counter()
    texts = generate(ours, prompts, max_new_tokens=options.tokens)
    seconds = {"megaphi": time.perf_counter() - started}
    started = time.perf_counter()
    with vllm_server(options.vllm_python, exported, options.out / "vllm.log") as url:
        seconds["vllm start"] = time.perf_counter() - started
        client = openai.OpenAI(base_url=url, api_key="none", timeout=600)
        ask(client, prompts[0], 8)  # the first call compiles
        started = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda prompt: ask(client, prompt, options.tokens), prompts))
        seconds["vllm"] = time.perf_counter() - started

    worst, regret, same = 0.0, 0.0, 0
    for prompt, text, (tokens, found) in zip(prompts, texts, answers, strict=True):
        likely, best = log_probabilities(ours, prompt, tokens)
        worst = max(worst, float((torch.tensor(found).double() - likely).abs().max()))
        regret = max(regret, float((best - likely).max()))
        same += tokens == text
    figures = {
        "prompts": len(prompts),
        "tokens": options.tokens * len(prompts),
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
        "completions_equal": same,
        "largest_difference_of_log_probability": worst,
        "largest_lead_of_a_token_not_taken": regret,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }
    (options.out / "vllm.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for name, value in figures.items():
        print(f"{name.replace('_', ' ')}: {value}")
    # a completion may only differ where two tokens are as good as equally probable
    return int(worst > 1e-3 or regret > 1e-3)


if __name__ == "__main__":
    sys.exit(main())
