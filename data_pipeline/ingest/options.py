"""Options of `ingest`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from data_pipeline.runner.options import Count, EngineOptions, Form, PartsOutput

PERMISSIVE = "permissive"  # the name of the shipped list
Format = Literal["auto", "stack", "code-contests", "stackoverflow"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class FilterFiles:
    """Licences and removals."""

    licenses: Annotated[str, "FILE|permissive"] | None = None
    """Keep only documents under these SPDX licences, one identifier a line; `permissive` is the
    shipped list; a document of unknown licence is rejected."""
    opt_out: Annotated[str, "FILE"] | None = None
    """Reject documents of these repositories, one OWNER/NAME or OWNER/ a line."""

    def absolute(self) -> "FilterFiles":
        """The same with absolute paths, for workers that run elsewhere."""
        shipped = self.licenses in (None, PERMISSIVE)
        return FilterFiles(
            self.licenses if shipped else str(Path(str(self.licenses)).resolve()),
            None if self.opt_out is None else str(Path(self.opt_out).resolve()),
        )


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """What the records depend on, besides the sources."""

    source: Annotated[str, "LABEL"] | None = None
    """Label of the records, instead of stack, stackoverflow, code_contests or local."""
    format: Format = "auto"
    """What the sources are; auto looks at their content."""
    text_field: Annotated[str, "FIELD"] | None = None
    """Field of the text in rows, instead of content, text or code."""
    min_bytes: Count = 1
    """Smallest document, in bytes of UTF-8."""
    max_bytes: Count = 2**20  # The Stack, too, drops files above 1 MB
    """Largest document."""
    limit: Count | None = None
    """Read only the first N documents, kept or not."""
    exclude: Annotated[Sequence[str], "NAME"] = ()
    """Leave out files and folders of this name or shell pattern; may be repeated."""
    filters: FilterFiles = FilterFiles()
    tags: Annotated[Sequence[str], "TAG[,TAG...]", Form.COMMAS] = ("python",)
    """Of Stack Exchange: questions with one of these tags."""
    min_score: Count = 1
    """Of Stack Exchange: lowest score of an answer that was not accepted."""
    max_answers: Count = 3
    """Of Stack Exchange: most answers of a question."""
    site: Annotated[str, "HOST"] = "stackoverflow.com"
    """Of Stack Exchange: host of the site that the dump is of."""
    max_solutions: Count = 3
    """Most solutions of a contest problem."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_bytes <= self.max_bytes:
            raise ValueError(
                f"`min_bytes` {self.min_bytes} `max_bytes` {self.max_bytes}: "
                "must be 0 or more, the first not above the second"
            )
        for name in ("limit", "max_answers", "max_solutions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` {value}: must be 1 or more")
        for name in ("source", "site"):
            value = getattr(self, name)
            if value is not None and (not value or not value.isprintable()):
                raise ValueError(f"`{name}` {value!r}: must be printable and not empty")
        if self.format not in FORMATS:
            raise ValueError(f"`format` {self.format}: not one of {', '.join(FORMATS)}")
        if not self.tags:
            raise ValueError("`tags`: at least one is needed")


@dataclass(frozen=True, kw_only=True)
class IngestRun:
    """Raw files and data sets -> records."""

    sources: Annotated[tuple[str, ...], "SOURCE", Form.POSITIONAL]
    """Directory of .py files (in which data files are rejected) or of data files; .py, .jsonl,
    .jsonl.zst or .parquet file; .zip, .tar, .tar.gz, .tar.xz, .tar.bz2, .tar.zst or .7z archive of
    such; Posts.xml of a Stack Exchange dump, or its .7z; directory saved by `datasets`;
    OWNER/NAME[:SPLIT] on the Hugging Face hub."""
    options: IngestOptions = IngestOptions()
    output: PartsOutput
    engine: EngineOptions = field(default_factory=EngineOptions)
