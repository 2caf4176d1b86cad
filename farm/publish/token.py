"""Tokens of GitHub and of the Hub: read from the environment, checked, never quoted.

A token that is no header's value would otherwise be refused by a client library, in a message that
has the token in it.
"""

from __future__ import annotations

import os
import re
from typing import Final

from farm.errors import UsageError

_TOKEN: Final = re.compile(r"[!-~]+")
"""Visible ASCII, without spaces: what may stand behind ``Bearer``."""


def read(variable: str) -> str | None:
    """Return the token in a variable, without the line break of a file; None where it is unset.

    Raises:
        UsageError: ``TOKEN_INVALID``: it cannot be one. What it is, is not said.
    """
    token = os.environ.get(variable, "").strip()
    if token and not _TOKEN.fullmatch(token):
        raise UsageError(
            "TOKEN_INVALID",
            f"{variable} holds spaces, line breaks or letters that no token has",
            hint="set it again; it is not shown here, because logs are read by others",
        )
    return token or None
