"""Cached, batched generation against recomputing everything for each token of each text."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaphi.config import Model
from megaphi.generate import TextRow, generate, generate_text, stream_text
from megaphi.generate.decoder import Decoder
from megaphi.model.phi import Phi

CONFIG = Model(num_layers=3, hidden_size=64, num_heads=4, vocab_size=211, max_sequence_length=96)
PROMPTS = [[3, 1, 4], [15], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9], [3, 2, 3, 8]]


@pytest.fixture(scope="module")
def model() -> Phi:
    """A model whose next token depends strongly on the text and on positions."""
    generator = torch.Generator().manual_seed(0)
    model = Phi(CONFIG).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(0.0, 1.0, generator=generator)
        if name != "embedding.tokens.weight":
            scale = 1.5 / parameter.shape[1] ** 0.5 if parameter.dim() == 2 else 0.1
            parameter.mul_(scale).add_(1.0 if name.endswith("norm.weight") else 0.0)
    return model


def logits_after(model: Phi, tokens: list[int]) -> Tensor:
    return model(torch.tensor([tokens]))[0, -1].double()


def recompute(model: Phi, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_after(model, tokens).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_cache_changes_nothing(model: Phi, prompt: list[int]) -> None:
    expected = recompute(model, prompt, 60)
    assert len(set(expected)) > 5
    assert generate(model, [prompt], max_new_tokens=60) == [expected]


def test_left_padded_batch_is_one_at_a_time(model: Phi) -> None:
    together = generate(model, PROMPTS, max_new_tokens=60)
    assert together == [recompute(model, prompt, 60) for prompt in PROMPTS]


def test_cached_logits_are_those_of_the_full_pass(model: Phi) -> None:
    """Compared before argmax, which would hide small errors."""
    seen: list[Tensor] = []
    handle = model.head.register_forward_hook(lambda _, inputs, logits: seen.append(logits))
    results = generate(model, PROMPTS, max_new_tokens=30)
    handle.remove()
    assert len(seen) == 30
    for row, prompt in enumerate(PROMPTS):
        full = model(torch.tensor([prompt + results[row]]))[0]
        for step in range(30):
            torch.testing.assert_close(
                seen[step][row], full[len(prompt) - 1 + step], rtol=0, atol=1e-4
            )


def test_the_prompt_runs_once(model: Phi) -> None:
    lengths: list[int] = []
    handle = model.blocks[0].register_forward_hook(
        lambda module, inputs, output: lengths.append(len(inputs[0]) // len(PROMPTS))
    )
    generate(model, PROMPTS, max_new_tokens=5)
    handle.remove()
    assert lengths == [10, 1, 1, 1, 1]


def test_end_of_text_ends_a_row_and_not_the_others(model: Phi) -> None:
    free = generate(model, PROMPTS, max_new_tokens=40)
    # a token that ends the first row somewhere inside and leaves another row alone
    end = next(t for t in free[0][1:] if t != free[0][0] and any(t not in row for row in free))
    expected = [row[: row.index(end)] if end in row else row for row in free]
    assert 0 < len(expected[0]) < 40
    assert any(len(row) == 40 for row in expected)
    assert generate(model, PROMPTS, max_new_tokens=40, eos_id=end) == expected


def test_stop_sees_every_token_and_ends_its_row(model: Phi) -> None:
    free = generate(model, PROMPTS, max_new_tokens=12)
    calls: list[tuple[int, int]] = []

    def stop(row: int, tokens: list[int]) -> bool:
        assert tokens == free[row][: len(tokens)]
        calls.append((row, len(tokens)))
        return len(tokens) == row + 3

    stopped = generate(model, PROMPTS, max_new_tokens=12, stop=stop)
    assert stopped == [tokens[: row + 3] for row, tokens in enumerate(free)]
    assert sorted(calls) == [(row, n + 1) for row in range(4) for n in range(row + 3)]


def byte_text(ids: list[int]) -> str:
    """A tokenizer whose tokens are single bytes, then all pairs of some bytes."""
    return b"".join(byte_pieces(token) for token in ids).decode("utf-8", errors="replace")


def byte_pieces(token: int) -> bytes:
    """Letters, a border inside of a stop text, and halves of characters."""
    pieces = [
        b"a",
        b"b",
        b"ab",
        b"ba",
        b"\n",
        b"\nc",
        b"c\n",
        b"\xc3",
        b"\xa9",
        b"\xf0\x9f",
        b"\x98\x80",
    ]
    return pieces[token % len(pieces)]


STOPS = ["a\nc", "bb", "\u00e9"]


def first_end(text: str, stops: list[str]) -> int | None:
    """Where a text is cut: at the stop text that is complete first."""
    for end in range(len(text) + 1):
        ends = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if ends:
            return min(ends)
    return None


@pytest.mark.parametrize("bunch", [1, 5])
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_batched_text_and_streams_are_those_of_one_at_a_time(
    model: Phi, bunch: int, temperature: float
) -> None:
    """Stop texts across token borders, ragged prompts, rows that end at different times."""
    prompts = [*PROMPTS, [7], [8, 8], [100, 3], [44] * 20]
    seeds = list(range(len(prompts)))
    settings = {"max_new_tokens": 15, "temperature": temperature, "top_p": 0.9}
    free = [
        generate(model, [prompt], seed=[seed], **settings)[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    expected = []
    for tokens in free:
        text = byte_text(tokens)
        cut = first_end(text, STOPS)
        expected.append((text if cut is None else text[:cut], "length" if cut is None else "stop"))
    found = generate_text(
        model, prompts, byte_text, stops=STOPS, seed=seeds, bunch=bunch, **settings
    )
    assert [(row.text, row.finish) for row in found] == expected
    assert 2 <= sum(finish == "stop" for _, finish in expected) < len(prompts)

    pieces = [""] * len(prompts)
    finished: list[int] = []
    for event in stream_text(
        model, prompts, byte_text, stops=STOPS, seed=seeds, bunch=bunch, **settings
    ):
        assert event.row not in finished
        assert event.text or event.finish
        pieces[event.row] += event.text
        if event.finish is not None:
            finished.append(event.row)
    assert pieces == [text for text, _ in expected]
    assert sorted(finished) == list(range(len(prompts)))


def test_each_row_has_its_own_stop_texts(model: Phi) -> None:
    free = generate_text(model, [PROMPTS[0]] * 3, byte_text, max_new_tokens=40)[0].text
    stops = [[free[9:12]], [], [free[20:24], free[5:8]]]
    found = generate_text(model, [PROMPTS[0]] * 3, byte_text, max_new_tokens=40, stops=stops)
    cuts = [first_end(free, row) for row in stops]
    assert [row.text for row in found] == [free[:cut] for cut in cuts]
    assert found[2].num_tokens < found[1].num_tokens == 40
    with pytest.raises(ValueError, match="one text"):
        generate_text(model, PROMPTS, byte_text, max_new_tokens=3, stops="end")
    with pytest.raises(ValueError, match=r"2 rows.*4"):
        generate_text(model, PROMPTS, byte_text, max_new_tokens=3, stops=[["a"], ["b"]])
    with pytest.raises(ValueError, match="empty"):
        generate_text(model, PROMPTS, byte_text, max_new_tokens=3, stops=[""])


@given(st.lists(st.integers(0, 10), max_size=90), st.lists(st.sampled_from(STOPS), max_size=3))
@settings(max_examples=150, deadline=None)
def test_pieces_of_text_are_the_whole_text(tokens: list[int], stops: list[str]) -> None:
    row = TextRow(byte_text, stops)
    pieces = [row.add(token) for token in tokens]
    shown = "".join(pieces)
    whole = byte_text(tokens)
    assert row.text == shown
    assert whole.startswith(shown)
    last = row.finish()
    cut = first_end(whole, stops)
    assert row.text == shown + last == (whole if cut is None else whole[:cut])
    assert row.stopped == (cut is not None)
    assert row.add(0) == row.finish() == "" or cut is None


def test_text_is_held_back_no_longer_than_needed() -> None:
    row = TextRow(byte_text, ["a\nc"])
    a, newline, half, other_half, letter = 0, 4, 7, 8, 1
    assert [row.add(token) for token in (letter, a, newline, a, half, other_half)] == [
        "b", "", "", "a\n", "", "a\u00e9",
    ]  # fmt: skip


def test_a_growing_window_and_graph_shapes_change_nothing(model: Phi) -> None:
    """The pass that a CUDA graph records: masked, over places that hold nothing yet."""
    rows = [generate(model, [prompt], max_new_tokens=30)[0] for prompt in PROMPTS]
    for window in (1, 8, 64):
        decoder = Decoder(model, PROMPTS, 39, window_step=window)
        tokens = [decoder.prompt().argmax(-1)]
        for _ in range(10):
            tokens.append(decoder.step(tokens[-1]).argmax(-1))
        kept = torch.tensor([3, 1])
        decoder.keep(kept)
        tokens[-1] = tokens[-1][kept]
        late = [tokens[-1]]
        for _ in range(19):
            late.append(decoder.step(late[-1]).argmax(-1))
        assert torch.stack(tokens[:-1]).T.tolist() == [row[:10] for row in rows]
        assert torch.stack(late).T.tolist() == [rows[3][10:], rows[1][10:]]


def test_rows_that_have_ended_leave_the_batch(model: Phi) -> None:
    sizes: list[int] = []
    handle = model.blocks[0].register_forward_hook(
        lambda module, inputs, output: sizes.append(len(inputs[0]))
    )
    stopped = generate(
        model, PROMPTS, max_new_tokens=12, stop=lambda row, tokens: len(tokens) == 2 + 2 * row
    )
    handle.remove()
    assert [len(row) for row in stopped] == [2, 4, 6, 8]
    assert sizes == [40, 4, 4, 4, 2, 2, 1, 1]
    assert stopped == [recompute(model, prompt, 2 + 2 * row) for row, prompt in enumerate(PROMPTS)]


# Sampling


def test_fewer_tokens_are_the_first_of_more(model: Phi) -> None:
    for top_p in (0.8, 1.0):
        settings = {"temperature": 1.3, "top_p": top_p, "seed": 3}
        long = generate(model, PROMPTS, max_new_tokens=50, **settings)
        short = generate(model, PROMPTS, max_new_tokens=17, bunch=4, **settings)
        assert short == [row[:17] for row in long]


def test_samples_depend_on_the_seed_and_the_row_alone(model: Phi) -> None:
    def sample(prompts: list[list[int]], seed: int | list[int] = 7) -> list[list[int]]:
        return generate(model, prompts, max_new_tokens=30, temperature=1.5, top_p=0.9, seed=seed)

    together = sample(PROMPTS)
    assert sample(PROMPTS) == together
    assert sample(PROMPTS, seed=8)[0] != together[0]
    assert sample(PROMPTS[:1]) == together[:1]
    assert sample([PROMPTS[0], [1], [2, 2, 2], [3]])[0] == together[0]
    # equal prompts are different samples
    assert sample([PROMPTS[0]] * 2)[0] != sample([PROMPTS[0]] * 2)[1]
    # a seed for each row: the place in the batch does not matter either
    seeded = sample(PROMPTS, seed=[11, 12, 13, 14])
    assert sample(PROMPTS[::-1], seed=[14, 13, 12, 11]) == seeded[::-1]
    assert sample([PROMPTS[2]], seed=[13]) == [seeded[2]]


def first_tokens(model: Phi, count: int, **settings: float) -> Tensor:
    """How often each token comes first in many samples of one prompt."""
    rows = generate(model, [PROMPTS[2]] * count, max_new_tokens=1, seed=5, **settings)
    return torch.bincount(torch.tensor(rows)[:, 0], minlength=CONFIG.vocab_size) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_first_token_follows_the_softmax(model: Phi, temperature: float) -> None:
    count = 4000
    expected = (logits_after(model, PROMPTS[2]) / temperature).softmax(-1)
    seen = first_tokens(model, count, temperature=temperature)
    # five standard deviations of a frequency, for each token
    bound = 5 * (expected * (1 - expected) / count).sqrt() + 2 / count
    assert ((seen - expected).abs() <= bound).all()
    assert expected.max() < 0.9
    # the test would notice another temperature
    other = (logits_after(model, PROMPTS[2]) / (temperature * 3)).softmax(-1)
    assert not ((seen - other).abs() <= bound).all()


@pytest.mark.parametrize("top_p", [0.2, 0.6, 0.95])
def test_top_p_keeps_the_smallest_sufficient_set(model: Phi, top_p: float) -> None:
    count = 4000
    probability = logits_after(model, PROMPTS[2]).softmax(-1)
    kept: list[int] = []
    for token in probability.argsort(descending=True).tolist():
        kept.append(token)
        if probability[kept].sum() >= top_p:
            break
    expected = torch.zeros_like(probability)
    expected[kept] = probability[kept] / probability[kept].sum()
    seen = first_tokens(model, count, temperature=1.0, top_p=top_p)
    assert set(seen.nonzero()[:, 0].tolist()) <= set(kept)
    bound = 5 * (expected * (1 - expected) / count).sqrt() + 2 / count
    assert ((seen - expected).abs() <= bound).all()


def test_tiny_top_p_is_greedy(model: Phi) -> None:
    sampled = generate(model, PROMPTS, max_new_tokens=20, temperature=3.0, top_p=1e-9)
    assert sampled == generate(model, PROMPTS, max_new_tokens=20)


# Limits


def test_context_is_used_to_its_end_and_not_beyond(model: Phi) -> None:
    prompt = list(range(1, 37))
    assert generate(model, [prompt], max_new_tokens=60) == [recompute(model, prompt, 60)]
    with pytest.raises(ValueError, match=r"prompt 1 .*36 .*61 .*96"):
        generate(model, [[1], prompt], max_new_tokens=61)


def test_short_rows_may_use_the_context_beside_long_ones(model: Phi) -> None:
    """Padding takes no position: what counts is each row's own length."""
    long = [(7 * i) % CONFIG.vocab_size for i in range(90)]
    together = generate(model, [long, [5, 6]], max_new_tokens=6)
    assert together == [recompute(model, long, 6), recompute(model, [5, 6], 6)]


def test_nothing_to_do(model: Phi) -> None:
    assert generate(model, [], max_new_tokens=5) == []
    assert generate(model, PROMPTS, max_new_tokens=0) == [[], [], [], []]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 has no token"),
        ([[1, 211]], {}, "prompt 0 has an id outside"),
        ([[-1]], {}, "prompt 0 has an id outside"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens"),
        ([[1]], {"temperature": -0.1}, "temperature"),
        ([[1]], {"temperature": math.nan}, "temperature"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.1}, "top_p"),
        ([[1]], {"bunch": 0}, "bunch"),
        ([[1]], {"cuda_graphs": "always"}, "cuda_graphs"),
        ([[1]], {"seed": [1, 2]}, "2 seeds for 1 prompts"),
    ],
)
def test_calls_that_make_no_sense(model: Phi, prompts, settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **{"max_new_tokens": 3, **settings})


def test_half_precision_runs(model: Phi) -> None:
    """Not compared token by token: rounding may tip a tie."""
    half = Phi(CONFIG).eval().bfloat16()
    half.load_state_dict(model.state_dict())
    rows = generate(half, PROMPTS, max_new_tokens=10)
    assert [len(row) for row in rows] == [10] * 4
    exact = logits_after(model, PROMPTS[2])
    assert exact.max() - exact[rows[2][0]] < 0.2


def test_training_goes_on_after_generating() -> None:
    """What generation caches for the process must not be unfit for a backward pass."""
    config = Model(num_layers=1, hidden_size=16, num_heads=2, vocab_size=20, rotary_base=777.0)
    model = Phi(config)
    generate(model, [[1, 2]], max_new_tokens=3)
    model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
    assert model.blocks[0].qkv.weight.grad.abs().sum() > 0
