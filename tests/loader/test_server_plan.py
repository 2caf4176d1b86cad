"""llama-server's command line."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_loader import self_test
from llama_loader.errors import ServerError
from llama_loader.server_plan import ServerPlan

ON_GPU = ServerPlan(Path("/r"), Path("/m.gguf"), {}, ("CUDA0", "CUDA1"), pinned_build=True)


def test_the_command_line() -> None:
    plan = replace(ON_GPU, n_ctx=8192, extra=("--threads", "3"))
    text = " ".join(plan.argv(1))
    assert text.startswith("/r/llama-server --model /m.gguf --host 127.0.0.1 --port 1 --ctx-size")
    assert "--ctx-size 8192 --n-gpu-layers 999 --device CUDA0,CUDA1" in text
    assert "--cors-origins localhost --cache-ram 0 --threads 1 --fit off" in text
    assert text.endswith("--no-webui --no-warmup --reuse-port --threads 3")
    text = " ".join(replace(ON_GPU, devices=(), pinned_build=False, key=None).argv(1))
    assert "--n-gpu-layers 0 --device none" in text
    for absent in ("--fit", "--cors-origins", "--cache-ram", "api-key", "--reuse-port"):
        assert absent not in text


@pytest.mark.parametrize(("memory", "kept"), [(8 << 30, "512"), (1 << 40, "1024")])
def test_prompts_that_the_server_keeps_take_a_share_of_memory(memory: int, kept: str) -> None:
    assert f"--cache-ram {kept} " in " ".join(replace(ON_GPU, main_memory=memory).argv(1))


@pytest.mark.parametrize("changes", [{"devices": ()}, {"n_gpu_layers": 20}, {"n_gpu_layers": -1}])
def test_all_threads_where_the_cpu_has_layers(changes: dict[str, Any]) -> None:
    plan = replace(ON_GPU, **changes)
    assert "--threads" not in plan.argv(1)
    assert "--threads 2" in " ".join(replace(plan, threads=2).argv(1))


@pytest.mark.parametrize(
    "changes",
    [
        {"pinned_build": False},  # may not know how to fit
        {"n_gpu_layers": 20},  # asked for
        {"n_gpu_layers": -1},  # once more, not for ever
        {"devices": ()},  # on the CPU there is no room to be made
        {"n_ctx": 16_777_216},  # main memory has no room for it, either
        {"main_memory": 0},  # … or it is not known
        {"model": Path("/m.gguf")},
    ],
)
def test_what_cannot_be_eased_is_an_error(changes: dict[str, Any]) -> None:
    roomy = replace(ON_GPU, model=self_test.MODEL, main_memory=1 << 30)
    full = ServerError("OUT_OF_MEMORY", "cudaMalloc failed")
    eased = roomy.eased(full)
    assert eased is not None
    assert eased.fitted
    assert replace(roomy, **changes).eased(full) is None
