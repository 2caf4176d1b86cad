"""A refusal of the farm: the code that an error must have."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from farm.errors import FarmError


@contextmanager
def refused(
    code: str, kind: type[FarmError] = FarmError, match: str | None = None
) -> Iterator[pytest.ExceptionInfo[FarmError]]:
    """Expect an error of this code and kind, whose message matches."""
    with pytest.raises(kind, match=match) as caught:
        yield caught
    assert caught.value.code == code
