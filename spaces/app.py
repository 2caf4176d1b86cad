"""The Space: settings → engine → page. What each of them does is in ``translator/``."""

from __future__ import annotations

from translator import start

if __name__ == "__main__":
    start.run(start.app())
