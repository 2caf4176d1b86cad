"""Everything that needs a GPU, in one go: build, test, measure (``nox -s gpu``).

    PYTHONPATH=.:spaces python benchmarks/on_gpu.py [--runs 5] [--skip-upstream] [--out DIR]

Builds this machine's own architecture and upstream's release list from the pinned source with the
local engine, runs ``tests/gpu`` and ``cold_start.py``. What was built from the same source and
recipe stays, so that it can be called again. The figures are taken also where a test fails; the
exit status is 1 then.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from farm import release
from farm.errors import FarmError
from farm.inputs import packages, patches, pins
from farm.pack import read_inventory
from farm.tarball import build_record
from llama_loader import host, settings

UPSTREAM_ARCHS: Final = "75-virtual;80-virtual;86-real;89-real;90-virtual;120a-real;121a-real"
"""What llama.cpp's own CUDA releases are built for (ggml/src/ggml-cuda/CMakeLists.txt)."""
LINE: Final = "cu130"
FIRST_ARCH_SPECIFIC: Final = 120
"""From here on ggml's own CMake file turns an architecture into its ``a`` form."""


def single_arch() -> str:
    """Return this machine's GPU in the words of CMAKE_CUDA_ARCHITECTURES."""
    capabilities = host.detect(settings.load()).capabilities
    if not capabilities:
        raise SystemExit("error[NO_GPU]: no NVIDIA GPU here\nhint: nvidia-smi must list one")
    number = capabilities[0]
    return f"{number}a-real" if int(number) >= FIRST_ARCH_SPECIFIC else f"{number}-real"


def is_built(folder: Path, archs: str) -> bool:
    """Whether a release folder holds these architectures, of the pinned source and recipe."""
    if not (folder / release.MANIFEST).exists():
        return False
    (artifact,) = release.load(folder).artifacts
    record = build_record.decode(
        read_inventory(folder / artifact.name).build_json, what=artifact.name
    )
    pinned = pins.load().source.sha256
    built = (record.source.sha256, record.recipe_sha256, record.line.name, record.archs)
    return built == (pinned, patches.recipe_sha256(), LINE, archs)


def build(folder: Path, archs: str, *options: str) -> None:
    """Build into a folder, unless that is done already.

    Raises:
        FarmError: what lies there cannot be read.
        SystemExit: the build failed.
    """
    if is_built(folder, archs):
        return
    command = ["build-cuda", "--engine", "local", "--line", LINE, "--out", str(folder)]
    command += ["--archs", archs]
    if _python("-m", "invoke", *command, *options):
        raise SystemExit(1)


def llama_bench(folder: Path) -> tuple[str, ...]:
    """Return the option that names the tool which was built beside a folder's release."""
    (artifact,) = release.load(folder).artifacts
    line, arch_set = artifact.name.split("-")[3:5]
    tool = Path(".farm/trees", f"{line}-{arch_set}", "bin", "llama-bench")
    return ("--llama-bench", str(tool)) if tool.exists() else ()


def main() -> int:
    """Do all of it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--skip-upstream", action="store_true", help="half an hour of 16 cores")
    parser.add_argument("--also", nargs="*", default=[], help="further models for tokens/s")
    parser.add_argument("--out", type=Path, default=Path("dist/gpu"))
    options = parser.parse_args()
    single, upstream = options.out / "single", options.out / "upstream"
    try:
        build(single, single_arch(), "--also", "llama-bench")
        if not options.skip_upstream:
            build(upstream, UPSTREAM_ARCHS, "--format", "tar.gz")
        model = str(packages.fetch_model(pins.load().model("smollm2")))
    except FarmError as error:
        raise SystemExit(error.render()) from error
    failed = _python(
        *("-m", "pytest", "tests/gpu"),
        FARM_GPU_RELEASE=str(single),
        FARM_GPU_MODEL=model,
    )
    measured = _python(
        *("benchmarks/cold_start.py", "--release", str(single), "--model", model),
        *(() if options.skip_upstream else ("--upstream", str(upstream))),
        *llama_bench(single),
        *(("--also", *options.also) if options.also else ()),
        *("--runs", str(options.runs), "--out", str(options.out / "cold_start.json")),
    )
    return 1 if failed or measured else 0


def _python(*arguments: str, **variables: str) -> int:
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **variables}, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
