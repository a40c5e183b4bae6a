"""Which samples a recipe trains and evaluates on, and whether its token files fit it."""

from pathlib import Path

from megaphi.config import Recipe
from megaphi.data.blend import build_dataset, parse_blend
from megaphi.data.loader import Dataset
from megaphi.data.sidecar import TokenFileInfo, verify_info


def train_dataset(recipe: Recipe, number: int) -> Dataset:
    """The training samples of pass `number`, in Megatron's order for train.seed + number."""
    return build_dataset(
        recipe.data.train,
        split=recipe.data.split,
        which="train",
        num_samples=recipe.planned_samples,
        sequence_length=recipe.data.sequence_length,
        seed=recipe.train.seed + number,
    )


def validation_dataset(recipe: Recipe) -> Dataset | None:
    """The held-out samples, one epoch; None where the recipe names none."""
    if recipe.data.validation is None and recipe.data.split is None:
        return None
    value = recipe.data.validation or recipe.data.train
    weighted = any(weight is not None for weight, _ in parse_blend(value))
    wanted = recipe.train.evaluation_batches * recipe.train.global_batch_size
    return build_dataset(
        value,
        split=recipe.data.split,
        which="valid",
        # one epoch at most, so that no sample counts twice; a weighted blend needs a size
        num_samples=wanted if weighted else None,
        sequence_length=recipe.data.sequence_length,
        seed=recipe.train.seed,
    )


def token_file_prefixes(recipe: Recipe) -> list[str]:
    """Every token file that the recipe names, training first."""
    values = [recipe.data.train]
    if recipe.data.validation is not None:
        values.append(recipe.data.validation)
    return [prefix for value in values for _, prefix in parse_blend(value)]


def check_token_files(recipe: Recipe) -> dict[str, TokenFileInfo]:
    """Compare what stands alongside the token files with the model and with each other.

    Returns:
        The sidecar of each prefix that has one (files written by Megatron have none).

    Raises:
        ValueError: a vocabulary does not fit the model, or the tokenizers differ.
        TokenFileError: a file is not the one that its sidecar describes, by size.
    """
    infos: dict[str, TokenFileInfo] = {}
    for prefix in token_file_prefixes(recipe):
        info = verify_info(Path(prefix), deep=False)
        if info is None:
            continue
        if info.vocab_size > recipe.model.vocab_size:
            raise ValueError(
                f"{prefix}: its tokenizer {info.tokenizer} has {info.vocab_size} ids, "
                f"model.vocab_size is {recipe.model.vocab_size}; set model.vocab_size to at "
                f"least {info.vocab_size}"
            )
        for other, known in infos.items():
            if known.tokenizer_sha256 != info.tokenizer_sha256:
                raise ValueError(
                    f"{prefix} and {other} were made with different tokenizers "
                    f"({info.tokenizer}, {known.tokenizer}); tokenize them alike"
                )
        infos[prefix] = info
    return infos


def end_of_document(recipe: Recipe, infos: dict[str, TokenFileInfo]) -> int | None:
    """Id that ends a document in every token file; None where data.mask_documents is off.

    Args:
        recipe: the recipe.
        infos: what `check_token_files` found alongside its token files.

    Raises:
        ValueError: a token file does not say which id it is, or they differ.
    """
    if not recipe.data.mask_documents:
        return None
    prefixes = token_file_prefixes(recipe)
    for prefix in prefixes:
        if prefix not in infos:
            raise ValueError(
                f"data.mask_documents: {prefix}.json is missing, which says what token ends a "
                "document; tokenize the data with megaphi, or set data.mask_documents to false"
            )
    eod_id = infos[prefixes[0]].eod_id
    for prefix in prefixes:
        if infos[prefix].eod_id != eod_id:
            raise ValueError(
                f"data.mask_documents: documents end with token {infos[prefix].eod_id} in "
                f"{prefix}, but with {eod_id} in {prefixes[0]}; tokenize them alike"
            )
    return eod_id
