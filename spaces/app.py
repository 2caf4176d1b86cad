"""The Space: settings → engine → page. What each of them does is in ``translator/``."""

from __future__ import annotations

from translator import start

demo = start.app()

if __name__ == "__main__":
    start.run(demo)
