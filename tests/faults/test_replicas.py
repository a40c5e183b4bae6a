"""Copies of a value that drift apart are found, and their holders named."""

import json
from pathlib import Path

import pytest
import torch

from megaphi.resilience.replicas import fingerprint
from tests.helpers import metrics, toy_options
from tests.layouts import Launcher


def train(
    launcher: Launcher, tokens: Path, run_dir: Path, plan: dict[str, object], **overrides: object
) -> tuple[list[int], str]:
    """Train on two processes, one of which gets a value of its own; exit statuses and output."""
    run_dir.with_suffix(".plan.json").write_text(json.dumps(plan))
    options = {"train__replica_check_interval": 4, "parallel__tensor": 2, **overrides}
    log = run_dir.with_suffix(".log")
    log.unlink(missing_ok=True)
    statuses = launcher.train(
        toy_options(tokens, run_dir, **options), 2, log, "tests.faults.faulty_trainings:flipped"
    )
    return statuses, log.read_text()


@pytest.mark.parametrize(
    ("tensor", "layout"),
    [
        # whole on every process of the tensor axis
        ("model.blocks.1.norm.weight", {}),
        # cut over the tensor axis, but copied in every group
        ("model.blocks.0.qkv.weight", {"parallel__tensor": 1, "parallel__replicate": 2}),
    ],
)
def test_a_flipped_bit_is_found_and_named(
    tensor: str, layout: dict[str, int], launcher: Launcher, toy_tokens: Path, tmp_path: Path
) -> None:
    """The comparisons of steps 0 and 4 found nothing, that of step 8 does."""
    run_dir = tmp_path / "run"
    plan = {"rank": 1, "step": 6, "tensor": tensor, "bit": 3}
    statuses, printed = train(launcher, toy_tokens, run_dir, plan, **layout)
    assert statuses == [1, 1], printed
    assert max(row["step"] for row in metrics(run_dir)) == 7  # the 8th is reported with the 9th
    for rank in (0, 1):
        (line,) = [li for li in printed.splitlines() if f"[rank {rank}]: error" in li]
        assert "step 8: ranks 0, 1 must hold the same" in line


@pytest.mark.parametrize(
    "tensor", ["optimizer.second_moment.blocks.1.norm.weight", "optimizer.updates"]
)
def test_all_that_the_optimizer_keeps_is_compared(
    tensor: str, launcher: Launcher, toy_tokens: Path, tmp_path: Path
) -> None:
    """A bit that flips just before the comparison, so that no weight differs yet."""
    plan = {"rank": 1, "step": "check", "tensor": tensor, "bit": 0}
    statuses, printed = train(launcher, toy_tokens, tmp_path / "run", plan)
    assert statuses == [1, 1], printed
    assert f"step 8: ranks 0, 1 must hold the same {tensor}, but do not" in printed


def test_every_group_is_compared_and_everybody_is_told(launcher: Launcher, tmp_path: Path) -> None:
    """Four processes, two by two, some of which see no difference in their own groups."""
    log, entry = tmp_path / "log", "tests.faults.faulty_trainings:copies_of_four"
    assert launcher.train([], 4, log, entry) == [0] * 4, log.read_text()
    said = log.read_text().splitlines()
    for rank in range(4):
        mine = dict(line.split(": ", 1) for line in said if line.startswith(f"rank {rank}, "))
        words = {case.partition(", ")[2]: text for case, text in mine.items()}
        assert words.pop("sound") == "equal"
        assert "ranks 2, 3 must hold the same seen by two" in words.pop("seen by two")
        assert "ranks 0, 1 must hold the same a column" in words.pop("a column")
        assert "ranks 0, 2 must hold the same a row" in words.pop("a row")
        assert "rank 2 holds another plain than the majority" in words.pop("plain")
        assert words == {}


def test_copies_that_differ_after_loading_stop_the_run(
    launcher: Launcher, toy_tokens: Path, tmp_path: Path
) -> None:
    """Before a step is trained with them."""
    run_dir = tmp_path / "run"
    name = "model.embedding.norm.weight"
    plan: dict[str, object] = {"rank": 1, "step": 99, "tensor": name, "bit": 0}
    statuses, printed = train(launcher, toy_tokens, run_dir, plan, train__steps=5)
    assert statuses == [0, 0], printed
    pinned = {"data__planned_samples": 5 * 8}
    statuses, printed = train(launcher, toy_tokens, run_dir, {**plan, "step": "load"}, **pinned)
    assert statuses == [1, 1], printed
    assert "step 5: ranks 0, 1 must hold the same model." in printed
    statuses, printed = train(launcher, toy_tokens, run_dir, plan, **pinned)
    assert statuses == [0, 0], printed  # the checkpoint itself was never at fault


def test_every_bit_counts_wherever_it_is() -> None:
    tensor = torch.randn(37, 5)
    original = fingerprint(tensor).item()
    assert fingerprint(tensor.t().contiguous().t()).item() == original
    seen = {original}
    for bit in range(32):
        changed = tensor.clone()
        changed.view(-1)[bit * 5].view(torch.int32).bitwise_xor_(
            -(1 << 31) if bit == 31 else 1 << bit
        )
        seen.add(fingerprint(changed).item())
    swapped = tensor.clone()
    swapped[[0, 1]] = tensor[[1, 0]]
    seen.add(fingerprint(swapped).item())
    assert len(seen) == 34


def test_large_tensors_are_hashed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000)
    whole = fingerprint(tensor).item()
    monkeypatch.setattr("megaphi.resilience.replicas.HASH_BLOCK", 7)
    assert fingerprint(tensor).item() == whole
    half = torch.randn(64).bfloat16()
    other = half.clone()
    other[5] = -other[5]
    assert fingerprint(half).item() != fingerprint(other).item()
