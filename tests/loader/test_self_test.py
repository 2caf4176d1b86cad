from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import pytest

from llama_loader import devices, loader, selection, self_test
from llama_loader.errors import LoaderError, StoreError
from llama_loader.events import Timeline
from llama_loader.gpus import Gpu
from llama_loader.loader import Prepared
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
    runtime: Path,
    store: Path,
    host: HostFacts = H200,
    arch: str | None = None,
    *,
    allow_cpu: bool = False,
) -> Prepared:
    choice = selection.select(RELEASE, host, arch=arch, allow_cpu=allow_cpu)
    root = store / "runtimes" / "0"
    installed = Unlisted(runtime, root, "0" * 64, "b1", choice.artifact, verified=True)
    return Prepared(installed, host, choice, choice.libraries, choice.missing, Timeline())


def _listed(*_: object, **__: object) -> Any:
    return devices.Listing(devices.parse(ONE_LISTED), ONE_LISTED, 0.0)


def failure(wanted: Settings, ready: Prepared) -> LoaderError:
    with pytest.raises(LoaderError) as caught:
        loader.try_runtime(wanted, ready)
    return caught.value


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
    ready = prepared(real_runtime, store, BARE, allow_cpu=True)
    verdict = loader.try_runtime(settings("allow_cpu"), ready)
    assert verdict.devices == ()
    assert 0 < verdict.seconds < 30


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
    ready = prepared(real_runtime, store, BARE, allow_cpu=True)
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


# --- its result -----------------------------------------------------------------------------


def test_each_run_computes_anew_and_writes_nothing(impostor: Impostor, store: Path) -> None:
    ready = prepared(impostor.behave(**LIST), store)
    assert loader.try_runtime(settings(), ready).devices == ("CUDA0",)
    start(settings(), ready)
    impostor.behave(**LIST, completion="die")
    assert failure(settings(), ready).code == "CUDA_ERROR"
    assert sorted(path.name for path in store.rglob("*")) == ["0", "runtimes", "staging"]


def start(wanted: Settings, ready: Prepared) -> None:
    loader.start(wanted, ready, Path("/m.gguf")).stop()


def test_of_several_gpus_all_take_part(impostor: Impostor, store: Path) -> None:
    ready = prepared(impostor.behave(list={"text": TWO_LISTED}), store, TWO)
    assert loader.try_runtime(settings(), ready).devices == ("CUDA0", "CUDA1")
    assert "--device CUDA0,CUDA1" in " ".join(impostor.seen()["argv"])


def test_of_several_gpus_those_that_the_tiny_model_reaches_are_named(
    impostor: Impostor, store: Path
) -> None:
    ready = prepared(impostor.behave(list={"text": TWO_LISTED}, reaches=1), store, TWO)
    assert loader.try_runtime(settings(), ready).devices == ("CUDA0",)


def test_a_model_that_was_allowed_onto_the_cpu_names_no_gpu(
    impostor: Impostor, store: Path
) -> None:
    ready = prepared(impostor.behave(**LIST, say=ON_CPU), store)
    assert loader.try_runtime(settings("allow_cpu"), ready).devices == ()


NO_GPU_SEEN = {"list": {"text": "Available devices:\n  (none)\n"}, "known_devices": []}


def test_a_start_that_the_cpu_was_allowed_proves_nothing_of_a_gpu(
    impostor: Impostor, store: Path
) -> None:
    """CUDA_VISIBLE_DEVICES is empty: what --allow-cpu showed, it showed of the CPU."""
    hidden = replace(H200, visible_devices="")
    ready = prepared(impostor.behave(**NO_GPU_SEEN), store, hidden, arch="90")
    start(settings("allow_cpu"), ready)
    error = failure(settings(), ready)
    assert (error.code, error.exit_status) == ("NO_DEVICE", 5)


def test_a_failed_start_is_not_judged_without_a_test_run(impostor: Impostor, store: Path) -> None:
    ready = prepared(impostor.behave(completion="hang"), store)
    wanted = settings("no_test_run", LLAMA_SERVER_STARTUP_TIMEOUT="0.7")
    with pytest.raises(LoaderError) as caught:
        start(wanted, ready)
    assert "tiny" not in caught.value.render()
    assert impostor.starts() == 1


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
    ready = prepared(store, store, host, allow_cpu=wanted.cpu_allowed)
    assert self_test.possible(wanted, ready) is expected
