"""The token files of a run, checked before anything large is built."""

from megaphi.checkpoint.resume import data_order, token_file_dates
from megaphi.config import Recipe
from megaphi.data.loader import Dataset
from megaphi.data.samples import (
    check_token_files,
    end_of_document,
    token_file_prefixes,
    train_dataset,
)


class TrainingData:
    """The training samples of a run, and what identifies them.

    Raises:
        ValueError: the token files do not fit the recipe or each other.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.prefixes = token_file_prefixes(recipe)
        """The token files, those of training first."""
        self.infos = check_token_files(recipe)
        """What describes each token file that megaphi has written."""
        self.eod_id = end_of_document(recipe, self.infos)
        """The token that ends a document, where attention stays inside of one."""
        self._recipe = recipe
        self._first_pass = train_dataset(recipe, 0)
        self.order = data_order(recipe, self.infos)
        """All that determines which sample comes when, for checkpoints."""
        self.dates = token_file_dates(recipe)
        """When each token file was last written to, in nanoseconds."""

    def of_pass(self, number: int) -> Dataset:
        """The samples of pass `number` over the plan; each pass has an order of its own."""
        return self._first_pass if number == 0 else train_dataset(self._recipe, number)
