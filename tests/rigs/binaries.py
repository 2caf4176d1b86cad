"""Makes small real ELF files with the host's gcc, and CUDA sections byte by byte."""

import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

FATBINS = Path(__file__).parents[1] / "data" / "fatbin"


PRINT_LIBRARIES = r"""
#define _GNU_SOURCE
#include <link.h>
#include <stdio.h>
#include <string.h>
static int show(struct dl_phdr_info *info, size_t size, void *data) {
    (void)size; (void)data;
    if (strstr(info->dlpi_name, "libcu") || strstr(info->dlpi_name, "libggml"))
        puts(info->dlpi_name);
    return 0;
}
int main(void) { return dl_iterate_phdr(show, 0); }
"""
"""A program that prints which of CUDA's and ggml's libraries the dynamic linker loaded for it."""


def entry(
    kind: int, arch: int, *, flags: int = 0x11, payload: bytes = b"code", header: int = 64
) -> bytes:
    """Return one entry of a container, as nvcc 13.0 lays it out."""
    payload += b"\0" * (-len(payload) % 8)
    head = struct.pack("<HHIQ12xI8xQ", kind, 0x101, header, len(payload), arch, flags)
    return head.ljust(header, b"\0") + payload


def container(*entries: bytes) -> bytes:
    """Return a container with these entries."""
    payload = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(payload)) + payload


def compile_c(out: Path, source: str = "", *flags: str, language: str = "c") -> Path:
    """Compile a source text; ``flags`` as gcc takes them. Returns ``out``."""
    compiler = "g++" if language == "c++" else "gcc"
    subprocess.run(
        [compiler, "-x", language, "-", "-x", "none", "-o", str(out), *flags],
        input=source.encode(),
        check=True,
        cwd=out.parent,
    )
    return out


def library(folder: Path, name: str, *needs: str, soname: str | None = "", **code: Path) -> Path:
    """Make a shared library with a RUNPATH of $ORIGIN; ``code``: ``fatbin=FILE`` for .nv_fatbin."""
    flags = ["-shared", "-fPIC", "-Wl,-rpath,$ORIGIN", "-Wl,--no-as-needed"]
    flags += [] if soname is None else [f"-Wl,-soname,{soname or name}"]
    return compile_c(folder / name, _with_code(code.get("fatbin")), *flags, *_linked(folder, needs))


def library_of_objects(
    folder: Path, name: str, objects: Sequence[bytes], *, links: Sequence[bytes] = ()
) -> Path:
    """Make a shared library as nvcc's linker does: device links first, each with a registration."""
    fatbin, wrappers = folder / f"{name}.fatbin", folder / f"{name}.wrappers"
    fatbin.write_bytes(b"".join(code + b"\0" * (-len(code) % 8) for code in (*links, *objects)))
    versions = [2] * len(links) + [1] * len(objects)
    wrappers.write_bytes(b"".join(struct.pack("<II16x", 0x466243B1, v) for v in versions))
    assembly = f'.section .nvFatBinSegment,\\"aw\\"\\n.incbin \\"{wrappers}\\"\\n.text\\n'
    source = f'{_with_code(fatbin)}__asm__("{assembly}");\n'
    return compile_c(folder / name, source, "-shared", f"-Wl,-soname,{name},-rpath,$ORIGIN")


def program(folder: Path, name: str, *needs: str, source: str = "") -> Path:
    """Make a program with a RUNPATH of $ORIGIN that links against libraries in ``folder``."""
    flags = ["-Wl,-rpath,$ORIGIN", "-Wl,--no-as-needed", "-Wl,--allow-shlib-undefined"]
    text = source or "int main(void) { return 0; }\n"
    return compile_c(folder / name, text, *flags, *_linked(folder, needs))


def _linked(folder: Path, needs: tuple[str, ...]) -> list[str]:
    return [f"-L{folder}", *(f"-l:{need}" for need in needs)]


def _with_code(fatbin: Path | None) -> str:
    text = "int made_for_a_test;\n"
    if fatbin is None:
        return text
    assembly = (
        f'.section .nv_fatbin,\\"a\\"\\n.balign 8\\n.incbin \\"{fatbin}\\"\\n.balign 8\\n.text\\n'
    )
    return f'{text}__asm__("{assembly}");\n'
