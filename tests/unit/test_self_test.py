from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import msgspec
import pytest

from llama_loader import devices, loader, selection, self_test
from llama_loader.errors import LoaderError, StoreError
from llama_loader.events import Timeline
from llama_loader.gpus import Gpu
from llama_loader.loader import Prepared
from llama_loader.selection import Wishes
from llama_loader.server import Server
from llama_loader.server_plan import ServerPlan
from llama_loader.settings import Settings, load
from tests.rigs.releases import BARE, Unlisted, artifact, libraries, manifest

if TYPE_CHECKING:
    from conftest import Impostor

    from llama_loader.host import HostFacts

PROJECT = Path(__file__).parent.parent.parent
GPU = Gpu("NVIDIA H200", "90", 150_000_000_000, "GPU-1")
H200 = replace(BARE, gpus=(GPU,), driver="580.159", gpu_source="nvml", libraries=libraries(13))
TWO = replace(H200, gpus=(GPU, replace(GPU, uuid="GPU-2")))
RELEASE = manifest(artifact("cu130", "sm90", "90"), artifact("cpu", "cpu"))
ONE_LISTED = "Available devices:\n  CUDA0: A (80 MiB, 1 MiB free)\n"
TWO_LISTED = f"{ONE_LISTED}  CUDA1: B (80 MiB, 2 MiB free)\n"
LIST: dict[str, Any] = {"list": {"text": ONE_LISTED}}
ON_CPU = ["load_tensors:   CPU_Mapped model buffer size =    92.10 MiB"]


def settings(*options: str, **variables: str) -> Settings:
    names = {f"YAKULINGO_SPACES_{name}": value for name, value in variables.items()}
    given = dict.fromkeys(options, "1")
    return load(given, environ={"PATH": os.environ["PATH"], "HOME": "/home/user", **names})


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with one runtime's folder, as an installation leaves it."""
    place = tmp_path / "store"
    (place / "runtimes" / "0").mkdir(parents=True)
    (place / "staging").mkdir()
    return place


def prepared(
    runtime: Path, store: Path, host: HostFacts = H200, wishes: Wishes | None = None
) -> Prepared:
    choice = selection.select(RELEASE, host, wishes or Wishes())
    root = store / "runtimes" / "0"
    installed = Unlisted(runtime, root, "0" * 64, "b1", choice.artifact, verified=True)
    return Prepared(installed, host, choice, choice.libraries, choice.missing, Timeline())


def _listed(*_: object, **__: object) -> Any:
    return devices.Listing(devices.parse(ONE_LISTED), ONE_LISTED, 0.0)


def failure(wanted: Settings, ready: Prepared) -> LoaderError:
    with pytest.raises(LoaderError) as caught:
        loader.try_runtime(wanted, ready)
    return caught.value


def documents(store: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((store / "self-tests").glob("*"))]


# --- the model ------------------------------------------------------------------------------


def test_the_generator_gives_these_very_bytes(tmp_path: Path) -> None:
    made = tmp_path / "made.gguf"
    command = [sys.executable, "-m", "farm.tiny_model"]
    subprocess.run([*command, str(made)], cwd=PROJECT, check=True)
    assert made.read_bytes() == self_test.MODEL.read_bytes()
    assert made.stat().st_size < 400_000
    assert subprocess.run(command, cwd=PROJECT, capture_output=True, check=False).returncode == 2


def real(runtime: Path, model: Path = self_test.MODEL) -> Server:
    environ = {"PATH": "/usr/bin:/bin"}
    return Server(ServerPlan(runtime, model, environ, n_ctx=256, startup_timeout=60.0))


def asked(server: Server, wanted: dict[str, object]) -> Any:
    with server.client().request("/completion", 20, wanted) as response:
        return json.loads(response.read())


@pytest.mark.model
def test_the_answer_is_right_by_a_margin_that_rounding_cannot_take(real_runtime: Path) -> None:
    """Two quantised dot products differ by about 0.05 here; a wrong one by whole units."""
    wanted = {"prompt": self_test.PROMPT, "n_predict": 1, "temperature": 0, "n_probs": 2}
    with real(real_runtime) as server:
        told = asked(server, wanted)
        assert told["content"] == self_test.ANSWER
        assert told["timings"]["prompt_n"] == 55
        first, second = told["completion_probabilities"][0]["top_logprobs"]
        assert first["logprob"] - second["logprob"] > 2
        again = asked(server, wanted)
        assert (again["content"], again["timings"]["prompt_n"]) == (self_test.ANSWER, 1)


@pytest.mark.model
def test_a_real_token_on_the_cpu(real_runtime: Path, store: Path) -> None:
    ready = prepared(real_runtime, store, BARE, Wishes(allow_cpu=True))
    verdict = loader.try_runtime(settings("allow_cpu"), ready)
    assert (verdict.devices, verdict.by, verdict.kept) == ((), "tiny model", False)
    assert [path.name for path in (store / "self-tests").iterdir()] == [f"{'0' * 64}.json"]
    (kept,) = documents(store)
    assert kept["devices"] == []


@pytest.mark.model
@pytest.mark.parametrize("tensor", ["attn_output", "attn_k", "ffn_down"])
def test_a_real_server_that_computes_wrongly(
    real_runtime: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str
) -> None:
    """One product of the nine comes out as zero; a damaged library would give such numbers."""
    wrong = shutil.copyfile(self_test.MODEL, tmp_path / "wrong.gguf")
    (found,) = [one for one in gguf.GGUFReader(wrong).tensors if tensor in one.name]
    with wrong.open("r+b") as file:
        file.seek(found.data_offset)
        file.write(bytes(found.n_bytes))
    monkeypatch.setattr(self_test, "MODEL", wrong)
    ready = prepared(real_runtime, store, BARE, Wishes(allow_cpu=True))
    error = failure(settings("allow_cpu"), ready)
    assert (error.code, error.exit_status) == ("WRONG_ANSWER", 7)
    assert "computes wrongly" in error.message


# --- the run --------------------------------------------------------------------------------


def test_the_devices_are_listed_then_a_token_is_asked_for(impostor: Impostor, store: Path) -> None:
    ready = prepared(impostor.behave(**LIST), store)
    verdict = loader.try_runtime(settings(N_CTX="8192"), ready)
    assert verdict.devices == ("CUDA0",)
    assert impostor.starts() == 2
    seen = impostor.seen()
    text = " ".join(seen["argv"])
    assert f"--model {self_test.MODEL}" in text
    assert "--n-gpu-layers 999 --device CUDA0" in text
    assert "--ctx-size 256" in text
    assert seen["environ"]["LD_LIBRARY_PATH"] == "$ORIGIN:/cu13"
    assert [stage.name for stage in ready.timeline.stages] == ["test run"]


@pytest.mark.parametrize(
    ("do", "status", "code"),
    [
        ({"exit": 3}, 7, "SERVER_ENDED"),
        ({"signal": 11}, 7, "SERVER_CRASHED"),
        ({"completion": "die"}, 7, "CUDA_ERROR"),
        ({"completion": "garbage"}, 7, "NOT_LLAMA_SERVER"),
        ({"say": ["error: invalid argument: --fit"], "exit": 1}, 7, "SERVER_ARGUMENT_INVALID"),
        ({"say": ON_CPU}, 5, "MODEL_ON_CPU"),
        ({"say": ["CUDA error: no kernel image is available"], "signal": 6}, 5, "NO_KERNEL_IMAGE"),
        ({"list": {"text": "what?"}}, 5, "DEVICE_LIST_GARBLED"),
        ({"list": {"status": 1, "text": "version `GLIBC_2.38' not found"}}, 5, "GLIBC_TOO_OLD"),
        ({"list": {}}, 5, "NO_DEVICE"),
    ],
)
def test_a_failure_is_not_blamed_on_the_users_model(
    impostor: Impostor, store: Path, do: dict[str, Any], status: int, code: str
) -> None:
    ready = prepared(impostor.behave(**{**LIST, **do}), store)
    error = failure(settings(), ready)
    assert (error.code, error.exit_status) == (code, status)
    assert error.message.startswith("the test run with the loader's own tiny model failed: ")
    assert error.message.endswith("(your model is not the cause)")
    assert "--no-test-run" in error.hint
    assert documents(store) == []
    assert ready.timeline.stages == []


def test_a_full_disk_is_not_blamed_on_the_runtime(
    impostor: Impostor, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepared(impostor.behave(**LIST), store)

    def full(_: Prepared) -> None:
        raise StoreError("DISK_FULL", "no space left")

    monkeypatch.setattr(Prepared, "require_sound", full)  # which installs a damaged one again
    assert failure(settings(), ready).code == "DISK_FULL"
    crashed = LoaderError("SERVER_CRASHED", "it crashed")
    plan = loader.plan_server(settings(), ready, self_test.MODEL)
    assert self_test.judged(settings(), ready, plan, crashed) is None
    assert not (store / "self-tests").exists()


@pytest.mark.parametrize("do", [{"never_listen": True}, {"loading": 60}, {"completion": "hang"}])
def test_a_hang_is_ended_by_the_deadline(
    impostor: Impostor, store: Path, monkeypatch: pytest.MonkeyPatch, do: dict[str, Any]
) -> None:
    monkeypatch.setattr(self_test, "TIMEOUT", 1.0)
    monkeypatch.setattr(devices, "list_devices", _listed)
    began = time.monotonic()
    error = failure(settings(), prepared(impostor.behave(**LIST, **do), store))
    assert (error.code, error.exit_status) == ("START_TIMEOUT", 7)
    assert time.monotonic() - began < 4
    assert not Path(f"/proc/{impostor.seen()['pid']}").exists()


def test_a_list_of_devices_that_hangs_has_a_deadline_too(
    impostor: Impostor, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "TIMEOUT", 0.5)
    error = failure(settings(), prepared(impostor.behave(list={"sleep": 60}), store))
    assert (error.code, error.exit_status) == ("DEVICE_LIST_HANGS", 5)


def test_a_second_answer_that_does_not_come(
    impostor: Impostor, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Server.start has its token; then the kernels for a whole prompt hang."""
    monkeypatch.setattr(self_test, "TIMEOUT", 1.5)
    monkeypatch.setattr(self_test, "ANSWER", "another")
    error = failure(settings(), prepared(impostor.behave(**LIST), store))
    assert (error.code, error.exit_status) == ("WRONG_ANSWER", 7)
    monkeypatch.setattr(Server, "start", _start_then_hang(impostor))
    error = failure(settings(), prepared(impostor.folder, store))
    assert error.code == "ANSWER_TIMEOUT"


def _start_then_hang(impostor: Impostor) -> Any:
    start = Server.start

    def started(self: Server) -> Any:
        impostor.behave(**LIST, hang_after=0.7)
        done = start(self)
        time.sleep(0.7)
        return done

    return started


def test_a_driver_that_must_compile_first_gets_the_time_of_a_start(
    impostor: Impostor, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_test, "TIMEOUT", 0.3)
    monkeypatch.setattr(devices, "list_devices", _listed)
    ready = prepared(impostor.behave(**LIST, loading=0.6), store)
    assert failure(settings(), ready).code == "START_TIMEOUT"
    assert ready.choice is not None
    compiled = replace(ready, choice=replace(ready.choice, native=False))
    assert loader.try_runtime(settings(), compiled).devices == ("CUDA0",)


def test_what_its_start_gave_up_is_said(impostor: Impostor, store: Path) -> None:
    told: list[Any] = []
    ready = prepared(impostor.behave(**LIST, signal=4, bad_starts=2), store)
    assert loader.try_runtime(settings(), ready, sink=told.append).devices
    assert [one.code for one in told] == ["CPU_NOT_REPACKED"]


# --- the verdict ----------------------------------------------------------------------------


def test_a_good_verdict_is_kept_and_costs_next_to_nothing(impostor: Impostor, store: Path) -> None:
    first = loader.try_runtime(settings(), prepared(impostor.behave(**LIST), store))
    impostor.behave(exit=3)
    ready = prepared(impostor.folder, store)
    wanted = settings()
    costs = []
    for _ in range(5):  # the machine may be busy
        began = time.perf_counter()
        again = loader.try_runtime(wanted, ready)
        costs.append(time.perf_counter() - began)
    assert min(costs) < 0.005
    assert again == msgspec.structs.replace(first, kept=True)
    assert ready.timeline.stages == []


def test_it_holds_for_this_gpu_driver_artifact_and_kind_of_device_alone(
    impostor: Impostor, store: Path
) -> None:
    ready = prepared(impostor.behave(**LIST), store)
    loader.try_runtime(settings(), ready)
    assert self_test.kept(settings(), ready)
    other = replace(GPU, uuid="GPU-9")
    for change in (
        {"driver": "590.1"},
        {"gpus": (other,)},
        {"visible_devices": "1"},
        {"cpu": "another"},
        {"glibc": "2.39"},
    ):
        assert not self_test.kept(settings(), replace(ready, host=replace(H200, **change)))
    newer = replace(ready.installed, sha256="1" * 64)
    assert not self_test.kept(settings(), replace(ready, installed=newer))
    assert not self_test.kept(settings(), replace(ready, libraries=libraries(12)))
    assert not self_test.kept(settings(N_GPU_LAYERS="0"), ready)
    assert not self_test.kept(settings(LLAMA_DEVICE="none"), ready)


def test_a_failure_is_not_kept_and_removes_what_was(impostor: Impostor, store: Path) -> None:
    ready = prepared(impostor.behave(), store)
    start(settings(), ready)
    assert self_test.kept(settings(), ready)
    impostor.behave(completion="die")
    with pytest.raises(LoaderError, match="your model is not the cause"):
        start(settings(), ready)
    assert documents(store) == []
    failure(settings(), prepared(impostor.behave(**LIST, exit=3), store))
    assert documents(store) == []
    impostor.behave(**LIST)
    assert loader.try_runtime(settings(), ready).devices == ("CUDA0",)
    assert self_test.kept(settings(), ready)


def test_a_verdict_that_cannot_be_read_is_none(impostor: Impostor, store: Path) -> None:
    ready = prepared(impostor.behave(**LIST), store)
    loader.try_runtime(settings(), ready)
    (path,) = (store / "self-tests").iterdir()
    good = path.read_text()
    for content in (
        *("", "{", "[]", '{"devices": 1}', "[" * 100_000),
        good.replace('"seconds":', '"seconds": 1' + "0" * 400),
        good.replace('"seconds":', '"seconds": NaN, "x": '),
        good.replace('"seconds":', '"seconds": -'),
        good.replace("CUDA0", "CUDA0\\u001b[2J"),
        good.replace('"tiny model"', '"\\u001b[2J"'),
        good.replace("{", '{"devices": [], ', 1),
        good + " " * 100_000,
    ):
        assert content != good
        path.write_text(content)
        assert self_test.kept(settings(), ready) is None
    path.unlink()
    os.mkfifo(path)
    assert self_test.kept(settings(), ready) is None
    path.unlink()
    assert loader.try_runtime(settings(), ready).devices
    assert self_test.kept(settings(), ready)


def test_a_store_that_cannot_be_written_keeps_nothing(impostor: Impostor, store: Path) -> None:
    (store / "self-tests").write_text("in the way")
    ready = prepared(impostor.behave(**LIST), store)
    assert loader.try_runtime(settings(), ready).devices
    (store / "self-tests").unlink()
    (store / "staging").rmdir()
    assert loader.try_runtime(settings(), ready).devices
    assert documents(store) == []


def test_a_runtime_outside_of_a_store_keeps_nothing(impostor: Impostor, store: Path) -> None:
    ready = prepared(impostor.behave(**LIST), store)
    elsewhere = replace(ready, installed=replace(ready.installed, root=impostor.folder))
    assert loader.try_runtime(settings(), elsewhere).devices
    assert sorted(path.name for path in store.iterdir()) == ["runtimes", "staging"]


def test_nobody_else_can_write_it(impostor: Impostor, store: Path) -> None:
    loader.try_runtime(settings(), prepared(impostor.behave(**LIST), store))
    (path,) = (store / "self-tests").iterdir()
    assert not stat.S_IMODE(path.stat().st_mode) & 0o022
    assert list((store / "staging").iterdir()) == []


# --- starts ---------------------------------------------------------------------------------


def start(wanted: Settings, ready: Prepared) -> None:
    loader.start(wanted, ready, Path("/m.gguf")).stop()


def test_a_start_that_works_is_a_good_verdict(impostor: Impostor, store: Path) -> None:
    ready = prepared(impostor.behave(), store)
    start(settings(), ready)
    assert impostor.starts() == 1
    verdict = self_test.kept(settings(), ready)
    assert verdict is not None
    assert (verdict.by, verdict.devices) == ("model", ("CUDA0",))
    (before,) = documents(store)
    start(settings(), ready)
    assert documents(store) == [before]


def test_of_several_gpus_all_take_part(impostor: Impostor, store: Path) -> None:
    ready = prepared(impostor.behave(list={"text": TWO_LISTED}), store, TWO)
    assert loader.try_runtime(settings(), ready).devices == ("CUDA0", "CUDA1")
    assert "--device CUDA0,CUDA1" in " ".join(impostor.seen()["argv"])
    assert self_test.kept(settings(), ready)
    assert self_test.kept(settings(LLAMA_DEVICE="cuda1"), ready)


def test_of_several_gpus_the_visible_ones_are_all_there_are(
    impostor: Impostor, store: Path
) -> None:
    one_visible = replace(TWO, visible_devices="1")
    ready = prepared(impostor.behave(**LIST), store, one_visible)
    start(settings(), ready)
    assert self_test.kept(settings(), ready)


def test_a_model_that_was_allowed_onto_the_cpu_proves_no_gpu(
    impostor: Impostor, store: Path
) -> None:
    ready = prepared(impostor.behave(say=ON_CPU), store)
    start(settings("allow_cpu"), ready)
    assert not self_test.kept(settings("allow_cpu"), ready)
    assert [one["devices"] for one in documents(store)] == [[]]


def test_a_server_that_does_not_say_where_it_computes_proves_nothing(
    impostor: Impostor, store: Path
) -> None:
    told: list[Any] = []
    ready = prepared(impostor.behave(**LIST, mute=True), store)
    start(settings(), ready)
    assert loader.try_runtime(settings(), ready, sink=told.append).devices == ("CUDA0",)
    assert [one.code for one in told] == ["DEVICES_NOT_CHECKED"]
    assert not (store / "self-tests").exists()


def test_a_server_of_two_gpus_that_tells_only_of_layers_proves_nothing(
    impostor: Impostor, store: Path
) -> None:
    only_layers = ["load_tensors: offloaded 31/31 layers to GPU"]
    ready = prepared(impostor.behave(list={"text": TWO_LISTED}, say=only_layers), store, TWO)
    start(settings(), ready)
    assert not (store / "self-tests").exists()


NO_GPU_SEEN = {"list": {"text": "Available devices:\n  (none)\n"}, "known_devices": []}


def test_the_cpus_verdict_is_no_gpus(impostor: Impostor, store: Path) -> None:
    """CUDA_VISIBLE_DEVICES is empty: what one start with --allow-cpu proved, it proved of that."""
    hidden = replace(H200, visible_devices="")
    ready = prepared(impostor.behave(**NO_GPU_SEEN), store, hidden, Wishes(arch="90"))
    start(settings("allow_cpu"), ready)
    assert self_test.kept(settings(), ready) is None
    error = failure(settings(), ready)
    assert (error.code, error.exit_status) == ("NO_DEVICE", 5)
    start(settings("allow_cpu"), ready)
    assert self_test.kept(settings("allow_cpu"), ready)
    assert self_test.kept(settings(N_GPU_LAYERS="0"), ready)
    assert self_test.kept(settings(LLAMA_DEVICE="none"), ready)


def test_without_a_test_run_nothing_is_tried_or_kept(impostor: Impostor, store: Path) -> None:
    ready = prepared(impostor.behave(), store)
    start(settings("no_test_run"), ready)
    assert not (store / "self-tests").exists()
    impostor.behave(completion="hang")
    wanted = settings("no_test_run", LLAMA_SERVER_STARTUP_TIMEOUT="0.7")
    with pytest.raises(LoaderError) as caught:
        start(wanted, ready)
    assert "tiny" not in caught.value.render()
    assert impostor.starts() == 2


@pytest.mark.parametrize(
    ("options", "variables", "host", "expected"),
    [
        ((), {}, H200, True),
        ((), {"CUDA_ARCH": "90"}, H200, True),
        ((), {"CUDA_ARCH": "120"}, H200, False),
        (("allow_cpu",), {"CUDA_ARCH": "120"}, H200, False),
        ((), {}, replace(H200, libraries=()), False),
        ((), {}, replace(H200, zerogpu=True, gpu_source="zerogpu"), False),
        ((), {}, replace(H200, zerogpu=True, gpu_source="/proc/driver/nvidia"), False),
        (("allow_cpu",), {}, replace(H200, zerogpu=True, gpu_source="zerogpu"), True),
        ((), {"N_GPU_LAYERS": "0"}, BARE, True),
    ],
)
def test_where_a_fetched_runtime_can_be_tried(
    store: Path,
    options: tuple[str, ...],
    variables: dict[str, str],
    host: HostFacts,
    expected: object,
) -> None:
    wanted = settings(*options, **variables)
    wishes = replace(loader.wishes(wanted), arch=None)
    ready = prepared(store, store, host, wishes)
    assert self_test.possible(wanted, ready) is expected
