"""What is known of one GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU. ``capability`` has no dot (``90``); None for unknown.

    ``memory`` and ``free``, what nobody used of it when the driver was asked, are in bytes.
    """

    name: str
    capability: str | None
    memory: int | None = None
    uuid: str | None = None
    free: int | None = None
