"""A small gradio app on the real engine, with an API alone: ``ask`` streams, ``state`` tells.

Runs under ``zerogpu.Emulator``, with the real ``spaces`` package, as a Space would.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import gradio as gr

from llama_space import Engine

engine = Engine()


def ask(text: str, max_tokens: float) -> Iterator[str]:
    """Stream the items of an answer, each as JSON with its kind."""
    for item in engine.events([{"role": "user", "content": text}], max_tokens=int(max_tokens)):
        yield json.dumps({"kind": type(item).__name__, **asdict(item)})


def state() -> dict[str, Any]:
    """Tell the engine's status."""
    return asdict(engine.status())


def main() -> None:
    """Serve on the port that is named."""
    with gr.Blocks(analytics_enabled=False) as demo:
        gr.api(ask, api_name="ask")
        gr.api(state, api_name="state", queue=False)
    demo.queue(default_concurrency_limit=4, max_size=20)
    demo.launch(server_name="127.0.0.1", server_port=int(sys.argv[1]), quiet=True)


if __name__ == "__main__":
    main()
