"""The engine of a Space: one prepared, supervised ``llama-server`` for a GGUF model.

``from llama_space import Engine`` loads neither gradio nor torch. The engine works on ZeroGPU, on a
machine with a GPU of its own, and on a CPU; it has no page.
"""

from llama_loader.errors import LoaderError
from llama_space.engine import Engine
from llama_space.values import Address, Failure, Figures, Piece, Progress, Status

__all__ = ["Address", "Engine", "Failure", "Figures", "LoaderError", "Piece", "Progress", "Status"]
