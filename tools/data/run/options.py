"""Options of `megaphi data run`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from data_pipeline.runner.options import Form, Where


@dataclass(frozen=True, kw_only=True)
class RecipeRun:
    """A recipe of stages -> a corpus: reuses what is done, continues where it was killed."""

    ALTERNATIVES: ClassVar = (("only", "from_"), ("dry_run", "estimate"))
    recipe: Annotated[Path, "RECIPE.yaml", Form.POSITIONAL]
    work: Annotated[Path, "DIR"] | None = None
    """Directory of the outputs, instead of the recipe's."""
    set: Annotated[tuple[str, ...], "STAGE.KEY=VALUE"] = ()
    """Value instead of the recipe's; variables.NAME=VALUE for a variable; may be repeated."""
    only: Annotated[str, "STAGE"] | None = None
    """Run this stage alone."""
    from_: Annotated[str, "STAGE"] | None = None
    """Run this stage and those that need it."""
    dry_run: bool = False
    """Print the commands of the stages."""
    estimate: bool = False
    """Print hours and dollars from the declared sizes."""
    json: bool = False
    """Print one JSON object."""
    engine: Where = field(default_factory=Where)
