import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from llama_loader import devices, loader, processes, self_test
from llama_loader.errors import LoaderError, StoreError
from llama_loader.host import HostFacts
from llama_loader.loader import Prepared
from llama_loader.server import Server
from llama_loader.server_plan import ServerPlan
from llama_loader.settings import Settings
from tests.rigs.impostor_archive import Impostor
from tests.rigs.refusals import refused
from tests.rigs.releases import BARE, H200, prepared, settings

PROJECT = Path(__file__).parent.parent.parent
TWO = replace(H200, gpus=H200.gpus * 2)
ONE_LISTED = "Available devices:\n  CUDA0: A (80 MiB, 1 MiB free)\n"
TWO_LISTED = f"{ONE_LISTED}  CUDA1: B (80 MiB, 2 MiB free)\n"
LIST: dict[str, Any] = {"list": {"text": ONE_LISTED}}
ON_CPU = ["load_tensors:   CPU_Mapped model buffer size =    92.10 MiB"]


def failure(wanted: Settings, ready: Prepared) -> LoaderError:
    with pytest.raises(LoaderError) as caught:
        loader.try_runtime(wanted, ready)
    return caught.value


def test_the_generator_gives_these_very_bytes(tmp_path: Path) -> None:
    made = tmp_path / "made.gguf"
    subprocess.run(
        [sys.executable, "-m", "tests.rigs.tiny_model", str(made)], cwd=PROJECT, check=True
    )
    assert made.read_bytes() == self_test.MODEL.read_bytes()
    assert made.stat().st_size < 400_000


@pytest.mark.model
def test_the_answer_is_right_by_a_margin_that_rounding_cannot_take(real_runtime: Path) -> None:
    """Two quantised dot products differ by about 0.05 here; a wrong one by whole units."""
    wanted = {"prompt": self_test.PROMPT, "n_predict": 1, "temperature": 0, "n_probs": 2}
    plan = ServerPlan(real_runtime, self_test.MODEL, processes.environment({}), n_ctx=256)
    with Server(plan) as server:
        for count in (55, 1):  # the second time all but one token are in the cache
            with server.client().request("/completion", 20, wanted) as response:
                told = json.loads(response.read())
            assert (told["content"], told["timings"]["prompt_n"]) == (self_test.ANSWER, count)
            first, second = told["completion_probabilities"][0]["top_logprobs"]
            assert first["logprob"] - second["logprob"] > 2


@pytest.mark.model
@pytest.mark.parametrize("tensor", ["attn_k", "ffn_down"])
def test_a_real_server_that_computes_wrongly(
    real_runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str
) -> None:
    """One product of the nine comes out as zero; a damaged library would give such numbers."""
    ready = prepared(real_runtime, BARE, allow_cpu=True)
    tested = loader.try_runtime(settings("allow_cpu"), ready)
    assert (tested.devices, 0 < tested.seconds < 30) == ((), True)
    wrong = shutil.copyfile(self_test.MODEL, tmp_path / "wrong.gguf")
    (found,) = [one for one in gguf.GGUFReader(wrong).tensors if tensor in one.name]
    with wrong.open("r+b") as file:
        file.seek(found.data_offset)
        file.write(bytes(found.n_bytes))
    monkeypatch.setattr(self_test, "MODEL", wrong)
    error = failure(settings("allow_cpu"), ready)
    assert (error.code, error.exit_status) == ("WRONG_ANSWER", 7)
    assert "computes wrongly" in error.message


def test_the_devices_are_listed_then_a_token_is_asked_for(impostor: Impostor) -> None:
    ready = prepared(impostor.behave(**LIST))
    assert loader.try_runtime(settings(N_CTX="8192"), ready).devices == ("CUDA0",)
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
        ({"completion": "die"}, 7, "CUDA_ERROR"),
        ({"say": ["error: invalid argument: --fit"], "exit": 1}, 7, "SERVER_ARGUMENT_INVALID"),
        ({"say": ON_CPU}, 5, "MODEL_ON_CPU"),
        ({"list": {"text": "what?"}}, 5, "DEVICE_LIST_GARBLED"),
        ({"list": {}}, 5, "NO_DEVICE"),
    ],
)
def test_a_failure_is_not_blamed_on_the_users_model(
    impostor: Impostor, do: dict[str, Any], status: int, code: str
) -> None:
    ready = prepared(impostor.behave(**{**LIST, **do}))
    error = failure(settings(), ready)
    assert (error.code, error.exit_status) == (code, status)
    assert error.message.startswith("the test run with the loader's own tiny model failed: ")
    assert error.message.endswith("(your model is not the cause)")
    assert "--no-test-run" in error.hint
    assert ready.timeline.stages == []


def test_a_full_disk_is_not_blamed_on_the_runtime(
    impostor: Impostor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Prepared) -> None:
        raise StoreError("DISK_FULL", "no space left")

    monkeypatch.setattr(Prepared, "require_sound", full)  # which installs a damaged one again
    error = failure(settings(), prepared(impostor.behave(**LIST)))
    assert (error.code, error.message) == ("DISK_FULL", "no space left")


def test_a_hang_is_ended_by_the_deadline(
    impostor: Impostor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has started; then a whole prompt's kernels hang."""
    monkeypatch.setattr(self_test, "TIMEOUT", 2.5)
    began = time.monotonic()
    error = failure(settings(), prepared(impostor.behave(**LIST, answers=1)))
    assert (error.code, error.exit_status) == ("ANSWER_TIMEOUT", 7)
    assert time.monotonic() - began < 8
    assert not processes.lives(impostor.seen()["pid"])


def test_a_driver_that_must_compile_first_gets_the_time_of_a_start(
    impostor: Impostor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_test, "TIMEOUT", 0.3)
    listing = devices.Listing(devices.parse(ONE_LISTED))
    ready = prepared(impostor.behave(**LIST, loading=0.6))
    with refused("START_TIMEOUT", LoaderError):
        loader.try_runtime(settings(), ready, listing)
    assert ready.choice is not None
    compiled = replace(ready, choice=replace(ready.choice, native=False))
    assert loader.try_runtime(settings(), compiled, listing).devices == ("CUDA0",)


@pytest.mark.parametrize(
    ("options", "behaviour", "used"),
    [
        ((), {"reaches": 2}, ("CUDA0", "CUDA1")),
        ((), {"reaches": 1}, ("CUDA0",)),
        (("allow_cpu",), {"say": ON_CPU}, ()),
    ],
)
def test_devices_that_the_tiny_model_reaches_are_named(
    impostor: Impostor, options: tuple[str, ...], behaviour: dict[str, Any], used: tuple[str, ...]
) -> None:
    ready = prepared(impostor.behave(list={"text": TWO_LISTED}, **behaviour), TWO)
    assert loader.try_runtime(settings(*options), ready).devices == used
    assert "--device CUDA0,CUDA1" in " ".join(impostor.seen()["argv"])


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
    tmp_path: Path,
    options: tuple[str, ...],
    variables: dict[str, str],
    host: HostFacts,
    expected: object,
) -> None:
    wanted = settings(*options, **variables)
    ready = prepared(tmp_path, host, allow_cpu=wanted.cpu_allowed)
    assert self_test.possible(wanted, ready) is expected
