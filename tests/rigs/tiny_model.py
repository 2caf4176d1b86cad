"""Writes the tiny model of the loader's test run: ``python -m tests.rigs.tiny_model OUT.gguf``.

It is a real llama: one layer, four heads of 64 that share one key/value head, rows of 256 weights
in the quantisations of a Q4_K_M file (Q4_K and Q6_K), so that the kernels of a user's model run.
The weights are noise from a fixed seed, written as quantised blocks directly: no floating point
is in between, so that every machine and every version of numpy gives the same bytes.

The seed was chosen among 1,300 so that the answer to the prompt of ``llama_loader.self_test`` is
``!`` by a clear margin, and another one without the attention, without the positions or without
the feed-forward half: a library that computes wrongly is noticed, one that rounds in another way
is not. ``tests/loader/test_self_test.py`` measures that margin with a real server.
"""

import hashlib
import string
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import gguf
import numpy as np

SEED: Final = 1292
ANSWER: Final = "!"
ANSWER_ID: Final = 60
"""Where the answer stands in the vocabulary: the token that this seed's weights prefer."""

WIDTH: Final = 256
"""Weights in a row: one block of Q4_K or Q6_K (QK_K in ggml-common.h)."""
HEAD: Final = 64
HEADS: Final = WIDTH // HEAD
KEY_HEADS: Final = 1
CONTEXT: Final = 512
VOCABULARY: Final = 64

_SPECIAL: Final = ("<unk>", "<s>", "</s>")
_LETTERS: Final = "\n\u2581" + string.ascii_lowercase + string.digits + ".,:;?'\"()[]{}<>/+-*=_#"
"""One token each. U+2581 is the tokenizer's space; llama-server asks for the token of ``\\n``."""
_Q4_K_SCALE: Final = struct.pack("<e", 2**-11)
_Q4_K_OFFSET: Final = struct.pack("<e", 7.5 * 2**-11)
"""With 7.5 times the scale as offset the 4-bit values 0 to 15 lie evenly around zero."""
_Q6_K_SCALE: Final = struct.pack("<e", 2**-12)


@dataclass(frozen=True)
class Shape:
    """How large a llama is: layers, weights in a row, tokens of context."""

    layers: int
    width: int
    feed_forward: int
    head: int
    heads: int
    key_heads: int
    context: int


class Noise:
    """Bytes from a seed, the same for ever: SHAKE-256 of the seed and the tensor's name."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def take(self, name: str, count: int) -> bytes:
        """Return ``count`` bytes for a tensor."""
        return hashlib.shake_256(f"{self._seed} {name}".encode()).digest(count)


def q4_k(noise: bytes) -> bytes:
    """Make one block of 256 weights (``block_q4_K`` in ggml-common.h) from 136 bytes.

    Its eight sub-blocks have a 6-bit scale and a 6-bit offset each, packed into twelve bytes; the
    two are the same number here, which keeps the weights around zero.
    """
    low = bytes(noise[:4])
    high = bytes((one & 15) * 17 for one in noise[4:8])
    return _Q4_K_SCALE + _Q4_K_OFFSET + low + low + high + noise[8:136]


def q6_k(noise: bytes) -> bytes:
    """Make one block of 256 weights (``block_q6_K`` in ggml-common.h) from 208 bytes."""
    scales = struct.pack("16b", *((one & 63) - 32 for one in noise[192:208]))
    return noise[:192] + scales + _Q6_K_SCALE


def quantised(noise: Noise, name: str, rows: int, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Return the bytes of ``rows`` rows of one block each."""
    make, need = (q4_k, 136) if kind == gguf.GGMLQuantizationType.Q4_K else (q6_k, 208)
    data = noise.take(name, rows * need)
    blocks = b"".join(make(data[at : at + need]) for at in range(0, len(data), need))
    return np.frombuffer(blocks, np.uint8).reshape(rows, -1)


def norm(noise: Noise, name: str) -> np.ndarray:
    """Return the weights of a norm: 0.5 to 1.5 in steps that a float holds exactly."""
    data = np.frombuffer(noise.take(name, WIDTH), np.uint8)
    return np.float32(0.5) + data.astype(np.float32) / np.float32(256)


def tensors(seed: int = SEED) -> dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]:
    """Return every tensor by name: its bytes or floats, and what they are."""
    noise = Noise(seed)
    q4, q6 = gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K
    shapes = {
        "token_embd.weight": (VOCABULARY, q4),
        "blk.0.attn_q.weight": (WIDTH, q4),
        "blk.0.attn_k.weight": (KEY_HEADS * HEAD, q4),
        "blk.0.attn_v.weight": (KEY_HEADS * HEAD, q6),
        "blk.0.attn_output.weight": (WIDTH, q4),
        "blk.0.ffn_gate.weight": (WIDTH, q4),
        "blk.0.ffn_up.weight": (WIDTH, q4),
        "blk.0.ffn_down.weight": (WIDTH, q6),
        "output.weight": (VOCABULARY, q6),
    }
    found = {
        name: (quantised(noise, name, rows, kind), kind) for name, (rows, kind) in shapes.items()
    }
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        found[name] = (norm(noise, name), gguf.GGMLQuantizationType.F32)
    return found


def vocabulary() -> list[str]:
    """Return the tokens by number; the answer stands where the weights want it."""
    tokens = [*_SPECIAL, *_LETTERS]
    tokens.insert(ANSWER_ID, ANSWER)
    return tokens


def write(path: Path) -> None:
    """Write the model."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("test run of llama_loader")
    writer.add_description(
        "noise from a fixed seed; made by farm/tiny_model.py"
    )  # where this file was then
    add_shape(
        writer,
        Shape(
            layers=1,
            width=WIDTH,
            feed_forward=WIDTH,
            head=HEAD,
            heads=HEADS,
            key_heads=KEY_HEADS,
            context=CONTEXT,
        ),
    )
    add_tokenizer(writer, vocabulary())
    for name, (data, kind) in tensors().items():
        writer.add_tensor(name, data, raw_dtype=kind)
    finish(writer)


def add_shape(writer: gguf.GGUFWriter, shape: Shape) -> None:
    """Say what size a llama is."""
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_heads)
    writer.add_rope_dimension_count(shape.head)
    writer.add_layer_norm_rms_eps(1e-5)


def add_tokenizer(writer: gguf.GGUFWriter, tokens: Sequence[str]) -> None:
    """Add a SentencePiece vocabulary whose first three are the special ones: no merges."""
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.NORMAL] * (len(tokens) - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(value=True)
    writer.add_add_space_prefix(value=False)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write everything that was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(arguments: Sequence[str]) -> int:
    """Write the file that is named; returns the exit status."""
    if len(arguments) != 1:
        sys.stderr.write("error[USAGE]: python -m tests.rigs.tiny_model OUT.gguf\n")
        return 2
    write(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
