"""A refusal of the farm: the code that an error must have."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from farm.errors import FarmError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def refused(
    code: str, kind: type[FarmError] = FarmError, match: str | None = None
) -> Iterator[pytest.ExceptionInfo[FarmError]]:
    """Expect an error of this code and kind, whose message matches."""
    with pytest.raises(kind, match=match) as caught:
        yield caught
    assert caught.value.code == code
