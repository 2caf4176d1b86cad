"""Write a model of TranslateGemma's size out of noise, to measure speed where none is at hand.

    PYTHONPATH=.:spaces python benchmarks/noise_model.py OUT.gguf [--size 4b|27b]

The arithmetic of a token does not depend on what the weights are, so tokens per second of this
file are those of a real llama of its shape: layers, width, feed-forward part and vocabulary of
TranslateGemma 4B or 27B, Q4_K and Q6_K as in a Q4_K_M file. Its answers mean nothing, and all its
layers are the same one.
"""

import argparse
from pathlib import Path
from typing import Final

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from tests.rigs import tiny_model
from tests.rigs.tiny_model import Shape

HEAD: Final = 128
SIZES: Final = {
    # rows are whole blocks of 256, and as many heads as fill the width: close to the original
    "4b": Shape(34, 2560, 10240, HEAD, heads=20, key_heads=4, context=131_072),
    "27b": Shape(62, 5376, 21504, HEAD, heads=42, key_heads=14, context=131_072),
}
VOCABULARY: Final = 262_144
"""Tokens that Gemma 3 knows: sampling looks at each of them."""
_BLOCK: Final = 256
_SMALL: Final = np.float16(2**-11)
_KINDS: Final[dict[GGMLQuantizationType, tuple[int, dict[int, np.float16]]]] = {
    GGMLQuantizationType.Q4_K: (144, {0: _SMALL, 2: np.float16(7.5 * 2**-11)}),
    GGMLQuantizationType.Q6_K: (210, {208: _SMALL}),
}
"""Bytes of a block, and its scale and offset by their place in it."""


def quantised(
    noise: np.random.Generator, kind: GGMLQuantizationType, rows: int, width: int
) -> np.ndarray:
    """Return ``rows`` rows of blocks: a small scale and offset, everything else noise."""
    size, scales = _KINDS[kind]
    blocks = noise.integers(0, 256, (rows * width // _BLOCK, size), np.uint8)
    for place, scale in scales.items():
        blocks[:, place : place + 2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def write(path: Path, size: str) -> None:
    """Write the model, layer by layer."""
    shape = SIZES[size]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"noise of the size of TranslateGemma {size.upper()}")
    tiny_model.add_shape(writer, shape)
    # bytes: a text with a letter that is no token is refused without them
    known = [*tiny_model.vocabulary(), *(f"<0x{byte:02X}>" for byte in range(256))]
    unused = [f"<unused{number}>" for number in range(VOCABULARY - len(known))]
    tiny_model.add_tokenizer(writer, [*known, *unused])
    noise = np.random.default_rng(1)
    made: dict[tuple[int, int, GGMLQuantizationType], np.ndarray] = {}
    for name, (rows, width, kind) in _tensors(shape).items():
        if (rows, width, kind) not in made:
            made[rows, width, kind] = quantised(noise, kind, rows, width)
        writer.add_tensor(name, made[rows, width, kind], raw_dtype=kind)
    norm = np.ones(shape.width, np.float32)
    for layer in range(shape.layers):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", norm)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", norm)
    writer.add_tensor("output_norm.weight", norm)
    tiny_model.finish(writer)


def _tensors(shape: Shape) -> dict[str, tuple[int, int, GGMLQuantizationType]]:
    """Return rows, width and kind of every quantised tensor, as Q4_K_M mixes them."""
    q4, q6 = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K
    width, keys = shape.width, shape.key_heads * shape.head
    found = {"token_embd.weight": (VOCABULARY, width, q4), "output.weight": (VOCABULARY, width, q6)}
    for layer in range(shape.layers):
        better = q6 if layer % 2 == 0 else q4
        found |= {
            f"blk.{layer}.attn_q.weight": (width, width, q4),
            f"blk.{layer}.attn_k.weight": (keys, width, q4),
            f"blk.{layer}.attn_v.weight": (keys, width, better),
            f"blk.{layer}.attn_output.weight": (width, width, q4),
            f"blk.{layer}.ffn_gate.weight": (shape.feed_forward, width, q4),
            f"blk.{layer}.ffn_up.weight": (shape.feed_forward, width, q4),
            f"blk.{layer}.ffn_down.weight": (width, shape.feed_forward, better),
        }
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="27b")
    given = parser.parse_args()
    write(given.out, given.size)
