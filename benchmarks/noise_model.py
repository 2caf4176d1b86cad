"""Write a model of TranslateGemma 4B's size out of noise, to measure speed where none is at hand.

    PYTHONPATH=.:spaces python benchmarks/noise_model.py OUT.gguf [--layers 34]

The arithmetic of a token does not depend on what the weights are, so tokens per second of this
file are those of a real llama of its shape (34 layers of 2560, 10240 in the feed-forward, Q4_K and
Q6_K as in a Q4_K_M file, 3.4 billion of them, 2.0 GB). Its answers mean nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import gguf
import numpy as np

from farm import tiny_model

WIDTH: Final = 2560
FEED_FORWARD: Final = 10240
HEAD: Final = 128
HEADS: Final = WIDTH // HEAD
KEY_HEADS: Final = 4
VOCABULARY: Final = 32_000
CONTEXT: Final = 131_072
_BLOCK: Final = 256
_Q4_BYTES, _Q6_BYTES = 144, 210
_SMALL: Final = np.float16(2**-11).tobytes()


def q4_k(noise: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Return ``rows`` rows of Q4_K blocks: a small scale and offset, everything else noise."""
    count = rows * width // _BLOCK
    blocks = noise.integers(0, 256, (count, _Q4_BYTES), np.uint8)
    blocks[:, :2] = np.frombuffer(_SMALL, np.uint8)
    blocks[:, 2:4] = np.frombuffer(np.float16(7.5 * 2**-11).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def q6_k(noise: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Return ``rows`` rows of Q6_K blocks, whose scale is the last two bytes."""
    count = rows * width // _BLOCK
    blocks = noise.integers(0, 256, (count, _Q6_BYTES), np.uint8)
    blocks[:, -2:] = np.frombuffer(_SMALL, np.uint8)
    return blocks.reshape(rows, -1)


def write(path: Path, layers: int) -> None:
    """Write the model, layer by layer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("noise of the size of TranslateGemma 4B")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_block_count(layers)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    _add_tokenizer(writer)
    noise = np.random.default_rng(1)
    norm = np.ones(WIDTH, np.float32)
    for name, (rows, width, is_q6) in _shapes(layers).items():
        kind = gguf.GGMLQuantizationType.Q6_K if is_q6 else gguf.GGMLQuantizationType.Q4_K
        data = (q6_k if is_q6 else q4_k)(noise, rows, width)
        writer.add_tensor(name, data, raw_dtype=kind)
    for layer in range(layers):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", norm)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", norm)
    writer.add_tensor("output_norm.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shapes(layers: int) -> dict[str, tuple[int, int, bool]]:
    """Return rows, width and whether Q6_K for every quantised tensor, as Q4_K_M mixes them."""
    found = {
        "token_embd.weight": (VOCABULARY, WIDTH, False),
        "output.weight": (VOCABULARY, WIDTH, True),
    }
    for layer in range(layers):
        more = layer % 2 == 0
        found |= {
            f"blk.{layer}.attn_q.weight": (WIDTH, WIDTH, False),
            f"blk.{layer}.attn_k.weight": (KEY_HEADS * HEAD, WIDTH, False),
            f"blk.{layer}.attn_v.weight": (KEY_HEADS * HEAD, WIDTH, more),
            f"blk.{layer}.attn_output.weight": (WIDTH, WIDTH, False),
            f"blk.{layer}.ffn_gate.weight": (FEED_FORWARD, WIDTH, False),
            f"blk.{layer}.ffn_up.weight": (FEED_FORWARD, WIDTH, False),
            f"blk.{layer}.ffn_down.weight": (WIDTH, FEED_FORWARD, more),
        }
    return found


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    known = tiny_model.vocabulary()
    tokens = [*known, *(f"<unused{number}>" for number in range(VOCABULARY - len(known)))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.NORMAL] * (VOCABULARY - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(value=True)
    writer.add_add_space_prefix(value=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=34)
    given = parser.parse_args()
    write(given.out, given.layers)
