"""What may be different when a run is resumed: what is refused, reported, or does not matter.

`RECIPE_KEYS` and `FACTS` are the complete list. What would make the run another run (model, data,
its order) is refused; what changes its numbers from here on (learning rate, layout, versions) is
reported when it is resumed; where files are and how often things happen is free. Every key of the
recipe falls under one row, so that nothing changes in silence.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Action = Literal["refuse", "warn", "accept"]


@dataclass(frozen=True)
class Drift:
    """One row: what happens when something differs from the checkpoint."""

    what: str
    """A fact, or a recipe key; `*` stands for all keys of a section not named before."""
    action: Action
    why: str


RECIPE_KEYS = (
    Drift("train.run_dir", "accept", "where files lie"),
    Drift("train.steps", "accept", "the order and the decay that follow from it have rows here"),
    Drift("train.seed", "refuse", "order of the data and dropout"),
    Drift("train.global_batch_size", "refuse", "steps would no longer count the samples seen"),
    Drift("train.micro_batch_size", "warn", "order of sums"),
    Drift("train.spike_*", "warn", "which steps are rewound"),
    Drift("train.*", "accept", "how often something is checked, and limits"),
    Drift("data.train", "accept", "files are known by content"),
    Drift("data.validation", "accept", "files are known by content"),
    Drift("data.prefetch_batches", "accept", "speed only"),
    Drift("data.mask_documents", "warn", "what a token sees"),
    Drift("data.*", "refuse", "which sample comes when"),
    Drift("model.residual_dropout", "warn", "training continues with another rate"),
    Drift("model.attention_dropout", "warn", "training continues with another rate"),
    Drift("model.initializer_range", "accept", "used only for new weights"),
    Drift("model.*", "refuse", "shape or meaning of the weights"),
    Drift("parallel.*", "warn", "order of sums"),
    Drift("precision.*", "warn", "rounding"),
    Drift("compute.*", "warn", "rounding"),
    Drift("optimizer.*", "warn", "training continues with other values"),
    Drift("schedule.*", "warn", "training continues with another learning rate"),
    Drift("checkpoint.*", "accept", "when and where it is saved"),
    Drift("logging.*", "accept", "what is printed"),
)

FACTS = (
    Drift("content of a token file", "refuse", "by digest; hashed again if its date changed"),
    Drift("weights of data.train", "refuse", "which sample comes when"),
    Drift("tokenizer of the token files", "refuse", "meaning of the token ids"),
    Drift("date of a token file without description", "warn", "nothing to compare its bytes with"),
    Drift("torch", "warn", "kernels"),
    Drift("CUDA", "warn", "kernels"),
    Drift("device", "warn", "kernels"),
    Drift("CPU instructions", "warn", "kernels"),
    Drift("threads", "warn", "order of sums"),
    Drift("processes", "warn", "order of sums"),
    Drift("layout", "warn", "order of sums"),
    Drift("precision", "warn", "rounding"),
    Drift("attention", "warn", "rounding"),
    Drift("compiled", "warn", "rounding"),
    Drift("an item of the state that is missing", "refuse", "it would silently start anew"),
    Drift("an item of the state that contradicts another", "refuse", "one of them was reset"),
)


def rule_of(key: str) -> Drift:
    """The row of a recipe key: the first that fits."""
    return next(rule for rule in RECIPE_KEYS if fnmatch.fnmatchcase(key, rule.what))


def resolved(recipe: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A recipe's values by dotted key, with those filled in that follow from others."""
    values = {f"{s}.{key}": value for s, keys in recipe.items() for key, value in keys.items()}
    steps, batch = values["train.steps"], values["train.global_batch_size"]
    values["data.planned_samples"] = values["data.planned_samples"] or steps * batch
    values["schedule.decay_steps"] = values["schedule.decay_steps"] or steps
    values["model.intermediate_size"] = (
        values["model.intermediate_size"] or 4 * values["model.hidden_size"]
    )
    return values


def recipe_drift(
    before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]], action: Action
) -> dict[str, tuple[Any, Any]]:
    """The keys that differ between two recipes and that an action is for, with both values.

    A key that the older recipe does not have was added to megaphi since, and is passed over.
    """
    old, new = resolved(before), resolved(now)
    return {
        key: (old[key], value)
        for key, value in new.items()
        if key in old and old[key] != value and rule_of(key).action == action
    }
