"""Other people's code for a source tree, in every way that llama.cpp carries it."""

from pathlib import Path

MIT = """MIT License

Copyright (c) 2026 {author}

Permission is hereby granted, free of charge, to any person obtaining a copy of this software, to
deal in it without restriction, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND.
"""
UNLICENSE = "This is free and unencumbered software released into the public domain.\n"
COMMIT = "0dccaa9aa176dd6d7ef8afeca3c18d6e80a32795"

FILES = {
    # a licence beside the code, the version in a macro, upstream's tag
    "vendor/cpp-httplib/LICENSE": MIT.format(author="httplib"),
    "vendor/cpp-httplib/httplib.h": '#define CPPHTTPLIB_VERSION "0.60.1"\n',
    # several parts in one folder; versions in numbers, and none at all
    "vendor/hash/hash.h": "void hash(void);\n",
    "vendor/hash/xxhash/LICENSE": (
        "Redistribution and use in source and binary forms are permitted.\n"
        "* Redistributions in binary form must reproduce the above copyright notice.\n"
    ),
    "vendor/hash/xxhash/xxhash.h": (
        "#define XXH_VERSION_MAJOR    0\n"
        "#define XXH_VERSION_MINOR    8\n"
        "#define XXH_VERSION_RELEASE  3\n"
    ),
    "vendor/hash/sha1/sha1.c": "/*\nSHA-1 in C\n100% Public Domain\n*/\nint sha1;\n",
    # a choice of two licences at the end of a header, the version in its first line
    "vendor/stb/stb_image.h": (
        "/* stb_image - v2.30 - public domain image loader */\n"
        + "int image;\n" * 5000
        + f"/*\nALTERNATIVE A - {MIT.format(author='stb')}\nALTERNATIVE B\n{UNLICENSE}*/\n"
    ),
    # the licence's text in licenses/, as the header's name has it
    "licenses/LICENSE-jsonhpp": MIT.format(author="json"),
    "vendor/nlohmann/json.hpp": (
        "// JSON for Modern C++\n// version 3.12.0\n// SPDX-License-Identifier: MIT\n"
    ),
    # no version but upstream's commit
    "vendor/sheredom/subprocess.h": f"/*\n   {UNLICENSE}*/\n",
    # one file among llama.cpp's own, and one of llama.cpp's own
    "common/base64.hpp": f"/*\n{UNLICENSE}*/\nint base64;\n",
    "common/log.cpp": "// writes a log\nint log_;\n",
    "scripts/sync_vendor.py": (
        'HTTPLIB_VERSION = "refs/tags/v0.60.1"\n'
        "vendor = {\n"
        '    "https://raw.githubusercontent.com/nothings/stb/refs/heads/master/stb_image.h":'
        ' "vendor/stb/stb_image.h",\n'
        '    # "https://github.com/not/this/raw/refs/tags/1/x.h": "vendor/stb/x.h",\n'
        '    f"https://raw.githubusercontent.com/yhirose/cpp-httplib/{HTTPLIB_VERSION}/LICENSE":'
        ' "vendor/cpp-httplib/LICENSE",\n'
        f'    "https://raw.githubusercontent.com/sheredom/subprocess.h/{COMMIT}/subprocess.h":'
        ' "vendor/sheredom/subprocess.h",\n'
        "}\n"
    ),
}


def add(tree: Path) -> Path:
    """Put them into a source tree; returns it."""
    for name, text in FILES.items():
        place = tree / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, "utf-8")
    return tree
