"""Makes tests/data/fatbin: what nvcc really writes, and what cuobjdump says that it is.

    python tests/rigs/make_fatbin_corpus.py --cuda DIR [--out DIR] [--without-modes]

``DIR/bin`` must have nvcc and cuobjdump (PyPI: nvidia-cuda-nvcc, -nvvm, -crt, -runtime, -cccl,
-cuobjdump). Each file is the bare section of one tiny object; corpus.json has the command lines and
cuobjdump's list. ``--without-modes`` is for toolkits before 12.8, which have neither compress modes
nor Blackwell: tests/data/fatbin/cu124, of the toolkit that line cu124 builds with. Run it with a
new toolkit and a new ``--out`` to see whether the format changed.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

SOURCE = "__global__ void k() {}\n"
SIZE = "--compress-mode=size"


def gencode(*pairs: str) -> list[str]:
    """Return nvcc's options for pairs such as ``90,code=sm_90``."""
    return [word for pair in pairs for word in ("-gencode", f"arch=compute_{pair}")]


def both(arch: str, *flags: str) -> list[str]:
    """Return the options for one architecture's PTX and machine code."""
    return [*gencode(f"{arch},code=[compute_{arch},sm_{arch}]"), *flags]


LTO = gencode("90,code=[lto_90,sm_90]")
OF_EVERY_TOOLKIT = {
    "sass-90": gencode("90,code=sm_90"),
    "ptx-90": gencode("90,code=compute_90"),
    "both-90-default": both("90"),
    "both-90-no-compress": both("90", "--no-compress"),
    "both-90-compress-all": both("90", "-Xfatbin", "-compress-all"),
}
CASES = {
    **OF_EVERY_TOOLKIT,
    "both-90-size": both("90", SIZE),
    "both-90-speed": both("90", "--compress-mode=speed", "-Xfatbin", "-compress-all"),
    "both-90-none": both("90", "--compress-mode=none"),
    "both-90-debug": both("90", "-G", SIZE),
    "both-90-relocatable": both("90", "-rdc=true", SIZE),
    "lto-and-sass-90": ["-rdc=true", *LTO, SIZE],
    "both-90a": both("90a", SIZE),
    "both-120": both("120", SIZE),
    "both-120a": both("120a", "--compress-mode=none"),
    "both-100f": both("100f", SIZE),
    "upstream-list": [
        SIZE,
        *gencode("75,code=compute_75", "80,code=compute_80", "86,code=sm_86", "89,code=sm_89"),
        *gencode("90,code=compute_90", "120a,code=sm_120a", "121a,code=sm_121a"),
    ],
}
WITHOUT_MODES = {
    **OF_EVERY_TOOLKIT,
    "both-90-debug": both("90", "-G"),
    "both-90-relocatable": both("90", "-rdc=true"),
    "lto-and-sass-90": ["-rdc=true", *LTO],
    "both-90a": both("90a"),
    "seed-list": [word for arch in ("80", "86", "89", "90") for word in both(arch)],
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
