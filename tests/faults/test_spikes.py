"""Losses that spike and gradients that are not numbers: what is done, on all processes alike."""

import contextlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from megaphi.config import Train
from megaphi.data.indexed import IndexedDatasetWriter
from megaphi.errors import RunError
from megaphi.formats.manifest import find_checkpoints, write_manifest
from megaphi.resilience.spikes import Rewind, Rewinds, Spike, SpikeWatch, merged, sample_at
from tests.faults.test_resume import final_tensors, tensors_of
from tests.helpers import curve, metrics, toy_options
from tests.layouts import Launcher

STEPS = 24
# steps 13 and 14 see these; two spiked steps are a spike, and three steps before are left out too
BAD = list(range(96, 112))
SPIKES = {
    "train__spike_deviations": 8,
    "train__spike_window": 6,
    "train__spike_steps": 2,
    "train__spike_rewind_steps": 3,
}


@pytest.fixture(scope="module")
def unique_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random tokens: every sample is known by its content."""
    prefix = tmp_path_factory.mktemp("unique") / "tokens"
    generator = np.random.default_rng(1)
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(100):
            writer.add_document(generator.integers(0, 512, 200).tolist())
    return prefix


def train(
    launcher: Launcher, tokens: Path, run_dir: Path, plan: dict[str, object], **overrides: object
) -> tuple[list[int], str]:
    """Train on two processes; exit statuses and output."""
    run_dir.with_suffix(".plan.json").write_text(json.dumps(plan))
    values = {
        "train__steps": STEPS, "schedule__decay_steps": STEPS, "data__planned_samples": 400,
        **SPIKES, **overrides,
    }  # fmt: skip
    log = run_dir.with_suffix(".log")
    log.unlink(missing_ok=True)
    entry = "tests.faults.faulty_trainings:" + ("nonfinite" if "where" in plan else "spiking")
    statuses = launcher.train(toy_options(tokens, run_dir, **values), 2, log, entry)
    return statuses, log.read_text()


def samples_of_steps(run_dir: Path) -> dict[int, list[int]]:
    """The samples that each step of the final history was given, over both processes."""
    steps: dict[int, list[int]] = {}
    for rank in (0, 1):
        lines = run_dir.with_suffix(f".samples-{rank}").read_text().splitlines()
        last = dict(json.loads(line) for line in lines)
        for step, numbers in last.items():
            steps[step] = sorted(steps.get(step, []) + numbers)
    return steps


@pytest.fixture(scope="module")
def rewound(
    launcher: Launcher, unique_tokens: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run whose loss spiked and that went back."""
    run_dir = tmp_path_factory.mktemp("rewound") / "run"
    statuses, printed = train(launcher, unique_tokens, run_dir, {"bad": BAD})
    assert statuses == [0, 0], printed
    assert "the loss spiked at steps 13 to 14" in printed
    assert printed.count("resuming from") == 1
    assert "resuming from" in printed
    assert "step-00000005" in printed
    return run_dir


def test_a_spike_leaves_out_exactly_the_samples_around_it(rewound: Path) -> None:
    """Steps 10 to 14, so that step 10 now gets what step 15 would have had."""
    steps = samples_of_steps(rewound)
    for step in range(1, STEPS + 1):
        first = (step - 1) * 8 if step < 10 else 112 + (step - 10) * 8
        assert steps[step] == list(range(first, first + 8)), step


def test_a_rewind_is_in_the_metrics_and_the_checkpoints(rewound: Path) -> None:
    (event,) = [row for row in metrics(rewound) if row.get("event") == "rewind"]
    assert event["skipped"] == [[72, 112]]
    assert not [row for row in metrics(rewound) if row.get("event") == "resume"]  # no restart
    assert (event["spike"]["first_step"], event["spike"]["last_step"]) == (13, 14)
    steps = [row["step"] for row in metrics(rewound) if "loss" in row]
    assert steps == list(range(1, STEPS + 1))
    state = json.loads((find_checkpoints(rewound)[0] / "trainer.json").read_text())
    assert state["rewinds"] == json.loads((rewound / "rewinds.json").read_text())
    assert len(state["spikes"]["window"]) == 6


@pytest.mark.parametrize("killed", ["write", "drop_void_checkpoints"])
def test_killed_in_a_rewind(
    killed: str, rewound: Path, launcher: Launcher, unique_tokens: Path, tmp_path: Path
) -> None:
    """Before anything was decided, or between the decision and the deletions."""
    run_dir = tmp_path / "run"
    statuses, _ = train(launcher, unique_tokens, run_dir, {"bad": BAD, "killed": killed})
    assert statuses[0] == -9
    assert find_checkpoints(run_dir)[0].name == "step-00000010"  # void, and still there
    statuses, printed = train(launcher, unique_tokens, run_dir, {"bad": BAD})
    assert statuses == [0, 0], printed
    assert samples_of_steps(run_dir) == samples_of_steps(rewound)
    assert curve(run_dir) == curve(rewound)
    assert final_tensors(run_dir) == final_tensors(rewound)


def test_a_resumed_run_knows_the_losses_before(
    rewound: Path, launcher: Launcher, unique_tokens: Path, tmp_path: Path
) -> None:
    """Two steps after its start it has seen too few to tell by themselves what a spike is."""
    run_dir = tmp_path / "run"
    for steps in (10, STEPS):
        plan: dict[str, object] = {"bad": BAD}
        statuses, printed = train(launcher, unique_tokens, run_dir, plan, train__steps=steps)
        assert statuses == [0, 0], printed
    assert samples_of_steps(run_dir) == samples_of_steps(rewound)
    assert final_tensors(run_dir) == final_tensors(rewound)


def test_too_many_spikes_stop_the_run(
    launcher: Launcher, unique_tokens: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    options = {"train__max_rewinds": 0}
    statuses, printed = train(launcher, unique_tokens, run_dir, {"bad": BAD}, **options)
    assert statuses == [1, 1], printed
    assert "after 0 rewinds (train.max_rewinds)" in printed


def test_what_is_a_spike() -> None:
    train = Train(run_dir="r", steps=1, spike_deviations=4, spike_window=4, spike_steps=2)
    watch = SpikeWatch(train)
    for step, loss in enumerate([9.0, 3.0, 3.2, 3.0, 3.2], start=1):
        assert watch.add(step, loss) is None  # not even the first, for lack of a measure
    state = json.loads(json.dumps(watch.state()))
    assert watch.add(6, 3.45) is None  # 3.1 + 4 x 0.1 is the limit: spiked, but alone
    again = SpikeWatch(train)
    again.load_state(state)
    assert again.add(6, 3.55) is None
    spike = again.add(7, 3.6)
    assert spike is not None
    assert (spike.first_step, spike.last_step) == (6, 7)
    assert spike.mean == pytest.approx(3.1)
    # an ordinary step between two spiked ones
    again.load_state(json.loads(json.dumps({"window": [3.0, 3.2, 3.0, 3.2], "in_a_row": 0})))
    assert [again.add(step, loss) for step, loss in ((8, 9.0), (9, 3.1), (10, 9.0))] == [None] * 3
    # losses that are all the same: a tenth more is noise, not infinitely many deviations
    flat = SpikeWatch(train)
    assert [flat.add(step, 3.0) for step in range(1, 5)] == [None] * 4
    assert [flat.add(step, 3.1) for step in range(5, 8)] == [None] * 3
    off = SpikeWatch(Train(run_dir="r", steps=1, spike_window=1))
    assert [off.add(step, 10.0**step) for step in range(4)] == [None] * 4


def test_positions_with_ranges_left_out() -> None:
    """Against the list of what is left."""
    skipped = merged([[4, 6], [9, 12], [6, 7]])
    assert skipped == [[4, 7], [9, 12]]
    left = [n for n in range(40) if not (4 <= n < 7 or 9 <= n < 12)]
    assert [sample_at(n, skipped) for n in range(len(left))] == left


def test_rewinds_add_up(tmp_path: Path) -> None:
    """A second spike counts positions; what it leaves out are samples, beyond the first's."""
    train = Train(
        run_dir="r", steps=9, micro_batch_size=2, global_batch_size=2, spike_deviations=4,
        spike_window=1, spike_steps=1, spike_rewind_steps=1,
    )  # fmt: skip
    watch = SpikeWatch(train)
    watch.add(1, 1.0)
    spike = watch.add(3, 9.0)
    assert spike is not None
    once = Rewinds(tmp_path).after(spike, train)
    assert once.records[0].skipped == [[2, 6]]
    twice = once.after(spike, train)
    assert [twice.sample_at(n) for n in range(4)] == [0, 1, 10, 11]
    twice.write()
    assert Rewinds.read(tmp_path).records == twice.records


def checkpoint_of(run_dir: Path, step: int, rewinds: list[Rewind]) -> Path:
    """What looks like a checkpoint of a run that knew of these rewinds."""
    path = run_dir / f"step-{step:08d}"
    path.mkdir(parents=True)
    state = {"rewinds": [asdict(record) for record in rewinds]}
    (path / "trainer.json").write_text(json.dumps(state))
    write_manifest(path, {}, {"step": step})
    return path


FIRST = Rewind(Spike(3, 4, 9.0, 1.0, 0.1), 2, [[16, 32]])
SECOND = Rewind(Spike(11, 11, 9.0, 1.0, 0.1), 10, [[96, 112]])


def test_only_a_sound_checkpoint_from_before_is_gone_back_to(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        checkpoint_of(tmp_path, step, [FIRST])
    rewinds = Rewinds(tmp_path, [FIRST, SECOND])
    assert rewinds.find_checkpoint().name == "step-00000010"
    (tmp_path / "step-00000010" / "trainer.json").write_text("{}")
    assert rewinds.find_checkpoint().name == "step-00000009"
    for step in (8, 9):
        (tmp_path / f"step-{step:08d}" / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"step 11.*step 10"):
        rewinds.find_checkpoint()


def test_what_is_void_follows_from_what_a_checkpoint_knows(tmp_path: Path) -> None:
    """Steps after `void_after` of a record that it does not know of."""
    before = [checkpoint_of(tmp_path, step, []) for step in (2, 5)]
    between = [checkpoint_of(tmp_path, step, [FIRST]) for step in (7, 10, 11)]
    after = [checkpoint_of(tmp_path, step, [FIRST, SECOND]) for step in (12, 13)]
    rewinds = Rewinds(tmp_path, [FIRST, SECOND])
    for path in (*before, *between, *after):
        void = path in (before[1], between[2])
        with pytest.raises(ValueError, match="rewinds") if void else contextlib.nullcontext():
            known = json.loads((path / "trainer.json").read_text())["rewinds"]
            assert rewinds.joined(known, path) is rewinds
    rewinds.drop_void_checkpoints()
    left = {path.name for path in find_checkpoints(tmp_path)}
    assert left == {p.name for p in (before[0], *between[:2], *after)}


@pytest.mark.parametrize(
    ("where", "value"), [("loss", "nan"), ("gradient", "inf"), ("micro-batch", "nan")]
)
def test_one_nonfinite_step_is_skipped_by_all(
    where: str, value: str, launcher: Launcher, toy_tokens: Path, tmp_path: Path
) -> None:
    """Only rank 1 meets it; nobody's weights or moments change, and one more is not in a row."""
    run_dir = tmp_path / "run"
    plan = {"where": where, "value": value, "rank": 1, "step": 5, "steps": 1}
    options = {"train__max_nonfinite_steps": 2, "train__spike_deviations": 0}
    statuses, printed = train(
        launcher, toy_tokens, run_dir, plan, train__steps=5, checkpoint__interval=4, **options
    )
    assert statuses == [0, 0], printed
    skipped, before = find_checkpoints(run_dir)
    assert (skipped.name, before.name) == ("step-00000005", "step-00000004")
    assert tensors_of(skipped) == tensors_of(before)
    statuses, printed = train(
        launcher, toy_tokens, run_dir, {**plan, "step": 7}, train__steps=8, **options
    )
    assert statuses == [0, 0], printed
    rows = [row for row in metrics(run_dir) if "loss" in row]
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [5, 7]
    state = json.loads((find_checkpoints(run_dir)[0] / "trainer.json").read_text())
    assert (state["optimizer_updates"], state["skipped_updates"]) == (6, 2)
    assert final_tensors(run_dir) != tensors_of(before)


def test_many_nonfinite_steps_stop_the_run_with_checkpoints_from_before(
    launcher: Launcher, toy_tokens: Path, tmp_path: Path
) -> None:
    """Also where it was started again in between: they are counted on."""
    run_dir = tmp_path / "run"
    plan = {"where": "micro-batch", "value": "nan", "rank": 0, "step": 6, "steps": 99}
    options = {
        "checkpoint__interval": 1, "train__max_nonfinite_steps": 4, "train__spike_deviations": 0,
    }  # fmt: skip
    statuses, printed = train(launcher, toy_tokens, run_dir, plan, **options)
    assert statuses == [1, 1], printed
    assert "step 9: the gradient was not finite for 4 steps in a row" in printed
    assert [path.name for path in find_checkpoints(run_dir)] == ["step-00000005", "step-00000004"]
    # the last step is saved whatever it is
    statuses, printed = train(launcher, toy_tokens, run_dir, plan, train__steps=8, **options)
    assert statuses == [0, 0], printed
    statuses, printed = train(launcher, toy_tokens, run_dir, plan, **options)
    assert statuses == [1, 1], printed
    assert "step 9: the gradient was not finite for 4 steps in a row" in printed
