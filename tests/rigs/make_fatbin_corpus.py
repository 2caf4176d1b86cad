"""Makes tests/data/fatbin: what nvcc really writes, and what cuobjdump says that it is.

    python tests/rigs/make_fatbin_corpus.py --cuda DIR [--out DIR] [--without-modes]

``DIR/bin`` must have nvcc and cuobjdump (PyPI: nvidia-cuda-nvcc, -nvvm, -crt, -runtime, -cccl,
-cuobjdump). Each file is the bare section of one tiny object; corpus.json has the command lines and
cuobjdump's list. ``--without-modes`` is for toolkits before 12.8, which have neither compress modes
nor Blackwell: tests/data/fatbin/cu124, of the toolkit that line cu124 builds with. Run it with a
new toolkit and a new ``--out`` to see whether the format changed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

SOURCE = "__global__ void k() {}\n"
BOTH_90 = ["-gencode", "arch=compute_90,code=[compute_90,sm_90]"]

CASES = {
    "sass-90": ["-gencode", "arch=compute_90,code=sm_90"],
    "ptx-90": ["-gencode", "arch=compute_90,code=compute_90"],
    "both-90-default": BOTH_90,
    "both-90-no-compress": [*BOTH_90, "--no-compress"],
    "both-90-compress-all": [*BOTH_90, "-Xfatbin", "-compress-all"],
    "both-90-size": [*BOTH_90, "--compress-mode=size"],
    "both-90-speed": [*BOTH_90, "--compress-mode=speed", "-Xfatbin", "-compress-all"],
    "both-90-none": [*BOTH_90, "--compress-mode=none"],
    "both-90-debug": [*BOTH_90, "-G", "--compress-mode=size"],
    "both-90-relocatable": [*BOTH_90, "-rdc=true", "--compress-mode=size"],
    "lto-and-sass-90": [
        "-rdc=true",
        "-gencode",
        "arch=compute_90,code=[lto_90,sm_90]",
        "--compress-mode=size",
    ],
    "both-90a": ["-gencode", "arch=compute_90a,code=[compute_90a,sm_90a]", "--compress-mode=size"],
    "both-120": ["-gencode", "arch=compute_120,code=[compute_120,sm_120]", "--compress-mode=size"],
    "both-120a": [
        "-gencode",
        "arch=compute_120a,code=[compute_120a,sm_120a]",
        "--compress-mode=none",
    ],
    "both-100f": [
        "-gencode",
        "arch=compute_100f,code=[compute_100f,sm_100f]",
        "--compress-mode=size",
    ],
    "upstream-list": [
        "--compress-mode=size",
        *(
            part
            for code in (
                "75,code=compute_75",
                "80,code=compute_80",
                "86,code=sm_86",
                "89,code=sm_89",
                "90,code=compute_90",
                "120a,code=sm_120a",
                "121a,code=sm_121a",
            )
            for part in ("-gencode", f"arch=compute_{code}")
        ),
    ],
}

WITHOUT_MODES = {
    **{name: flags for name, flags in CASES.items() if name.startswith(("sass-90", "ptx-90"))},
    "both-90-default": BOTH_90,
    "both-90-no-compress": [*BOTH_90, "--no-compress"],
    "both-90-compress-all": [*BOTH_90, "-Xfatbin", "-compress-all"],
    "both-90-debug": [*BOTH_90, "-G"],
    "both-90-relocatable": [*BOTH_90, "-rdc=true"],
    "lto-and-sass-90": ["-rdc=true", "-gencode", "arch=compute_90,code=[lto_90,sm_90]"],
    "both-90a": ["-gencode", "arch=compute_90a,code=[compute_90a,sm_90a]"],
    "seed-list": [
        part
        for arch in (80, 86, 89, 90)
        for part in ("-gencode", f"arch=compute_{arch},code=[compute_{arch},sm_{arch}]")
    ],
}


def main() -> None:
    """Make every case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cuda", type=Path, required=True)
    default = Path(__file__).parents[1] / "data" / "fatbin"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--without-modes", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            name: make(name, flags, options.cuda / "bin", Path(folder), options.out)
            for name, flags in (WITHOUT_MODES if options.without_modes else CASES).items()
        }
    nvcc, cuobjdump = (version(options.cuda / "bin" / tool) for tool in ("nvcc", "cuobjdump"))
    made = {"nvcc": nvcc, "cuobjdump": cuobjdump, "source": SOURCE, "cases": cases}
    (options.out / "corpus.json").write_text(json.dumps(made, indent=2) + "\n")


def version(tool: Path) -> str:
    """Return the version that a tool of the toolkit says."""
    return output([str(tool), "--version"]).split(", V")[1].split()[0]


def make(name: str, flags: list[str], tools: Path, folder: Path, out: Path) -> dict[str, object]:
    """Compile one case, cut its section out, and ask cuobjdump what the object holds."""
    source, built = folder / "k.cu", folder / f"{name}.o"
    source.write_text(SOURCE)
    subprocess.run([tools / "nvcc", "-c", "-o", built, source, *flags], check=True)
    section = "__nv_relfatbin" if "-rdc=true" in flags else ".nv_fatbin"
    command = ["objcopy", "-O", "binary", f"--only-section={section}", built]
    subprocess.run([*command, out / f"{name}.fatbin"], check=True)
    listed = output([str(tools / "cuobjdump"), "--list-elf", "--list-ptx", str(built)])
    return {
        "flags": flags,
        "section": section,
        "cuobjdump": {
            "sass": re.findall(r"\.sm_([0-9]+[af]?)\.cubin", listed),
            "ptx": re.findall(r"\.sm_([0-9]+[af]?)\.ptx", listed),
        },
    }


def output(command: list[str]) -> str:
    """Return what a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
