import signal
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_loader import devices, gguf_header, processes, server_plan
from llama_loader.devices import Device, choose, list_devices, parse
from llama_loader.errors import HostError, LoaderError
from llama_loader.gpus import Gpu
from tests.rigs.impostor_archive import Impostor
from tests.rigs.refusals import refused
from tests.rigs.releases import BARE

MIB = 1024**2
H200 = "  CUDA0: NVIDIA H200 (143155 MiB, 142629 MiB free)"
ENVIRON = processes.environment({})
WHOLE = f"the line that matters {'.' * 250} ends here"


def other(name: str) -> Device:
    return Device(name, "A thing (one)", 9 * MIB, 8 * MIB)


def listed(*lines: str) -> str:
    return "\n".join(["Available devices:", *lines, ""])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (listed(H200), [Device("CUDA0", "NVIDIA H200", 143155 * MIB, 142629 * MIB)]),
        (listed("  (none)"), []),
        (listed(), []),
        (
            "ggml_cuda_init: found 2 CUDA devices:\n"
            "  Device 0: NVIDIA L4, compute capability 8.9\n"
            + listed(*(f"  CUDA{at}: NVIDIA L4 (9 MiB, {at} MiB free)" for at in (0, 1))),
            [Device(f"CUDA{at}", "NVIDIA L4", 9 * MIB, at * MIB) for at in (0, 1)],
        ),
        *(
            (listed(f"  {name}: A thing (one) (9 MiB, 8 MiB free)\r"), [other(name)])
            for name in ("Vulkan0", "ROCm0", "SYCL0", "MTL0", "Metal", "RPC0[h:1]", "RPC[10.0:5]")
        ),
    ],
)
def test_the_list_as_llama_server_prints_it(text: str, expected: list[Device]) -> None:
    assert list(parse(text)) == expected


@pytest.mark.parametrize("text", ["usage: frobnicate [options]\n", "", "\n", "  CUDA0: H200\n"])
def test_what_is_no_list_is_said_and_quoted(text: str) -> None:
    with refused("DEVICE_LIST_GARBLED", HostError, "printed no list") as caught:
        parse(text)
    assert repr(text.strip()) in caught.value.message


@pytest.mark.parametrize(
    "trailing",
    [
        "  (none)\nggml_vulkan: No devices found.",
        "error: failed to initialize CUDA",
        "  error: failed to initialize CUDA",
        "  ggml_vulkan: No devices found.",
        "  Warning: the driver is old",
        "  BLAS: OpenBLAS (0 MiB, 0 MiB free)",
        "  CPU: AMD EPYC (100 MiB, 90 MiB free)",
        "  CPU0: AMD EPYC (100 MiB, 90 MiB free)",
        "  Device 0: NVIDIA L4, compute capability 8.9",
        "CUDA0: NVIDIA H200 (143155 MiB, 142629 MiB free)",
        "    CUDA0: NVIDIA H200 (143155 MiB, 142629 MiB free)",
    ],
)
def test_what_else_is_printed_is_no_device(trailing: str) -> None:
    """The program's stderr comes along; a backend that finds nothing says so there."""
    text = listed(trailing)
    assert parse(text) == ()
    assert [one.name for one in parse(f"{text}{H200}")] == ["CUDA0"]


@pytest.mark.parametrize(
    "line",
    [
        *(H200[:-cut] for cut in range(1, 41)),
        *("  RPC[h:1]: RPC[h:1] (9 MiB, 8 MiB free)"[:-cut] for cut in range(1, 24)),
        f"  CUDA0: NVIDIA H200 ({'9' * 5000} MiB, 1 MiB free)",
        f"  CUDA0: NVIDIA H200 (1 MiB, {'9' * 5000} MiB free)",
    ],
)
def test_a_line_that_is_cut_off_is_no_device_of_unknown_size(line: str) -> None:
    with refused("DEVICE_LIST_GARBLED", HostError, "cut off or damaged"):
        parse(listed(line))


def test_the_program_is_asked_with_its_own_environment(impostor: Impostor) -> None:
    runtime = impostor.behave(list={"text": listed(H200)})
    environ = processes.environment({"PATH": "/bin"}, libraries=[Path("/cu13"), Path("/cu12")])
    listing = list_devices(runtime, environ)
    assert [device.name for device in listing.devices] == ["CUDA0"]
    seen = impostor.seen()["environ"]
    assert seen.pop("LD_LIBRARY_PATH") == "/cu13:/cu12"
    assert {name for name in seen if name != "LC_CTYPE"} == {"PATH"}


@pytest.mark.parametrize(
    ("do", "code", "words"),
    [
        ({"sleep": 60, "text": "Avail"}, "DEVICE_LIST_HANGS", "Avail"),
        ({"status": 3, "text": "oh no"}, "DEVICE_LIST_FAILED", "status 3; it printed: 'oh no'"),
        ({"signal": signal.SIGSEGV}, "DEVICE_LIST_FAILED", "signal 11"),
        ({"status": 3, "text": f"{WHOLE}\n{'x' * 200}\n"}, "DEVICE_LIST_FAILED", WHOLE),
        ({"text": "<html>"}, "DEVICE_LIST_GARBLED", "<html>"),
        ({"status": 1, "text": "version `GLIBC_2.38' not found"}, "GLIBC_TOO_OLD", "GLIBC_2.38"),
    ],
)
def test_a_list_that_cannot_be_had(
    impostor: Impostor,
    do: dict[str, object],
    code: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "TIMEOUT", 2.0)
    started = time.monotonic()
    with refused(code, HostError) as caught:
        list_devices(impostor.behave(list=do), ENVIRON)
    assert words in caught.value.message
    assert time.monotonic() - started < 10


def gpus(*free: int) -> list[Device]:
    return [Device(f"CUDA{i}", "GPU", 80 * MIB, mib * MIB) for i, mib in enumerate(free)]


@pytest.mark.parametrize(
    ("free", "needed", "expected"),
    [
        # 512 MiB are taken on every device besides
        ((582,), 60, "0"),
        ((582,), 90, "0"),
        ((522, 582, 572), 60, "1"),
        ((522, 582, 572), 100, "12"),
        ((552, 552, 552), 100, "012"),
        ((552, 552), 200, "01"),
        ((552, 552), None, "01"),
        ((571, 552), 60, "01"),
        ((552, 550, 30), 60, "01"),
        ((542, 540, 530), 60, "012"),
        ((552, 532, 5), 60, "01"),
    ],
)
def test_the_fewest_devices_that_hold_the_model(
    free: tuple[int, ...], needed: int | None, expected: str
) -> None:
    needed = needed and needed * MIB
    chosen = choose(gpus(*free), (), needed=needed, allow_cpu=False)
    assert "".join(name[-1] for name in chosen.names) == expected
    assert chosen.reason


def test_equal_gpus_are_named_as_the_driver_counts_them() -> None:
    """Their CUDA context is not in what the driver calls free."""
    both = tuple(Gpu("L40S", "89", 48 << 30, None, free) for free in (40 << 30, 5))
    found = devices.by_the_driver(replace(BARE, gpus=both, gpu_source="nvml"))
    assert found is not None
    assert [(one.name, one.description, one.total) for one in found.devices] == [
        ("CUDA0", "L40S", 48 << 30),
        ("CUDA1", "L40S", 48 << 30),
    ]
    assert [one.free for one in found.devices] == [(40 << 30) - 640 * MIB, 0]


NVML = replace(
    BARE, gpus=(Gpu("L4", "89", 24 << 30, None, 1),) * 2, gpu_source="nvml", driver="580.159"
)


@pytest.mark.parametrize(
    "changes",
    [
        {"gpus": ()},
        {"gpus": (NVML.gpus[0], Gpu("L40S", "89", 48 << 30, None, 1))},
        {"gpus": (replace(NVML.gpus[0], capability=None),) * 2},
        {"gpus": (NVML.gpus[0], replace(NVML.gpus[0], free=None))},
        {"gpu_source": "/proc/driver/nvidia"},
        {"device_order": "FASTEST_FIRST"},
        {"visible_devices": "1,0"},
    ],
)
def test_what_the_driver_alone_cannot_tell(changes: dict[str, Any]) -> None:
    assert devices.by_the_driver(NVML) is not None
    assert devices.by_the_driver(replace(NVML, **changes)) is None


def test_cuda_before_vulkan_vulkan_before_nothing_and_names_as_they_are() -> None:
    vulkan, found = other("Vulkan0"), gpus(10, 20, 30)
    assert choose([vulkan, *gpus(10)], (), needed=None, allow_cpu=False).names == ("CUDA0",)
    assert choose([vulkan], (), needed=None, allow_cpu=False).names == ("Vulkan0",)
    assert choose(found, ("cuda2", "CUDA0"), needed=1, allow_cpu=False).names == ("CUDA2", "CUDA0")
    assert choose(found, ("none",), needed=1, allow_cpu=False).names == ()


@pytest.mark.parametrize("name", ["Vulkan0", "CUDA7"])
def test_a_device_that_is_not_there_gets_the_seeds_chapter(name: str) -> None:
    with refused("INVALID_DEVICE", HostError) as caught:
        choose(gpus(10), (name,), needed=None, allow_cpu=True)
    assert f"no device {name}; llama-server lists: CUDA0" in caught.value.message
    assert "YAKULINGO_SPACES_LLAMA_CPP_URL" in caught.value.hint
    assert "YAKULINGO_SPACES_LLAMA_DEVICE=auto" in caught.value.hint
    with pytest.raises(HostError) as caught:  # a build of ours is no question of Vulkan
        choose(gpus(10), (name,), needed=None, allow_cpu=True, printed=listed())
    assert "Vulkan" not in caught.value.hint


INIT = "ggml_cuda_init: failed to initialize CUDA: "


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        (f"{INIT}forward compatibility was attempted on non supported HW", "compat"),
        (f"{INIT}CUDA driver is a stub library", "'stubs'"),
        (f"{INIT}system not yet initialized", "nvidia-fabricmanager"),
        (f"{INIT}CUDA driver version is insufficient for CUDA runtime version", "update"),
        (f"{INIT}no CUDA-capable device is detected", "CUDA_VISIBLE_DEVICES"),
        (f"{INIT}unknown error", "nvidia-smi"),
        (
            "failed to load /r/libggml-cuda.so: libcublas.so.13: cannot open shared object file",
            "names the package that brings it",
        ),
        (
            "failed to load /r/libggml-cuda.so: /old/libcublas.so.13: undefined symbol: cublasLtX",
            "out of LD_LIBRARY_PATH",
        ),
    ],
)
def test_an_empty_list_of_a_verified_cuda_build_is_explained_by_its_own_words(
    line: str, advice: str
) -> None:
    printed = f"{line}\nwarning: no usable GPU found\n{listed('  (none)')}"
    with refused("NO_DEVICE", HostError) as caught:
        choose(parse(printed), (), needed=None, allow_cpu=False, printed=printed)
    assert f"it printed: {line!r}" in caught.value.message
    assert advice in caught.value.hint
    assert "--allow-cpu" in caught.value.hint
    assert "Vulkan" not in caught.value.hint


def test_no_device_is_an_error_unless_the_cpu_is_allowed() -> None:
    assert choose([], (), needed=None, allow_cpu=True).names == ()
    for printed, advice in ((listed("  (none)"), "no GPU is visible"), (None, "Vulkan")):
        with refused("NO_DEVICE", HostError, hint=advice) as caught:
            choose([], (), needed=None, allow_cpu=False, printed=printed)
        assert "it printed" not in caught.value.message


def gemma(path: Path) -> Path:
    """A header as a 27B's of Gemma has it, with a long array of texts before the numbers."""
    numbers = {
        "block_count": 62,
        "embedding_length": 5376,
        "context_length": 131072,
        "attention.head_count": 32,
        "attention.head_count_kv": 16,
        "attention.key_length": 128,
        "attention.value_length": 128,
    }
    body = named("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 1000)
    body += (struct.pack("<Q", 3) + b"abc") * 1000
    for name, value in numbers.items():
        body += named(f"llama.{name}") + struct.pack("<II", 4, value)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(numbers) + 1) + body)
    return path


def named(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


CACHE = 62 * 16 * 256 * 2
"""Bytes of the cache of one token of ``gemma``'s."""


@pytest.mark.parametrize(
    ("extra", "tokens"),
    [
        ((), 4096),
        (("-c", "8192"), 8192),
        (("--ctx-size", "8192", "-c", "16384"), 16384),
        (("-c", "16384", "--ctx_size", "8192", "--threads", "2"), 8192),
        (("-c", "0"), 131072),
        (("-c", "much"), 4096),
        (("-c",), 4096),
    ],
)
def test_a_context_after_the_dashes_counts(
    extra: tuple[str, ...], tokens: int, tmp_path: Path
) -> None:
    path = gemma(tmp_path / "m.gguf")
    assert server_plan.measure(path, 4096, extra) == path.stat().st_size + tokens * CACHE


def test_all_parts_of_a_split_model_count(tmp_path: Path) -> None:
    first = gemma(tmp_path / "m-00001-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"x" * 1000)
    assert gguf_header.measure(first, 1) == first.stat().st_size + 1000 + CACHE


@pytest.mark.model
def test_the_real_model_is_sized(real_model: Path) -> None:
    # llama-server's own report: "KV buffer size = 90.00 MiB"
    assert gguf_header.measure(real_model, 4096) == real_model.stat().st_size + 90 * MIB


@pytest.mark.model
def test_the_real_server_refuses_what_is_not_there(real_runtime: Path) -> None:
    found = devices.list_devices(real_runtime, ENVIRON).devices
    with refused("INVALID_DEVICE", LoaderError):
        choose(found, ("CUDA77",), needed=None, allow_cpu=True)
