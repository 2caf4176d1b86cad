"""A Python that has the loader's modules, and runs a command of it when a line comes on stdin.

    PYTHONPATH=.:spaces python benchmarks/running_python.py serve --manifest …

That is what a Space's process is when somebody asks for a translation: ``cold_start.py`` measures
it beside a loader whose Python starts first.
"""

import sys
from typing import Final

from llama_loader import (
    __main__,
    client,
    loader,
    model,
    report,
    self_test,
    server,
    server_plan,
    trust,
)

IMPORTED: Final = (client, loader, model, report, server, self_test, trust, server_plan)
"""What ``serve`` imports on its way."""
READY: Final = "imported"


def main() -> int:
    """Say that all is imported, wait for a line, run the command; returns its status."""
    print(READY, len(IMPORTED), flush=True)
    sys.stdin.readline()
    return __main__.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
