"""The Space: settings → engine → page. What each of them does is in ``translator/``."""

from __future__ import annotations

from translator import page

if __name__ == "__main__":
    page.run(page.app())
