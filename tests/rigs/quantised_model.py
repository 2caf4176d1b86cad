"""A small llama whose matrices are all of one kind that ggml can store, in one file or in several.

Its weights are noise: only that they arrive as they are in the file can be told from its answers.
The matrices of the feed-forward part are larger than what is uploaded in one piece, and no whole
number of pieces.
"""

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from tests.rigs import tiny_model
from tests.rigs.tiny_model import Shape

SHAPE = Shape(
    layers=2, width=256, feed_forward=31 * 256, head=64, heads=4, key_heads=2, context=512
)
KINDS = tuple(
    kind
    for kind in Kind
    if kind not in {Kind.Q8_1, Kind.Q8_K, Kind.I8, Kind.I16, Kind.I32, Kind.I64, Kind.F64}
)
"""What a model's weights can be stored as; the others hold activations or plain numbers."""
_FLOATS = {Kind.F32: np.dtype(np.float32), Kind.F16: np.dtype(np.float16)}
_SMALL = 0x24
"""A half-precision scale whose high byte is below this is under 2^-6: no sum becomes infinite."""


def matrix(noise: np.random.Generator, rows: int, width: int, kind: Kind) -> np.ndarray:
    """Return the bytes of a matrix, or its floats where numpy has their kind."""
    if kind in _FLOATS:
        return noise.normal(0, 0.05, (rows, width)).astype(_FLOATS[kind])
    if kind == Kind.BF16:
        wide = noise.normal(0, 0.05, (rows, width)).astype(np.float32)
        return (wide.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = noise.integers(0, _SMALL, (rows * width // weights, size), np.uint8)
    if kind == Kind.MXFP4:
        blocks[:, 0] = noise.integers(118, 124, len(blocks), np.uint8)  # its scale: 2^(x - 127)
    return blocks.reshape(rows, -1)


def write(path: Path, kind: Kind, *, files: int = 1) -> Path:
    """Write the model; returns its first file, which llama.cpp is given."""
    width, keys, inner = SHAPE.width, SHAPE.key_heads * SHAPE.head, SHAPE.feed_forward
    shapes = {"token_embd.weight": (tiny_model.VOCABULARY, width), "output.weight": (64, width)}
    for layer in range(SHAPE.layers):
        shapes |= {
            f"blk.{layer}.attn_q.weight": (width, width),
            f"blk.{layer}.attn_k.weight": (keys, width),
            f"blk.{layer}.attn_v.weight": (keys, width),
            f"blk.{layer}.attn_output.weight": (width, width),
            f"blk.{layer}.ffn_gate.weight": (inner, width),
            f"blk.{layer}.ffn_up.weight": (inner, width),
            f"blk.{layer}.ffn_down.weight": (width, inner),
        }
    norms = [f"blk.{n}.{part}_norm.weight" for n in range(SHAPE.layers) for part in ("attn", "ffn")]
    each = -(-(len(shapes) + len(norms) + 1) // files)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=each if files > 1 else 0)
    tiny_model.add_shape(writer, SHAPE)
    tiny_model.add_tokenizer(writer, tiny_model.vocabulary())
    noise = np.random.default_rng(kind)
    for name, (rows, columns) in shapes.items():
        stored = Kind.F32 if name == "output.weight" else kind  # so that no token is certain
        writer.add_tensor(name, matrix(noise, rows, columns, stored), raw_dtype=stored)
    for name in (*norms, "output_norm.weight"):
        writer.add_tensor(name, np.ones(width, np.float32))
    tiny_model.finish(writer)
    return path if files == 1 else path.with_name(f"{path.stem}-00001-of-{files:05}.gguf")
