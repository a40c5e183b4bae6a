"""What `megaphi reproduce figure` compares: phi-1's figure 2.1 in a world that a laptop can learn.

The paper (arXiv 2306.11644) compares sizes, corpora and finetuning on exercises by HumanEval. Here
the world is that of `data_pipeline/small_programs`; raw code is Python's standard library. Every
model of a comparison sees the same number of tokens:

    pretraining alone         P + E tokens of a corpus
    with exercises            P tokens of the corpus, then E tokens of exercises
    exercises alone           P + E tokens of exercises: the rival that an honest figure needs
    wrong or narrow exercises as `with exercises`, at the middle size
"""

import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.reproduce.jobs import Job

CORPORA = ("raw", "filtered", "filtered+textbooks")
EXERCISES = ("none", "clean", "half-wrong", "narrow")
BEST = "filtered+textbooks"
GROUPS = ("depth-1", "held-out-depth-2", "held-out-depth-3", "held-out-phrasing", "textbook-only")
NARROW_COMPOSITIONS = 24
TOKENS_PER_STEP = 2048
SEQUENCE_LENGTH = 128
VOCAB_SIZE = 1024
TOKENS_PER_TEXT = {"exercises": 60, "textbooks": 220}
"""Fewer than a text has: a corpus is a little too large, never too small."""
NOT_LIBRARY = ("site-packages", "dist-packages", "test", "idlelib", "lib2to3")
"""Folders of Python's library that are left out."""


@dataclass(frozen=True)
class Size:
    """Layers and width of a model; heads are 32 wide."""

    name: str
    num_layers: int
    hidden_size: int

    @property
    def num_parameters(self) -> int:
        """Weights of the matrices and embeddings, biases and norms."""
        from megaphi.config import Model
        from megaphi.model.phi import num_parameters

        return num_parameters(Model(**self.as_options()))

    def as_options(self) -> dict[str, int]:
        """Keys of a recipe's section `model`."""
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_heads": self.hidden_size // 32,
            "vocab_size": VOCAB_SIZE,
            "max_sequence_length": 512,
        }


SMALL, MIDDLE, LARGE = Size("0.3M", 4, 64), Size("1M", 4, 128), Size("3M", 6, 192)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of it."""

    sizes: tuple[Size, ...]
    seeds: int
    pretraining_tokens: int
    exercise_tokens: int
    problems: int


SCALES = {
    "quick": Scale(
        sizes=(MIDDLE,), seeds=1, pretraining_tokens=400_000, exercise_tokens=800_000, problems=400
    ),
    "full": Scale(
        sizes=(SMALL, MIDDLE, LARGE),
        seeds=3,
        pretraining_tokens=600_000,
        exercise_tokens=1_800_000,
        problems=500,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One model of the figure."""

    size: Size
    corpus: str
    """One of CORPORA, or `none`."""
    exercises: str
    """One of EXERCISES."""
    seed: int

    @property
    def name(self) -> str:
        """Unique, fit for a file name."""
        return f"{self.size.name}_{self.corpus}_{self.exercises}_{self.seed}"


def arms(scale: Scale, corpora: tuple[str, ...] = CORPORA) -> list[Arm]:
    """The models of a figure."""
    found: list[Arm] = []
    middle = scale.sizes[len(scale.sizes) // 2]
    for seed in range(1, scale.seeds + 1):
        for size in scale.sizes:
            pairs = [(c, e) for c in corpora for e in ("none", "clean")]
            pairs.append(("none", "clean"))
            if size == middle:
                pairs += [(BEST, "half-wrong"), (BEST, "narrow")]
            found += [Arm(size=size, corpus=c, exercises=e, seed=seed) for c, e in pairs]
    return found


class Plan:
    """The commands of a figure, all under one directory.

    Args:
        scale: how much of it.
        out: directory of everything.
        recipe: of the trainings.
        labels: records with `quality.score` to train the filter on, or None for the stated rule.
        more: further corpora to pretrain on, records directories by name.
    """

    def __init__(
        self,
        scale: Scale,
        out: Path,
        recipe: Path,
        *,
        labels: Path | None = None,
        more: Mapping[str, Path] | None = None,
    ) -> None:
        self.scale = scale
        self.out = out
        self.recipe = recipe
        self.labels = labels
        self.more = dict(more or {})
        self.arms = arms(scale, (*CORPORA, *self.more))

    def jobs(self) -> list[Job]:
        """All commands, each once."""
        found: dict[str, Job] = {}
        for job in (*self._corpora(), *(job for arm in self.arms for job in self.commands_of(arm))):
            found.setdefault(job.name, job)
        return list(found.values())

    def score_of(self, arm: Arm) -> Path:
        """Directory of an arm's evaluation."""
        return self.out / "scores" / arm.name

    @property
    def suite(self) -> Path:
        """The problems, in HumanEval's form."""
        return self.out / "suite.jsonl"

    def _data(self, name: str, verb: str, *words: str | Path, after: tuple[str, ...] = ()) -> Job:
        out = self.out / "data" / name
        command = ("data", verb, *map(str, words), "--out", str(out))
        return Job(name=f"data-{name}", words=command, out=out, after=after, weight=0.2)

    def _compose(self, name: str, kind: str, tokens: int, *words: str) -> Job:
        samples = str(tokens // TOKENS_PER_TEXT[kind])
        options = ("--kind", kind, "--samples", samples, "--world", "figure", *words)
        return self._data(name, "compose", *options)

    def _corpora(self) -> Iterator[Job]:
        """Records, tokenizer and token files."""
        total = self.scale.pretraining_tokens + self.scale.exercise_tokens
        data, library = self.out / "data", sysconfig.get_path("stdlib")
        skip = [word for name in NOT_LIBRARY for word in ("--exclude", name)]
        yield self._data("files", "ingest", library, *skip, "--source", "stdlib")
        yield self._data("clean", "heuristics", data / "files", after=("data-files",))
        yield self._data("raw", "dedup", data / "clean", after=("data-clean",))
        labels, made = self.labels, ["data-raw"]
        if labels is None:
            labels, made = data / "labels", ["data-raw", "data-labels"]
            yield self._rule_labels(data / "raw")
        yield self._data("filter", "train-filter", labels, data / "raw", after=tuple(made))
        yield self._data(
            "filtered", "filter", data / "raw", "--filter", data / "filter",
            "--keep-tokens", str(3 * total), after=("data-filter",),
        )  # fmt: skip
        yield self._compose("textbooks", "textbooks", total)
        yield self._compose("clean-exercises", "exercises", total)
        yield self._compose("half-wrong-exercises", "exercises", total, "--wrong", "0.5")
        narrow = ("--compositions", str(NARROW_COMPOSITIONS))
        yield self._compose("narrow-exercises", "exercises", total, *narrow)
        texts = ("filtered", "textbooks", "clean-exercises")
        yield self._data(
            "tokenizer", "train-tokenizer", *(data / text for text in texts),
            "--vocab-size", str(VOCAB_SIZE), after=tuple(f"data-{text}" for text in texts),
        )  # fmt: skip
        for text in ("raw", "filtered", "textbooks", *self._exercise_texts()):
            yield self._tokens(text, data / text, (f"data-{text}",))
        for name, records in self.more.items():
            yield self._tokens(name, records, ())
        options = ("--kind", "suite", "--samples", str(self.scale.problems), "--world", "figure")
        yield Job(
            name="suite",
            words=(
                "data",
                "compose",
                *options,
                "--groups",
                ",".join(GROUPS),
                "--out",
                str(self.suite),
            ),
            out=self.suite,
            weight=0.2,
        )
        yield Job(
            name="canonical",
            words=("evaluate", "--canonical", *self._evaluation("canonical")),
            out=self.out / "scores" / "canonical",
            after=("suite",),
            weight=0.2,
        )
        yield Job(
            name="leaks",
            words=(
                "data", "decontaminate", *(str(data / text) for text in ("textbooks", *texts[2:])),
                "--against", str(self.suite), "--out", str(self.out / "leaks"),
                "--max-reject", "1", "--no-ast", "--ngram", "30",
            ),
            out=self.out / "leaks",
            after=("suite", "data-textbooks", "data-clean-exercises"),
            weight=0.2,
        )  # fmt: skip

    def _tokens(self, name: str, records: Path, after: tuple[str, ...]) -> Job:
        prefix, tokenizer = self.out / "tokens" / name, self.out / "data" / "tokenizer"
        options = ("--tokenizer", str(tokenizer), "--out", str(prefix))
        return Job(
            name=f"tokens-{name}",
            words=("data", "tokenize", str(records), *options),
            out=prefix.with_name(f"{name}.bin"),
            after=(*after, "data-tokenizer"),
            weight=0.2,
        )

    def _exercise_texts(self) -> list[str]:
        return [f"{kind}-exercises" for kind in EXERCISES if kind != "none"]

    def _rule_labels(self, records: Path) -> Job:
        out = self.out / "data" / "labels"
        return Job(
            name="data-labels",
            words=("reproduce", "labels", str(records), "--out", str(out)),
            out=out,
            after=("data-raw",),
            weight=0.2,
        )

    def _evaluation(self, name: str) -> tuple[str, ...]:
        out = str(self.out / "scores" / name)
        return ("--suite", str(self.suite), "--out", out, "--workers", "1", "--timeout", "1")

    def commands_of(self, arm: Arm) -> Iterator[Job]:
        """Pretraining, finetuning and score of a model."""
        before, tokens = None, self.scale.pretraining_tokens
        total = tokens + self.scale.exercise_tokens
        if arm.corpus == "none":
            last = self._training(arm.size, "clean-exercises", total, arm.seed, None)
        elif arm.exercises == "none":
            last = self._training(arm.size, arm.corpus, total, arm.seed, None)
        else:
            before = self._training(arm.size, arm.corpus, tokens, arm.seed, None)
            yield before
            kind = f"{arm.exercises}-exercises"
            last = self._training(arm.size, kind, total - tokens, arm.seed, before)
        yield last
        model = ("evaluate", str(last.out), "--max-new-tokens", "96", "--batch-size", "64")
        yield Job(
            name=f"score-{arm.name}",
            words=(*model, *self._evaluation(arm.name)),
            out=self.score_of(arm),
            after=(last.name, "suite"),
            weight=0.3,
        )

    def _training(self, size: Size, corpus: str, tokens: int, seed: int, before: Job | None) -> Job:
        """A training, from random weights or from those of another."""
        steps = tokens // TOKENS_PER_STEP
        stem = f"{size.name}_{corpus}_{steps}_{seed}"
        name = f"train-{stem}" if before is None else f"{before.name}_then_{corpus}_{steps}"
        run_dir = self.out / "runs" / name.removeprefix("train-")
        parts = corpus.split("+")
        prefixes = [str(self.out / "tokens" / part) for part in parts]
        data = prefixes[0] if len(parts) == 1 else f"[{', '.join(f'1.0, {p}' for p in prefixes)}]"
        options: dict[str, object] = {
            "train.run_dir": run_dir,
            "train.steps": steps,
            "train.seed": seed,
            "train.micro_batch_size": TOKENS_PER_STEP // SEQUENCE_LENGTH,
            "train.global_batch_size": TOKENS_PER_STEP // SEQUENCE_LENGTH,
            "data.train": data,
            "data.sequence_length": SEQUENCE_LENGTH,
            "checkpoint.interval": steps,
            **{f"model.{key}": value for key, value in size.as_options().items()},
        }
        after = tuple(f"tokens-{part}" for part in parts)
        if before is not None:
            options["checkpoint.initialize_from"] = before.out
            after = (*after, before.name)
        words = tuple(f"--{key}={value}" for key, value in options.items())
        # bytes moved grow with width and depth; a figure for the estimate of what is left
        cost = steps * size.num_layers * size.hidden_size / (4 * 128 * 300)
        return Job(
            name=name,
            words=("train", str(self.recipe), *words),
            out=run_dir,
            after=after,
            weight=cost,
        )
