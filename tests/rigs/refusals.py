"""A refusal by the loader or the farm: the code that an error must have."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def refused(
    code: str,
    kind: type[Exception] = Exception,
    match: str | None = None,
    *,
    hint: str = "",
    status: int | None = None,
) -> Iterator[pytest.ExceptionInfo[Any]]:
    """Expect an error of this code and kind, whose message matches and whose hint has this."""
    with pytest.raises(kind, match=match) as caught:
        yield caught
    assert getattr(caught.value, "code", None) == code, repr(caught.value)
    assert hint in getattr(caught.value, "hint", "")
    assert status in {None, getattr(caught.value, "exit_status", None)}
