"""The README.md of an exported model: what it is, what made it, how it scores, how to load it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megaphi.config import Model
from megaphi.formats.files import read_json_object
from megaphi.formats.provenance import Provenance, training_data
from megaphi.model.phi import num_parameters

_SUMMARY_NAME = "summary.json"
# what of the recipe made the weights what they are; the rest is about the machines
_RECIPE_SECTIONS = ("model", "optimizer", "schedule", "precision")


@dataclass(frozen=True)
class Score:
    """One pass@k of `megaphi evaluate`."""

    suite: str
    k: int
    value: float
    """Share of problems solved, 0 to 1."""
    low: float
    high: float
    """95% confidence interval."""
    problems: int
    sampling: str
    """How the completions were drawn."""


def read_scores(directory: Path, identity: str | None) -> list[Score]:
    """Read the results of `megaphi evaluate` of this model.

    Args:
        directory: the output directory of the evaluation.
        identity: see `Provenance.identity`.

    Raises:
        ValueError: there are no results, or they are another model's.
    """
    path = directory / _SUMMARY_NAME
    summary = read_json_object(path)
    measured = summary.get("weights_sha256")
    if identity is None or measured != identity:
        raise ValueError(
            f"{path}: scores of {str(summary.get('model'))[:120]!r}, whose weights are not those "
            "that are converted; evaluate this checkpoint"
        )
    return _scores_of(summary, path)


def find_scores(run_dir: Path, identity: str | None) -> list[Score]:
    """The results below a run directory that are of this very checkpoint, at most two deep."""
    found: list[Score] = []
    candidates = [*run_dir.glob(f"*/{_SUMMARY_NAME}"), *run_dir.glob(f"*/*/{_SUMMARY_NAME}")]
    for path in sorted(candidates):
        summary = read_json_object(path)
        if identity is not None and summary.get("weights_sha256") == identity:
            found += _scores_of(summary, path)
    return found


def _scores_of(summary: Mapping[str, Any], path: Path) -> list[Score]:
    """The scores in one summary.json."""
    sampling = summary.get("sampling")
    drawn = (
        ", ".join(f"{key} {value}" for key, value in sampling.items())
        if isinstance(sampling, dict)
        else "not recorded"
    )
    try:
        return [
            Score(
                suite=str(summary["suite"]),
                k=int(k),
                value=float(score["value"]),
                low=float(score["low"]),
                high=float(score["high"]),
                problems=int(score["problems"]),
                sampling=drawn,
            )
            for k, score in summary["pass@k"].items()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a summary of megaphi evaluate ({error})") from error


def render_card(
    config: Model,
    dtype: torch.dtype,
    provenance: Provenance,
    scores: Sequence[Score] = (),
    *,
    license_id: str | None = None,
    name: str | None = None,
    directory: str = "DIRECTORY",
) -> str:
    """The text of the card.

    Args:
        config: the model.
        dtype: format of the weights.
        provenance: where it comes from.
        scores: of this model.
        license_id: SPDX identifier; it is the user's to choose, so without it the field says so.
        name: title; the run's name if it is not given.
        directory: name of the exported directory, for the commands.
    """
    title = name or provenance.name
    front = [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:\n- phi\n- megaphi",
        f"license: {license_id}" if license_id else "# license: choose one; none was given",
    ]
    parts = [
        "---\n" + "\n".join(front) + "\n---\n",
        f"# {title}\n",
        "A phi model trained with megaphi. It is a base model: it continues text and follows no "
        "instructions. Run the code that it writes only in a sandbox.\n",
        _table(("", ""), _facts(config, dtype, provenance)),
        _scores_section(scores),
        _data_section(provenance),
        _recipe_section(provenance),
        _LOADING.replace("DIRECTORY", directory),
    ]
    return "\n".join(part for part in parts if part)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _facts(config: Model, dtype: torch.dtype, provenance: Provenance) -> list[tuple[str, ...]]:
    """Shape and origin."""

    def known(value: object) -> str:
        return "not recorded" if value is None else str(value)

    tokens = provenance.tokens
    identity = provenance.identity
    return [
        ("architecture", "phi (`PhiForCausalLM`)"),
        ("parameters", f"{num_parameters(config):,}"),
        (
            "layers x hidden x heads",
            f"{config.num_layers} x {config.hidden_size} x {config.num_heads}",
        ),
        ("MLP width", str(config.ffn_size)),
        ("vocabulary", str(config.vocab_size)),
        ("context", str(config.max_sequence_length)),
        ("rotary", f"{config.rotary_dim} of {config.head_size}, base {config.rotary_base:g}"),
        ("weights", str(dtype).removeprefix("torch.")),
        ("checkpoint", f"`{provenance.checkpoint}`, manifest {known(identity and identity[:16])}"),
        ("step", known(provenance.step)),
        ("training tokens seen", known(tokens if tokens is None else f"{tokens:,}")),
        ("recipe (SHA-256 of config.yaml)", known(provenance.recipe_sha256)),
    ]


def _scores_section(scores: Sequence[Score]) -> str:
    """Scores with their intervals, or that there are none."""
    if not scores:
        return "## Scores\n\nNone were given. `megaphi evaluate` measures pass@k.\n"
    rows = [
        (
            score.suite,
            f"pass@{score.k}",
            f"{100 * score.value:.1f}% ({100 * score.low:.1f} to {100 * score.high:.1f})",
            str(score.problems),
            score.sampling,
        )
        for score in scores
    ]
    head = ("suite", "score", "value (95% interval)", "problems", "sampling")
    return "## Scores\n\n" + _table(head, rows)


def _data_section(provenance: Provenance) -> str:
    """The token files of the recipe."""
    rows = [
        (
            f"`{file.name}`",
            f"{file.tokens:,}" if file.tokens is not None else "not recorded",
            file.tokenizer or "not recorded",
            f"`{file.sha256}`" if file.sha256 else "not recorded",
        )
        for file in training_data(provenance)
    ]
    if not rows:
        return ""
    return "## Training data\n\n" + _table(
        ("token file", "tokens", "tokenizer", "SHA-256 of .bin"), rows
    )


def _recipe_section(provenance: Provenance) -> str:
    """The sections of the recipe that decide the weights; no path of anybody's machine."""
    import yaml

    kept = {name: provenance.section(name) for name in _RECIPE_SECTIONS if provenance.section(name)}
    train = provenance.section("train")
    numbers = ("steps", "seed", "global_batch_size")
    kept_train = {key: train[key] for key in numbers if key in train}
    if kept_train:
        kept["train"] = kept_train
    if not kept:
        return ""
    text = yaml.safe_dump(kept, sort_keys=False).replace("```", "")
    return f"## Recipe\n\n```yaml\n{text}```\n"


_LOADING = """## Loading it

transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
ids = tokenizer("def fibonacci(n):", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))
```

vLLM: `vllm serve DIRECTORY` (completions; it has no chat template)

llama.cpp: `megaphi convert to-gguf DIRECTORY model.gguf --type Q8_0`, then
`llama-completion -m model.gguf -p "def fibonacci(n):"`
"""
