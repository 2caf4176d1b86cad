import json
import os
import shutil
import signal
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llama_loader import loader, processes, selection, self_test, server_plan
from llama_loader.client import Client
from llama_loader.concurrency import Background
from llama_loader.errors import HostError, IntegrityError, LoaderError, SettingError
from llama_loader.events import Note
from llama_loader.gpus import Gpu
from llama_loader.host import HostFacts
from llama_loader.manifest import Patch, dump
from llama_loader.server import Server
from llama_loader.server_plan import ServerPlan
from llama_loader.settings import Settings, load
from tests.loader.test_devices import gemma
from tests.loader.test_main import make_release
from tests.rigs.binaries import PRINT_LIBRARIES, library, program
from tests.rigs.heard import heard
from tests.rigs.impostor_archive import Impostor
from tests.rigs.refusals import refused
from tests.rigs.releases import BARE, H200, RELEASE, artifact, manifest, prepared, settings

TWO = replace(H200, gpus=H200.gpus * 2)
ROOMY, FULL = (Gpu("NVIDIA H200", "90", 140 << 30, None, free) for free in (139 << 30, 1 << 30))
LIST = "Available devices:\n  CUDA0: A (80 MiB, 1 MiB free)\n  CUDA1: B (80 MiB, 2 MiB free)\n"


def start(
    wanted: Settings, ready: loader.Prepared, model: Path = Path("/m.gguf")
) -> tuple[list[str], dict[str, str]]:
    """Start and stop; returns what the server saw."""
    server = loader.start(wanted, ready, model)
    seen = json.loads((ready.installed.folder / "seen.json").read_text())
    server.stop()
    return seen["argv"], seen["environ"]


def device(argv: list[str]) -> str:
    return argv[argv.index("--device") + 1]


NO_MEMORY = "allocating 1.00 MiB on device 0: cudaMalloc failed: out of memory"


def told(ready: loader.Prepared, extra: tuple[str, ...] = (), **variables: str) -> dict[str, str]:
    """Start; returns the notes by code."""
    notes: list[Any] = []
    loader.start(settings(**variables), ready, self_test.MODEL, extra, sink=notes.append).stop()
    return {one.code: one.message for one in notes}


def test_one_gpu_is_taken_without_asking_and_its_start_is_timed(impostor: Impostor) -> None:
    host = replace(H200, driver_folders=(Path("/driver"),))
    ready = prepared(impostor.behave(list={"text": "garbage"}), host)
    argv, environ = start(settings(), ready)
    assert device(argv) == "CUDA0"
    assert environ["LD_LIBRARY_PATH"] == "$ORIGIN:/cu13:/driver"
    assert [stage.name for stage in ready.timeline.stages] == ["devices", "start", "first token"]
    argv, _ = start(settings(N_GPU_LAYERS="0"), ready)
    assert (device(argv), argv[argv.index("--n-gpu-layers") + 1]) == ("none", "0")
    ready = replace(ready, host=replace(TWO, visible_devices="1"))  # it counts what it sees
    assert device(start(settings(), ready)[0]) == "CUDA0"
    assert impostor.starts() == 3


def test_the_cpu_s_threads_are_those_of_the_container(impostor: Impostor) -> None:
    """llama-server would start one for each core of the machine; docs/decisions/0046."""
    runtime = impostor.behave()
    for threads, host, expected in ((2, BARE, 2), (8, BARE, None), (2, H200, 1), (8, H200, 1)):
        limited = replace(host, cpus=threads, machine_cpus=8)
        ready = prepared(runtime, limited, allow_cpu=True)
        argv, _ = start(settings(ALLOW_CPU="1"), ready)
        given = int(argv[argv.index("--threads") + 1]) if "--threads" in argv else None
        assert given == expected


def test_upload_threads_are_given_where_the_build_has_the_patch(impostor: Impostor) -> None:
    patch = Patch(name="parallel-upload", sha256="a" * 64)
    source = msgspec.structs.replace(RELEASE.source, patches=(patch,))
    patched = msgspec.structs.replace(RELEASE, source=source)
    plain = prepared(impostor.behave(), replace(H200, cpus=16, machine_cpus=64))
    ready = replace(plain, released=(patched, "https://example.org/manifest.json"))
    for asked, given in (("", "12"), ("0", "0"), ("20", "20")):
        wanted = settings(LOAD_THREADS=asked)
        argv, environ = start(wanted, ready)
        assert environ["LLAMA_UPLOAD_THREADS"] == given
        assert not {"--mlock", "--no-mmap", "--load-mode"} & set(argv)
        assert "LLAMA_UPLOAD_THREADS" not in start(wanted, plain)[1]
    assert "LOAD_THREADS_UNUSED" not in told(ready, LOAD_THREADS="8")
    assert "LOAD_THREADS_UNUSED" not in told(plain)
    assert "parallel-upload" in told(plain, LOAD_THREADS="8")["LOAD_THREADS_UNUSED"]


def test_of_two_gpus_and_with_a_foreign_archive_the_program_is_asked(impostor: Impostor) -> None:
    ready = prepared(impostor.behave(list={"text": LIST}), TWO)
    argv, _ = start(settings(), ready)
    assert device(argv) == "CUDA0,CUDA1"
    argv, _ = start(settings(LLAMA_DEVICE="CUDA1"), ready)
    assert device(argv) == "CUDA1"
    foreign = replace(prepared(ready.installed.folder, H200), choice=None)
    argv, environ = start(settings(), foreign)
    assert device(argv) == "CUDA0,CUDA1"
    assert environ["LD_LIBRARY_PATH"] == "$ORIGIN:/cu13"
    assert "--fit" not in argv
    with pytest.raises(HostError, match="the archive needs libcublas"):
        loader.start(settings(), replace(foreign, missing=("libcublas.so.12",)), Path("/m.gguf"))


def test_model_that_cannot_be_loaded_because_the_cache_is_damaged_is_named(
    impostor: Impostor, tmp_path: Path
) -> None:
    blob = tmp_path / ("a" * 64)
    shutil.copy(self_test.MODEL, blob)
    (tmp_path / "m.gguf").symlink_to(blob.name)
    ready = prepared(impostor.behave(say=["E error loading model: x"], exit=1), H200)
    with refused("MODEL_SHA256_MISMATCH", IntegrityError, f"{blob} has the sha256 .* by its name"):
        start(settings(), ready, tmp_path / "m.gguf")
    with refused("BAD_MODEL", LoaderError):
        start(settings(), ready, self_test.MODEL)
    assert impostor.starts() == 2  # errors that name their cause need no test run


def test_named_device_decides_for_which_gpu_the_artifact_is(
    impostor: Impostor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA0 is an A100 beside a newer GPU with more memory, and one of an unknown kind."""
    a100 = Gpu("NVIDIA A100", "80", 40 << 30)
    mystery = Gpu("NVIDIA Mystery", None, 1 << 30)
    facts = replace(H200, gpus=(a100, FULL, mystery))
    monkeypatch.setattr(loader.host, "begin", lambda _: Background(lambda: facts))
    release = manifest(artifact("cu130", "sm80", "80"), artifact("cu130", "sm90", "90"))
    for named, order, expected in (
        ("CUDA0", None, "sm80"), ("cuda1", None, "sm90"), ("CUDA1,CUDA0", None, "sm90"),
        ("auto", None, "sm90"), ("CUDA7", None, "sm90"), ("CUDA0", "FASTEST_FIRST", "sm90"),
    ):  # fmt: skip
        asked = replace(facts, device_order=order).only(settings(LLAMA_DEVICE=named).devices)
        assert expected in selection.select(release, asked).artifact.name
    notes: list[Note] = []
    made = make_release(impostor, tmp_path / "r")
    (made / "manifest.json").write_bytes(dump(release))
    asked = settings(LLAMA_CPP_MANIFEST_URL=(made / "manifest.json").as_uri())
    with pytest.raises(LoaderError, match="cannot be fetched"):
        loader.prepare(replace(asked, store=tmp_path / "store"), sink=notes.append)
    told = {note.code: note.message for note in notes if isinstance(note, Note)}
    assert "the compute capability of NVIDIA Mystery is unknown" in told["GPU_UNKNOWN"]
    assert "NVIDIA A100 is not used" in told["GPU_UNUSED"]


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [((FULL, ROOMY), "CUDA1"), ((ROOMY, FULL), "CUDA0"), ((FULL, FULL), "CUDA0,CUDA1")],
)
def test_of_equal_gpus_that_the_driver_knows_the_roomiest_is_taken_without_asking(
    gpus: tuple[Gpu, ...], expected: str, impostor: Impostor
) -> None:
    host = replace(TWO, gpus=gpus, gpu_source="nvml")
    ready = prepared(impostor.behave(list={"text": "garbage"}), host)
    argv, environ = start(settings(), ready, self_test.MODEL)
    assert device(argv) == expected
    assert environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"  # the driver's own
    assert impostor.starts() == 1
    # MIG, say: the program does not see all of them, refuses the device, and only then is asked
    one = "Available devices:\n  CUDA0: A (80 MiB, 1 MiB free)\n"
    impostor.behave(known_devices=["CUDA0"], list={"text": one})
    assert device(start(settings(), ready)[0]) == "CUDA0"


def test_where_the_driver_may_count_otherwise_the_program_is_asked(impostor: Impostor) -> None:
    unknown = replace(TWO, gpus=(ROOMY, FULL), gpu_source="nvml", visible_devices="1,0")
    ready = prepared(impostor.behave(list={"text": LIST}), unknown)
    assert device(start(settings(), ready, self_test.MODEL)[0]) == "CUDA0,CUDA1"  # as listed
    assert impostor.starts() == 2


@pytest.mark.parametrize(
    ("trouble", "code", "said"),
    [
        ({"say": [NO_MEMORY], "exit": 1}, "LAYERS_LEFT_OVER", "12 of 31 layers are on the GPU"),
        ({"signal": 4}, "CPU_NOT_REPACKED", "--no-repack"),
    ],
)
def test_what_is_not_as_asked_is_said(
    trouble: dict[str, Any], code: str, said: str, impostor: Impostor
) -> None:
    notes = told(prepared(impostor.behave(**trouble, bad_starts=1), H200))
    assert set(notes) == {code}
    assert said in notes[code]


FOUR_NAMES = [f"CUDA{at}" for at in range(4)]
FOUR: dict[str, Any] = {
    "list": {
        "text": "\n  ".join(
            ["Available devices:", *(f"{one}: A (24000 MiB, 3000 MiB free)" for one in FOUR_NAMES)]
        )
    },
    "known_devices": FOUR_NAMES,
}


@pytest.mark.parametrize(
    ("named", "bad_starts", "devices_taken", "codes"),
    [
        ("auto", 2, "CUDA0,CUDA1,CUDA2,CUDA3", ["DEVICES_ADDED"]),
        ("auto", 3, "CUDA0,CUDA1,CUDA2,CUDA3", ["DEVICES_ADDED", "LAYERS_LEFT_OVER"]),
        ("CUDA0", 2, "CUDA0", ["LAYERS_LEFT_OVER"]),  # nothing is added to what was named
    ],
)
def test_idle_gpus_come_before_the_cpu(
    named: str, bad_starts: int, devices_taken: str, codes: list[str], impostor: Impostor
) -> None:
    """One GPU was reckoned to be enough, and is not: the first start is the list's."""
    host = replace(H200, gpus=H200.gpus * 4, memory=64 << 30)
    do = {**FOUR, "say": [NO_MEMORY], "exit": 1, "bad_starts": bad_starts}
    notes = told(prepared(impostor.behave(**do), host), LLAMA_DEVICE=named)
    argv = impostor.seen()["argv"]
    assert device(argv) == devices_taken
    assert ("-1" in argv) == ("LAYERS_LEFT_OVER" in codes)
    assert list(notes) == codes
    assert named != "auto" or "CUDA0 had no room" in notes["DEVICES_ADDED"]


def test_what_comes_after_the_dashes_needs_room_too(impostor: Impostor, tmp_path: Path) -> None:
    ready = prepared(impostor.behave(**FOUR), replace(H200, gpus=H200.gpus * 4))
    path = gemma(tmp_path / "m.gguf")
    for extra, count in ((), 1), (("-c", "6144"), 2), (("--ctx-size", "131072"), 4):
        assert len(loader.plan_server(settings(), ready, path, extra).devices) == count


A100, T4 = Gpu("NVIDIA A100-SXM4-40GB", "80"), Gpu("Tesla T4", "75")
MIXED = (
    "Available devices:\n"
    "  CUDA0: NVIDIA A100-SXM4-40GB (40000 MiB, 39000 MiB free)\n"
    "  CUDA1: Tesla T4 (15000 MiB, 14000 MiB free)\n"
)


def on_mixed_gpus(
    runtime: Path, *gpus: Gpu, capabilities: tuple[str, ...] = ("75",)
) -> loader.Prepared:
    """The artifact has code for some of the GPUs alone."""
    ready = prepared(runtime, H200)
    assert ready.choice is not None
    serves = replace(ready.choice, capabilities=capabilities)
    return replace(ready, choice=serves, host=replace(ready.host, gpus=gpus))


def test_a_gpu_that_the_artifact_has_no_code_for_is_passed_over(impostor: Impostor) -> None:
    runtime = impostor.behave(list={"text": MIXED})
    for model_path in (self_test.MODEL, Path("/unknown.gguf")):
        argv, _ = start(settings(), on_mixed_gpus(runtime, A100, T4), model_path)
        assert device(argv) == "CUDA1"
    argv, _ = start(settings(LLAMA_DEVICE="CUDA0"), on_mixed_gpus(runtime, A100, T4))
    assert device(argv) == "CUDA0"  # a person's own word


def test_where_the_names_do_not_tell_every_gpu_stays(impostor: Impostor) -> None:
    runtime = impostor.behave(list={"text": MIXED})
    for gpus, capabilities in (
        ((A100, T4), ("80", "75")),
        ((A100, T4), ("120",)),  # --arch 120: neither
        ((replace(A100, capability=None), T4), ("75",)),
        ((A100, replace(A100, capability="75"), T4), ("75",)),  # the name stands for both
        ((replace(A100, name="A100 PCIe"), T4), ("75",)),
    ):
        ready = on_mixed_gpus(runtime, *gpus, capabilities=capabilities)
        assert loader.choose_devices(settings(), ready, None).names == ("CUDA0", "CUDA1")


PARTLY = [
    "load_tensors: offloaded 1/63 layers to GPU",
    "load_tensors:        CUDA0 model buffer size =   100.00 MiB",
    "load_tensors:   CPU_Mapped model buffer size = 16000.00 MiB",
]


def test_layers_on_the_cpu_although_all_were_asked_for(impostor: Impostor) -> None:
    ready = prepared(impostor.behave(say=PARTLY), H200)
    notes = told(ready)
    assert set(notes) == {"LAYERS_LEFT_OVER"}
    assert notes["LAYERS_LEFT_OVER"].startswith("1 of 63 layers are on the GPU, although all")
    assert told(ready, N_GPU_LAYERS="1") == {}
    assert told(ready, ("-ngl", "1")) == {}
    assert set(told(ready, ALLOW_CPU="1")) == {"LAYERS_LEFT_OVER"}


def test_a_device_that_got_nothing_is_said(impostor: Impostor) -> None:
    """One name may be the beginning of another: CUDA1 has nothing of what is on CUDA10."""
    say = ["load_tensors: CUDA0 model buffer size = 9.00 MiB", "x CUDA10 model buffer size = 9 MiB"]
    notes = told(prepared(impostor.behave(list={"text": LIST}, say=say), TWO))
    assert set(notes) == {"DEVICE_UNUSED"}
    assert notes["DEVICE_UNUSED"].startswith("CUDA1 got no part")
    split = ["load_tensors: CUDA_Split model buffer size = 9.00 MiB"]
    assert told(prepared(impostor.behave(list={"text": LIST}, say=split), TWO)) == {}


def test_a_server_that_does_not_say_where_the_model_is(impostor: Impostor) -> None:
    notes = told(prepared(impostor.behave(), H200), ("--log-disable",))
    assert set(notes) == {"DEVICES_NOT_CHECKED"}
    assert "CUDA0 could not be checked" in notes["DEVICES_NOT_CHECKED"]
    assert told(prepared(impostor.behave(mute=True), H200), N_GPU_LAYERS="0") == {}


def test_a_note_is_told_once_where_the_first_start_crashed(impostor: Impostor) -> None:
    ready = prepared(impostor.behave(signal=9, bad_starts=1), H200)
    assert list(told(ready, ("--log-disable",))) == ["SERVER_RESTARTED", "DEVICES_NOT_CHECKED"]


def test_an_interrupt_while_notes_are_told_leaves_no_server(impostor: Impostor) -> None:
    def interrupt(note: Any) -> None:
        raise KeyboardInterrupt(note.code)

    ready = prepared(impostor.behave(), H200)
    with pytest.raises(KeyboardInterrupt, match="DEVICES_NOT_CHECKED"):
        loader.start(settings(), ready, self_test.MODEL, ("--log-disable",), sink=interrupt)
    assert not processes.lives(impostor.seen()["pid"])


@pytest.mark.parametrize(
    ("given", "host", "code"),
    [
        # CUDA_VISIBLE_DEVICES is empty, or ZeroGPU's main process asks
        ({}, H200, "NO_DEVICE"),
        ({"LLAMA_DEVICE": "CUDA0"}, H200, "INVALID_DEVICE"),
        ({}, replace(H200, libraries=()), "CUDA_LIBRARY_MISSING"),
    ],
)
def test_missing_libraries_are_said_before_anything_starts_and_a_hidden_gpu_by_the_program(
    given: dict[str, str], host: HostFacts, code: str, impostor: Impostor
) -> None:
    ready = prepared(impostor.behave(known_devices=[]), host)
    with refused(code, HostError) as caught:
        loader.start(settings(**given), ready, Path("/m.gguf"))
    if code == "CUDA_LIBRARY_MISSING":
        assert "nvidia-cublas" in caught.value.hint
        assert not (impostor.folder / "starts").exists()
    argv, _ = start(settings(ALLOW_CPU="1"), ready)
    assert device(argv) == "none"


def test_a_server_with_keys_of_the_persons_own_takes_the_loaders_beside_them(
    impostor: Impostor,
) -> None:
    """Its first token would be refused otherwise; an empty key closes it instead of opening it."""
    ready = prepared(impostor.behave(), H200)
    locked = ("--threads 3 --api-key a,b", "--api_key a", "--api-key-file /nowhere", "--api-key ")
    for extra in ("", "--api-key", *locked):
        given = tuple(extra.split(" ")) if extra else ()
        plan = loader.plan_server(settings(), ready, Path("/m.gguf"), given, key=None)
        assert (plan.key == "") is (extra in locked), extra


@pytest.mark.model
def test_the_real_server_takes_both_keys(real_runtime: Path, real_model: Path) -> None:
    extra = ("--api-key", "theirs")
    plan = ServerPlan(real_runtime, real_model, processes.environment({}), extra=extra)
    with Server(plan) as server:
        for key, status in (("theirs", 200), (server.api_key, 200), ("another", 401), (None, 401)):
            assert Client(server.port, key).status("/props", 5) == status


@pytest.mark.parametrize(
    ("extra", "no_key", "what"),
    [
        *(
            ((name, "x"), False, name)
            for name in ("--port", "-m", "-hf", "-hfr", "--hf-file", "-dr", "--models-dir")
        ),
        *(((name, "x"), False, name) for name in ("--api-prefix", "--ssl-cert-file")),
        (("--port=1",), False, "--port"),
        (("--threads", "2", "--model", "x"), False, "--model"),
        (("--hf_repo", "a/b"), False, "--hf-repo"),
        (("--docker_repo=x",), False, "--docker-repo"),
        (("--host", "127.0.0.1", "--host", "192.0.2.1"), False, "--host"),
        (("--host", "192.0.2.1"), False, "--host"),
        (("--api-key", "k"), True, "--no-key contradicts"),
        (("--api_key_file", "/f"), True, "--no-key contradicts"),
        (("--api-key", ""), False, "--api-key after -- is empty"),
    ],
)
def test_arguments_that_make_another_server_or_contradict_are_refused(
    extra: tuple[str, ...], *, no_key: bool, what: str
) -> None:
    with refused("EXTRA_ARGUMENT", SettingError, what) as caught:
        server_plan.check(extra, no_key=no_key)
    assert caught.value.hint


def test_relative_files_are_those_of_the_person(tmp_path: Path) -> None:
    here = f"{tmp_path}"
    for name in ("a,b.jinja", "a.gguf", "b.gguf", "keys"):
        (tmp_path / name).write_text("x")
    given = ("--chat_template_file", "a,b.jinja", "--video-ffmpeg-dir", ".", "--log-file", "new")
    assert server_plan.with_whole_paths(given, tmp_path) == (
        *("--chat_template_file", f"{here}/a,b.jinja", "--video-ffmpeg-dir", here),
        *("--log-file", f"{here}/new"),
    )
    loras = ("--lora", f"a.gguf,{here}/b.gguf", "--threads", "2")
    given = (*loras, "--api-key-file", "keys", "--lora")
    assert server_plan.with_whole_paths(given, tmp_path) == (
        *("--lora", f"{here}/a.gguf,{here}/b.gguf", "--threads", "2"),
        *("--api-key-file", f"{here}/keys", "--lora"),
    )
    scaled = ("--lora-scaled", "a.gguf:0.5")
    assert server_plan.with_whole_paths(scaled, tmp_path)[1] == f"{here}/a.gguf:0.5"


@pytest.mark.parametrize(
    ("option", "file", "why"),
    [
        ("--lora", "a.gguf,nope", "nope, after -- --lora, cannot be read: No such file"),
        ("--lora-scaled", "nope:1", "nope, after -- --lora-scaled, cannot be read"),
        ("-md", "nope", "cannot be read"),
        ("--api_key_file", "empty", "holds no key"),
        ("--api-key-file", "fifo", "holds no key"),
    ],
)
def test_file_that_the_server_could_not_use_is_refused_at_the_start(
    option: str, file: str, why: str, tmp_path: Path
) -> None:
    (tmp_path / "a.gguf").write_text("x")
    (tmp_path / "empty").write_text(" \n")
    os.mkfifo(tmp_path / "fifo")
    with refused("EXTRA_ARGUMENT", SettingError, why):
        server_plan.with_whole_paths((option, file), tmp_path)


def test_server_without_a_key_is_a_note_that_says_whom_it_is_open_to() -> None:
    pages = "every user of this machine can use it, and so can web pages"
    every = ("--host", "0.0.0.0"), "every program that reaches one of them"
    for extra, whom in (((), pages), (("--host", "localhost"), pages), every):
        (note,) = server_plan.check(extra, no_key=True)
        assert (note.code, "--no-key" in note.hint) == ("SERVER_OPEN", True)
        assert whom in note.message
        assert server_plan.check(extra) == ()


def test_nothing_is_executed_that_changed_since_it_was_verified(impostor: Impostor) -> None:
    """Between the installation and the start a model of 17 GB may have been fetched."""
    ready = prepared(impostor.behave(list={"text": LIST}), TWO)
    damaged = IntegrityError("MANIFEST_CONTRADICTS_ITSELF", "libggml.so changed")

    def look() -> None:
        raise damaged

    installed = replace(ready.installed, look=look)
    ready = replace(ready, installed=installed)
    wanted = settings(NO_TEST_RUN="1")
    for execute in (
        lambda: loader.list_devices(wanted, ready),
        lambda: loader.try_runtime(wanted, ready),
        lambda: loader.start(wanted, ready, Path("/m.gguf")),
        lambda: loader.start(settings(LLAMA_DEVICE="CUDA1"), ready, Path("/m.gguf")),
    ):
        with pytest.raises(IntegrityError, match="changed"):
            execute()
    assert not (ready.installed.folder / "starts").exists()


def test_a_runtime_damaged_before_a_start_or_restart_is_fetched_again_and_never_executed(
    impostor: Impostor, tmp_path: Path
) -> None:
    release = make_release(impostor, tmp_path / "release")
    given = {"manifest_url": (release / "manifest.json").as_uri(), "store": str(tmp_path / "store")}
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    wanted = load({**given, "allow_cpu": "1"}, environ)
    events: list[Any] = []
    ready = loader.prepare(wanted, sink=events.append)
    program = ready.installed.folder / "llama-server"
    good = program.read_bytes()
    spoiled = f"#!/bin/sh\ntouch {tmp_path / 'evil'}\n"
    program.write_text(spoiled)
    server = loader.start(wanted, ready, self_test.MODEL, sink=events.append)
    try:
        assert server.pid is not None
        assert program.read_bytes() == good
        program.write_text(spoiled)  # once more, and now a restart finds it
        os.kill(server.pid, signal.SIGKILL)
        assert server.wait(10)
        assert server.ensure().pid is not None
        assert program.read_bytes() == good
    finally:
        server.stop()
    assert not (tmp_path / "evil").exists()
    codes = [one.code for one in events if isinstance(one, Note)]
    assert codes.count("RUNTIME_DAMAGED") == 2
    assert "fetch" in [stage.name for stage in ready.timeline.stages]


def test_a_folder_that_the_dynamic_linker_cannot_be_given_is_refused(impostor: Impostor) -> None:
    """LD_LIBRARY_PATH has no way to quote: ``/a:b`` would be /a and a folder b of where we are."""
    ready = prepared(impostor.behave(), H200)
    for character in ":;$":
        odd = tuple(replace(one, folder=Path(f"/cu{character}13")) for one in ready.libraries)
        with refused("LIBRARY_FOLDER_UNUSABLE", SettingError, "cannot be given '/cu"):
            loader.environment(settings(), replace(ready, libraries=odd))


@pytest.mark.parametrize("libraries", ["lib", "lib64", "lib/x86_64-linux-gnu"])
def test_libraries_of_an_archive_in_another_folder_than_its_program_are_found(
    tmp_path: Path, libraries: str
) -> None:
    """As ``make install`` lays them out; the program's RUNPATH is its own folder."""
    library(tmp_path, "libggml-base.so.0")
    program(tmp_path, "llama-server", "libggml-base.so.0")
    with tarfile.open(tmp_path / "theirs.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "llama-server", "usr/bin/llama-server")
        archive.add(tmp_path / "libggml-base.so.0", f"usr/{libraries}/libggml-base.so.0")
    given = {"url": (tmp_path / "theirs.tar.gz").as_uri(), "store": str(tmp_path / "store")}
    for _ in range(2):  # what was installed before is found by its receipt
        wanted = load(given, {"PATH": os.environ["PATH"], "HOME": str(tmp_path)})
        ready = loader.prepare(wanted)
        environ = loader.environment(wanted, ready)
        subprocess.run([ready.installed.folder / "llama-server"], env=environ, check=True)


@pytest.mark.parametrize("store", ["store", "st:ore"])
@pytest.mark.parametrize("linked", [True, False])
def test_the_verified_runtimes_own_libraries_come_before_those_of_a_folder_of_cuda_libraries(
    store: str, linked: object, tmp_path: Path
) -> None:
    """As in Ollama's folder: CUDA's libraries, and a libggml-base.so.0 of another build."""
    runtime, cuda = tmp_path / store, tmp_path / "cuda"
    for folder in (runtime, cuda):
        folder.mkdir()
        library(folder, "libggml-base.so.0")
    library(cuda, "libcudart.so.13")
    library(tmp_path, "libggml-base.so.0"), library(tmp_path, "libcudart.so.13")
    program(
        tmp_path, "llama-server", "libggml-base.so.0", "libcudart.so.13", source=PRINT_LIBRARIES
    )
    shutil.move(tmp_path / "llama-server", runtime)
    ready = prepared(runtime, H200)
    here = tuple(replace(one, folder=cuda) for one in ready.libraries)
    environ = loader.environment(settings(), replace(ready, libraries=here))
    if not linked:  # that the order matters: without it the other build's is taken
        environ["LD_LIBRARY_PATH"] = str(cuda)
    done = heard([runtime / "llama-server"], env=environ, check=True)
    first = runtime if linked else cuda
    expected = {str(first / "libggml-base.so.0"), str(cuda / "libcudart.so.13")}
    assert set(done.stdout.split()) == expected


# --- a GPU that is not used ------------------------------------------------------------------


ADA = Gpu("NVIDIA GeForce RTX 4090", "89", 24 << 30)
BLACKWELL = Gpu("NVIDIA GeForce RTX 5090", "120", 32 << 30)
LOST = "GPU 1 is left out: NVML: GPU is lost (15)"


def unused(tmp_path: Path, host: HostFacts, **given: str) -> Any:
    """Return the codes and texts of the notes about GPUs, of a release with a set for each."""
    document = manifest(artifact("cu130", "sm89", "89"), artifact("cu130", "sm120", "120"))
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    choice = selection.select(
        document, host, arch=given.get("cuda_arch"), allow_cpu="allow_cpu" in given
    )
    return loader._unused_gpus(load(given, environ), host, choice)


def test_a_gpu_without_code_in_a_release_of_one_architecture_is_named(tmp_path: Path) -> None:
    mixed = replace(H200, gpus=(ADA, BLACKWELL), gpu_source="nvml")
    (note,) = unused(tmp_path, mixed)
    assert note.code == "GPU_UNUSED"
    assert note.message.startswith("NVIDIA GeForce RTX 4090 is not used: ")
    assert "no code for its compute capability 8.9" in note.message
    assert "--archs '89;120'" in note.hint
    assert "YAKULINGO_SPACES_CUDA_ARCH=89) takes this one instead" in note.hint
    assert unused(tmp_path, mixed, cuda_arch="120") == []
    (note,) = unused(tmp_path, mixed, cuda_arch="90", allow_cpu="1")
    assert note.code == "ARCH_UNUSED"
    assert "capability 9.0 is named" in note.message
    assert unused(tmp_path, mixed, devices="CUDA1") == []
    assert unused(tmp_path, mixed, n_gpu_layers="0") == []
    equal = replace(mixed, gpus=(BLACKWELL, BLACKWELL))
    assert unused(tmp_path, equal) == []
    assert unused(tmp_path, replace(mixed, gpu_source="zerogpu")) == []
    (note,) = unused(tmp_path, replace(mixed, gpus=(BLACKWELL,), complaints=(LOST,)))
    assert (note.code, note.message.endswith(f": {LOST}")) == ("DRIVER_COMPLAINT", True)
