"""The digits are those that scikit-learn loads."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from sglight.compat import sklearn


@pytest.fixture(params=["from the file", "if there is no such file"])
def found(request, monkeypatch):
    if request.param != "from the file":
        monkeypatch.setattr(sklearn, "DIGITS", "elsewhere")
    return sklearn.digits()


def test_the_digits_are_those_that_scikit_learn_loads(found):
    images, labels = found
    expected = load_digits()
    assert images.dtype == np.uint8 and labels.dtype == np.int64
    assert np.array_equal(images, expected.images)
    assert np.array_equal(labels, expected.target)
