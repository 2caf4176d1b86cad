"""A chat with any GGUF model: the whole Space."""

import gradio as gr

from llama_space import Engine

engine = Engine()  # reads the Space's variables; Engine(n_ctx=8192) sets one here


def respond(message, history):
    """Stream the model's answer to a message."""
    text = ""
    for piece in engine.chat([*history, {"role": "user", "content": message}]):
        text += piece
        yield text


# gradio lets one visitor wait on ZeroGPU unless it is told otherwise
gr.ChatInterface(respond).queue(default_concurrency_limit=3, max_size=20).launch()
