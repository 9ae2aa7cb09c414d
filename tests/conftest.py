"""Fixtures of the whole suite."""

from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    """Two ranks that stay for all tests of a file."""
    with Ranks(2) as ranks:
        yield ranks
