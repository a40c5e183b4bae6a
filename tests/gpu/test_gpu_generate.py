"""Generation on the device: CUDA graphs change nothing, and nothing waits for the host."""

import pytest
import torch

from megaphi.config import Model
from megaphi.generate import generate
from megaphi.generate.decoder import GRAPH_WINDOW, Decoder
from megaphi.model.phi import Phi
from tests.gpu.device import DEVICE, ON_GPU, needs_gpu, pytestmark  # noqa: F401

# long enough on a GPU for graphs of three windows
NEW_TOKENS = 2 * GRAPH_WINDOW + 40 if ON_GPU else 30
CONFIG = Model(num_layers=3, hidden_size=64, num_heads=4, vocab_size=211, max_sequence_length=1024)
PROMPTS = [[3, 1, 4], [15], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9], [3, 2, 3, 8]]


def model_on(device: torch.device | str, dtype: torch.dtype = torch.float32) -> Phi:
    """The same weights everywhere; the next token depends strongly on the text."""
    generator = torch.Generator().manual_seed(0)
    model = Phi(CONFIG).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(0.0, 1.0, generator=generator)
        if name != "embedding.tokens.weight":
            scale = 1.5 / parameter.shape[1] ** 0.5 if parameter.dim() == 2 else 0.1
            parameter.mul_(scale).add_(1.0 if name.endswith("norm.weight") else 0.0)
    return model.to(device, dtype)


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], [PROMPTS[2]] * 3])
def test_greedy_with_graphs_is_that_without_and_that_of_a_cpu(prompts: list[list[int]]) -> None:
    on_cpu = generate(model_on("cpu"), prompts, max_new_tokens=NEW_TOKENS)
    model = model_on(DEVICE)
    with_graphs = generate(model, prompts, max_new_tokens=NEW_TOKENS)
    without = generate(model, prompts, max_new_tokens=NEW_TOKENS, cuda_graphs="never")
    assert len({token for row in on_cpu for token in row}) > 5
    assert with_graphs == without
    # a near tie may tip between two devices, rarely: the first tokens must agree in every row
    assert [row[:24] for row in with_graphs] == [row[:24] for row in on_cpu]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_that_end_and_samples_are_the_same_with_graphs(dtype: torch.dtype) -> None:
    """Rows leave the batch while it runs, so that graphs of other shapes are recorded."""
    model = model_on(DEVICE, dtype)
    settings = {"temperature": 0.9, "top_p": 0.9, "seed": 4, "bunch": 8}

    def stop(row: int, tokens: list[int]) -> bool:
        return len(tokens) == 12 * (row + 1)

    runs = [
        generate(
            model, PROMPTS, max_new_tokens=NEW_TOKENS, stop=stop, cuda_graphs=graphs, **settings
        )
        for graphs in ("auto", "never")
    ]
    assert [len(row) for row in runs[0]] == [min(12 * n, NEW_TOKENS) for n in (1, 2, 3, 4)]
    assert runs[0] == runs[1]


@needs_gpu
def test_a_graph_is_recorded_once_a_window_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    replays: list[torch.cuda.CUDAGraph] = []
    inner = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or inner(graph)
    )
    generate(model_on(DEVICE), PROMPTS[2:3], max_new_tokens=NEW_TOKENS)
    # all tokens but the prompt's and the first of each window
    assert len(replays) == NEW_TOKENS - 1 - 3
    assert len({id(graph) for graph in replays}) == 3


@needs_gpu
def test_a_replayed_token_does_not_wait_for_the_host() -> None:
    decoder = Decoder(model_on(DEVICE), PROMPTS, 100, graphs=True)
    with torch.no_grad():
        tokens_b = decoder.prompt().argmax(-1)
        for _ in range(2):
            tokens_b = decoder.step(tokens_b).argmax(-1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                tokens_b = decoder.step(tokens_b).argmax(-1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert tokens_b.shape == (len(PROMPTS),)
