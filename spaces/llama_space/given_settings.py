"""Reads the settings with keywords that win over the environment."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from llama_loader import settings
from llama_loader.errors import SettingError

if TYPE_CHECKING:
    from llama_loader.settings import Settings


def load(**given: Any) -> Settings:
    """Return the settings; a keyword is a variable's name without its prefix, in lower case.

    Raises:
        SettingError: an unknown keyword, or a value that cannot be parsed.
    """
    names = {
        (row.variable.removeprefix(settings.PREFIX).lower() or field): field
        for field, row in settings._FIELDS.items()  # noqa: SLF001 - until settings.load takes keywords
    }
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, 3, 0.5)
            raise SettingError(
                "SETTING_UNKNOWN",
                f"there is no setting {name!r}; near ones: {', '.join(near) or 'none'}",
                hint="see docs/settings.md for all of them",
            )
    options = {names[name]: _text(value) for name, value in given.items() if value is not None}
    return settings.load(options)


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
