"""What the gate measures on a GPU, and when that is worse than before.

The two speeds are those that ``llama-bench`` reports first, ``pp512`` and ``tg128``, measured by
the server's own count through its API: what is released is the server, and not the benchmark.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta

from farm import loader, release
from farm.errors import FarmError

if TYPE_CHECKING:
    from collections.abc import Iterable

TOLERANCE: Final = 0.05
"""How much worse than the last release's a figure may be."""
_LEAST: Final = 1 - TOLERANCE
_ROUNDS: Final = 5
_PROMPT_TOKENS: Final = 512
_TOKENS: Final = 128
_FIRST_TOKEN: Final = 1000
"""Any id that every model has; the prompt is not text, so that its length is known."""

Seconds = Annotated[float, Meta(gt=0)]
Speed = Annotated[float, Meta(gt=0)]


class Figures(msgspec.Struct, frozen=True):
    """Medians of what was measured.

    Attributes:
        gpu: its name.
        first_token: seconds from the loader's start to the first token, the release installed and
            the driver's cache of compiled code empty.
        prompt_tokens_per_second: of a prompt of 512 tokens.
        tokens_per_second: of an answer of 128 tokens.
    """

    gpu: str
    first_token: Seconds
    prompt_tokens_per_second: Speed
    tokens_per_second: Speed

    def __str__(self) -> str:
        """Return one line for people."""
        return (
            f"{self.first_token:.2f} s to the first token,"
            f" {self.prompt_tokens_per_second:.0f} tokens/s read,"
            f" {self.tokens_per_second:.0f} tokens/s written"
        )


def worse(now: Figures, last: Figures) -> tuple[str, ...]:
    """Name the figures that are worse than the last by more than the tolerance. Pure."""
    pairs = {
        "first token": (now.first_token, last.first_token * (1 + TOLERANCE)),
        "tokens read": (-now.prompt_tokens_per_second, -last.prompt_tokens_per_second * _LEAST),
        "tokens written": (-now.tokens_per_second, -last.tokens_per_second * _LEAST),
    }
    return tuple(name for name, (found, limit) in pairs.items() if found > limit)


def best(one: Figures, other: Figures) -> Figures:
    """Return the better of each figure: noise only makes them worse. Pure."""
    return Figures(
        one.gpu,
        min(one.first_token, other.first_token),
        max(one.prompt_tokens_per_second, other.prompt_tokens_per_second),
        max(one.tokens_per_second, other.tokens_per_second),
    )


def last_on(gpu: str, earlier: Iterable[Figures]) -> Figures | None:
    """Return the newest figures of the same GPU; others say nothing about this one. Pure."""
    return next((one for one in earlier if one.gpu == gpu), None)


def gpu() -> str | None:
    """Return the first GPU's name, as the loader sees it; None where it sees none.

    Raises:
        FarmError: ``LOADER_FAILED``: it could not say.
    """
    done = loader.run("doctor", "--json", "--offline")
    try:
        gpus = msgspec.json.decode(done.stdout.encode())["host"]["gpus"]
        return str(gpus[0]["name"]) if gpus else None
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        said = done.stderr.strip() or "said nothing of the host"
        raise FarmError("LOADER_FAILED", f"llama_loader doctor: {said}") from error


def measure(folder: Path, model: Path, gpu: str, *, rounds: int = _ROUNDS) -> Figures:
    """Start the release that fits this machine several times, installed before, and let it work.

    Args:
        folder: the release.
        model: a GGUF file.
        gpu: what the figures are said to be of.
        rounds: how often; an odd number has a middle.

    Raises:
        FarmError: it does not start.
    """
    prompt = [_FIRST_TOKEN + number for number in range(_PROMPT_TOKENS)]
    seconds, read, written = [], [], []
    with tempfile.TemporaryDirectory(prefix="llama-farm-gate-") as place:
        manifest = folder.resolve() / release.MANIFEST
        pin = hashlib.sha256(manifest.read_bytes()).hexdigest()
        store = str(Path(place) / "store")
        options = ("--manifest", manifest.as_uri(), "--manifest-sha256", pin, "--store", store)
        loader.told("fetch", *options)
        for number in range(rounds):
            cold = {"CUDA_CACHE_PATH": str(Path(place) / f"compiled-{number}")}
            with loader.serving(*options, "--model", str(model), variables=cold) as served:
                seconds.append(sum(stage["seconds"] for stage in served["timeline"]))
                timings = loader.complete(served, prompt, _TOKENS)["timings"]
            read.append(float(timings["prompt_per_second"]))
            written.append(float(timings["predicted_per_second"]))
    return Figures(
        gpu, statistics.median(seconds), statistics.median(read), statistics.median(written)
    )
