"""Where a model comes from, as far as its directory and the token files alongside it can say."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaphi.data.blend import parse_blend
from megaphi.data.indexed import TokenFileError
from megaphi.data.sidecar import read_info
from megaphi.durable import file_sha256
from megaphi.formats.files import read_json_object
from megaphi.formats.manifest import MANIFEST_NAME, CheckpointError, read_manifest

_MAX_RECIPE_BYTES = 1 << 20


@dataclass(frozen=True)
class TokenFile:
    """A token file that the recipe names."""

    name: str
    """The last part of its path; the rest is of one machine only."""
    tokens: int | None = None
    """Tokens in it, where its description was found."""
    sha256: str | None = None
    """SHA-256 of its `.bin`, where its description was found."""
    tokenizer: str | None = None
    """Name of the tokenizer, where its description was found."""


@dataclass(frozen=True)
class Provenance:
    """What is recorded about a model; None and empty where nothing is."""

    name: str
    """Name of the run, or of the directory."""
    checkpoint: str
    """Name of the directory."""
    identity: str | None = None
    """SHA-256 of the checkpoint's manifest.json, which `megaphi evaluate` records with scores."""
    step: int | None = None
    """Optimizer step."""
    samples: int | None = None
    """Training samples seen."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Sections of the recipe."""
    recipe_sha256: str | None = None
    """SHA-256 of the recipe, config.yaml."""

    @property
    def tokens(self) -> int | None:
        """Training tokens seen, repetitions included."""
        length = self.section("data").get("sequence_length")
        if self.samples is None or type(length) is not int:
            return None
        return self.samples * length

    def section(self, name: str) -> dict[str, Any]:
        """A section of the recipe; empty if it is not there."""
        values = self.recipe.get(name)
        return values if isinstance(values, dict) else {}


def read_provenance(directory: Path) -> Provenance:
    """Collect what a checkpoint (or a Hugging Face directory, which has little) says of itself.

    Raises:
        CheckpointError: a file of it is not what it should be.
    """
    resolved = directory.resolve()
    own = resolved.parent.name if resolved.name.startswith("step-") else resolved.name
    if not (directory / MANIFEST_NAME).exists():
        return Provenance(name=own, checkpoint=resolved.name)
    manifest = read_manifest(directory)
    recipe = _read_recipe(directory / "config.yaml")
    trainer = _read_trainer(directory / "trainer.json")
    step = manifest.get("step", trainer.get("step"))
    return Provenance(
        name=own,
        checkpoint=resolved.name,
        identity=file_sha256(directory / MANIFEST_NAME),
        step=step if type(step) is int else None,
        samples=trainer.get("consumed_samples"),
        recipe=recipe,
        recipe_sha256=manifest["files"].get("config.yaml", {}).get("sha256"),
    )


def _read_trainer(path: Path) -> dict[str, int]:
    """The counters of trainer.json; empty for weights without a trainer."""
    if not path.is_file():
        return {}
    try:
        values = read_json_object(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return {key: value for key, value in values.items() if type(value) is int}


def _read_recipe(path: Path) -> dict[str, Any]:
    """The recipe as plain values; empty for weights without one."""
    import yaml

    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_RECIPE_BYTES:
        raise CheckpointError(f"{path}: too large for a recipe")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        raise CheckpointError(f"{path}: not readable as YAML") from None
    return recipe if isinstance(recipe, dict) else {}


def training_data(provenance: Provenance) -> list[TokenFile]:
    """The token files that a recipe names, with their descriptions where this machine has them."""
    train = provenance.section("data").get("train")
    if not isinstance(train, str | list):
        return []
    try:
        prefixes = [prefix for _, prefix in parse_blend(train)]
    except ValueError as error:
        raise CheckpointError(
            f"{provenance.checkpoint}/config.yaml: data.train: {error}"
        ) from error
    found = []
    for prefix in prefixes:
        try:
            info = read_info(prefix)
        except TokenFileError:  # another file of that name: nothing is known of ours
            info = None
        name = Path(prefix).name
        if info is None:
            found.append(TokenFile(name))
        else:
            found.append(TokenFile(name, info.num_tokens, info.bin_sha256, info.tokenizer))
    return found
