"""What the loader refuses."""

import numpy as np
import pytest

from megaphi.data.loader import read_samples
from megaphi.errors import RunError


@pytest.mark.parametrize("token", [-1, 512, 513])
def test_an_id_outside_of_the_vocabulary_is_named(token: int) -> None:
    samples = np.arange(512).reshape(8, 64)
    assert np.array_equal(read_samples(samples, 2, 6, 512), samples[2:])
    samples[5, 3] = token
    assert np.array_equal(read_samples(samples, 0, 5, 512), samples[:5])
    with pytest.raises(RunError, match=rf"samples 4 to 5 .* {token}\b.* 512"):
        read_samples(samples, 4, 2, 512)
