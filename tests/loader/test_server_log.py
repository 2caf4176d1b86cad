"""What is read out of llama-server's own words: where the weights are, and why it ended."""

import io
import time

import pytest

from llama_loader import server_log
from llama_loader.server_log import LoadReport, ServerLog

MEMORY = """\
0.00.1.2 E alloc_buffer: allocating 15000.50 MiB on device 0: cudaMalloc failed: out of memory
0.00.1.3 E llama_model_load: error loading model: unable to allocate CUDA0 buffer"""
NOEXEC = ("RUNTIME_NOT_EXECUTABLE", "noexec")
SHARED = "error while loading shared libraries: "
MISMATCHES = (
    "llama-server: relocation error: /l/libcublas.so.12: symbol x version y not defined in file z",
    # as musl says it
    "Error relocating /r/llama-server: __fprintf_chk: symbol not found",
    "Error loading shared library libstdc++.so.6: No such file or directory (needed by x)",
)
NO_BACKEND = """\
0.00.057.684 E llama_model_load_from_file_impl: no backends are loaded. hint: use \
ggml_backend_load() or ggml_backend_load_all() to load a backend before calling this function
0.00.057.819 E cmn  common_init_: failed to load model '/m.gguf'"""
NAMED = "0.0.0.1 I llama_model_loader: - kv 2: general.name str = out of memory"


@pytest.mark.parametrize(
    ("ended", "lines", "exit_status", "code", "words"),
    [
        (1, MEMORY, 7, "OUT_OF_MEMORY", "GPU memory for the model and its context; its last lines"),
        (1, "0.0.0.1 E error loading model: std::bad_alloc", 7, "OUT_OF_MEMORY", "main memory"),
        (1, "0.0.0.1 E load: unknown model architecture: 'zork'", 7, "BAD_MODEL", "'zork'"),
        (1, "error: invalid argument: --x", 2, "SERVER_ARGUMENT_INVALID", "--x"),
        (0, "bye", 2, "SERVER_ARGUMENT_INVALID", "did not serve; its last lines: bye"),
        (1, 'error while … "--device": invalid device: CUDA7', 5, "INVALID_DEVICE", "CUDA7"),
        (127, f"{SHARED}libx.so.1: cannot open shared object", 5, "LIBRARY_MISSING", "libx.so.1"),
        (127, "symbol lookup error: /old/libx.so.1: no y", 5, "LIBRARY_MISMATCH", "/old/libx.so.1"),
        (1, "/old/libx.so.1: version `x' not found", 5, "LIBRARY_MISMATCH", "/old/libx.so.1"),
        (127, f"{SHARED}failed to map segment from shared object", 5, *NOEXEC),
        (1, "version `GLIBC_2.38' not found", 5, "GLIBC_TOO_OLD", "newer system"),
        (-6, "CUDA error: misaligned address", 7, "CUDA_ERROR", "misaligned"),
        (-6, "CUDA error: PTX JIT compiler library not found", 5, "LIBRARY_MISSING", "PTX JIT"),
        *(
            (-6, f"CUDA error: {words}", 5, "NO_DEVICE", words)
            for words in ("no CUDA-capable device is detected", "system not yet initialized")
        ),
        *((127, line, 5, "LIBRARY_MISMATCH", line) for line in MISMATCHES),
        (-6, "CUDA error: no kernel image is available", 5, "NO_KERNEL_IMAGE", "no code for this"),
        (1, NO_BACKEND, 5, "LIBRARY_MISSING", "libggml-*.so"),
        (-6, "PTX was compiled with an unsupported toolchain.", 5, "DRIVER_TOO_OLD", "older than"),
        (-6, "forward compatibility was attempted", 5, "DRIVER_TOO_OLD", "CUDA's compat"),
        (-6, "unsupported display driver / cuda driver", 5, "DRIVER_TOO_OLD", "older than"),
        (3, NAMED, 7, "SERVER_ENDED", "status 3 while loading"),  # a model may be called so
        (3, "", 7, "SERVER_ENDED", "status 3 while loading"),
        (-9, "", 7, "SERVER_KILLED", "SIGKILL) while loading"),
        (4, "", 7, "SERVER_ENDED", "status 4 while it served"),
        (-11, "", 7, "SERVER_CRASHED", "SIGSEGV while loading"),
        (-4, "", 5, "ILLEGAL_INSTRUCTION", "this CPU does not have (SIGILL)"),
    ],
)
def test_ends_are_told_apart(
    ended: int, lines: str, exit_status: int, code: str, words: str
) -> None:
    error = server_log.explain(ended, lines.splitlines(), loading="it served" not in words)
    assert (error.code, error.exit_status) == (code, exit_status)
    assert words in error.message
    if lines and lines != NAMED:  # the line that decided comes first
        first = lines.splitlines()[0].rpartition(" E ")[2]
        assert f"its last lines: {first}" in error.message


def test_what_is_quoted_complains_or_comes_last() -> None:
    lines = ["0.00.1.2 I loading", "0.00.1.3 E failed to open", "0.00.1.4 I cleaning up"]
    assert server_log.quote(lines) == "failed to open"
    assert server_log.quote([*"abcdefgh"]) == "c | d | e | f | g | h"
    assert server_log.quote([]) == "(it printed nothing)"
    model = "0.00.1.0 I llama_model_loader: - kv 2: general.name str = an error"
    assert server_log.quote([model, "0.00.1.1 I loading"]) == "loading"


def test_list_below_a_message_is_quoted_with_it_or_not_at_all() -> None:
    """A server that is killed while it answers has printed its sampler's parameters last."""
    lines = [
        "0.00.1.2 I srv  update_slots: all slots are idle",
        "0.00.1.3 I slot launch_slot_: sampler params: ",
        "\trepeat_last_n = 64, repeat_penalty = 1.000",
        "\ttop_k = 40",
    ]
    assert server_log.quote([*lines, "killed by the kernel"]) == "killed by the kernel"
    error = server_log.explain(-9, [*lines, "0.00.1.4 E lost:", "  a GPU"], loading=False)
    assert error.message.endswith("its last lines: lost: | a GPU")
    assert "\t" not in server_log.quote(lines)


def test_headers_of_a_request_without_the_key_decide_no_cause() -> None:
    origin = "(CORS) skip non-localhost origin: http://x/ cudaMalloc failed: out of memory"
    lines = [f"0.00.1.2 W srv    operator(): {origin}", "0.00.1.3 I srv  stop: all is over"]
    for status, code in ((-9, "SERVER_KILLED"), (-11, "SERVER_CRASHED"), (3, "SERVER_ENDED")):
        error = server_log.explain(status, lines, loading=False)
        assert error.code == code
        assert "cudaMalloc" not in error.message
    # nor does any other line, once it was ready and another program killed it
    assert server_log.explain(-9, MEMORY.splitlines(), loading=False).code == "SERVER_KILLED"
    assert server_log.explain(-9, MEMORY.splitlines(), loading=True).code == "OUT_OF_MEMORY"


def test_whole_lines_are_quoted_the_decisive_one_first() -> None:
    cause = "0.00.1.2 E load: cudaMalloc failed: " + "x" * 400
    later = [f"0.00.1.{number} E failed {number} " + "y" * 200 for number in range(3, 9)]
    quoted = server_log.quote(["0.00.1.1 W failed to look", cause, *later]).split(" | ")
    assert quoted == [line.split(" E ")[1] for line in (cause, later[-1])]
    long = "0.00.1.9 I " + "z" * 1500
    assert server_log.quote(["0.00.1.1 I a", long]) == "z" * 1500
    error = server_log.explain(1, [cause, *later, "no kernel image is available"], loading=True)
    assert "its last lines: no kernel image is available | " in error.message


@pytest.mark.parametrize(
    ("buffer", "device", "on_it"),
    [
        *(("CUDA1", "CUDA1", True), ("CUDA10", "CUDA1", False), ("CUDA0", "CUDA1", False)),
        *(("CUDA_Host", "CUDA1", False), ("CUDA_Split", "CUDA1", True)),
        *(("CPU_Mapped", "CUDA1", False), ("MTL0_Mapped", "MTL0", True)),
        *(("RPC0[h:1]", "RPC0", True), ("RPC[h:1]", "RPC[h:1]", True), ("Metal", "Metal", True)),
    ],
)
def test_a_buffer_is_of_the_device_that_it_names(buffer: str, device: str, on_it: object) -> None:
    report = LoadReport(None, None, {buffer: 5, "CPU": 9})
    assert report.on_devices((device,)) is on_it
    assert report.owners((device,)) == ((device,) if on_it else ())


FORGED = "load_tensors:        CUDA0 model buffer size =   900.00 MiB"


def read(printed: str) -> ServerLog:
    """Return the log of a server that printed this."""
    log = ServerLog()
    log.read(io.BytesIO(printed.encode()))
    log.finish(60)
    return log


def test_first_error_counts_whatever_the_server_prints_after_it() -> None:
    first = "0.00.1.0 E CUDA error: the provided PTX was compiled with an unsupported toolchain."
    log = read("\n".join([first, *["0.00.2.0 I more"] * 300, ""]))
    assert server_log.explain(-6, log.tail(), loading=True).code == "DRIVER_TOO_OLD"


@pytest.mark.parametrize("stamp", ["", "0.00.123.637 I "])
def test_only_the_servers_own_report_counts(stamp: str) -> None:
    """A model's name is printed with its line breaks; its stamp would have to be guessed."""
    lines = [
        f"{stamp}llama_model_loader: - kv   2: general.name str = {FORGED}",
        f"{stamp}print_info: general.name = {FORGED}",
        f"{stamp}print_info: general.name = a offloaded 31/31 layers to GPU",
        *([FORGED, "load_tensors: offloaded 31/31 layers to GPU"] if stamp else []),
        f"{stamp}load_tensors: offloaded 0/31 layers to GPU",
        f"{stamp}load_tensors:   CPU_Mapped model buffer size =    92.10 MiB",
        f"{stamp}load_tensors:   CPU_Mapped model buffer size =    1.2.3 MiB",
        f"{stamp}load_tensors:   CPU_Mapped model buffer size = {'9' * 400} MiB",
        f"{stamp}load_tensors: offloaded {'9' * 5000}/1 layers to GPU",
        "the last one",
    ]
    log = read("\n".join(lines))
    assert log.report == LoadReport(0, 31, {"CPU_Mapped": int(92.1 * 1024**2)})
    assert log.tail()[-1] == "the last one"


@pytest.mark.parametrize("guessed", ["0.00.000.001", "0.00.900.000"])
def test_text_that_guesses_the_servers_stamp_leaves_nothing_to_believe(guessed: str) -> None:
    lines = [
        f"0.00.123.001 I print_info: general.name = x\n{guessed} I {FORGED}",
        "0.00.123.019 I load_tensors:   CPU_Mapped model buffer size =    92.10 MiB",
        "0.00.123.021 I load_tensors: offloaded 0/31 layers to GPU",
    ]
    assert read("\n".join(lines)).report == LoadReport(None, None, {})


def test_report_of_a_million_buffers_is_read_at_once() -> None:
    began = time.process_time()
    lines = (f"load_tensors: x{number} model buffer size = 1 MiB\n" for number in range(200_000))
    assert len(read("".join(lines)).report.buffers) == 100
    assert time.process_time() - began < 20


def test_the_middle_of_a_long_line_is_not_taken_for_a_line() -> None:
    printed = "x" * 2000 + FORGED.ljust(2000) + FORGED + "\n"
    assert read(printed).report == LoadReport(None, None, {})
