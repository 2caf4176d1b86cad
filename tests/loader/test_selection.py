from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_loader import gpus
from llama_loader.errors import HostError
from llama_loader.gpus import Gpu
from llama_loader.host import HostFacts
from llama_loader.manifest import Artifact
from llama_loader.selection import cuda_code, require_libraries, select
from tests.rigs.refusals import refused
from tests.rigs.releases import BARE, artifact, libraries, manifest

RELEASE = manifest(
    artifact("cpu", "cpu", size=6_400_000),
    artifact("cu124", "seed", "80 86 89 90", "80 86 89 90", size=130_000_000),
    *(
        artifact(line, f"sm{sass.rstrip('a')}", sass, size=size)
        for line, size, every in (
            ("cu124", 20_000_000, "75 80 86 89 90"),
            ("cu128", 20_500_000, "90 100 120a"),
            ("cu130", 19_000_000, "75 80 86 89 90 100 120a 121a"),
        )
        for sass in every.split()
    ),
)


def host(*capabilities: str, driver: str | None = "580.159", cuda: int = 13) -> HostFacts:
    here = tuple(Gpu(f"GPU {one}", one) for one in capabilities)
    return replace(BARE, gpus=here, driver=driver, libraries=libraries(cuda), gpu_source="nvml")


def short(name: str) -> str:
    return name.removeprefix("llama-server-b11549-").removesuffix("-linux-x86_64.tar.zst")


# What a Space with torch cu128 and driver 570, and one with cu130 and 580, gets.
CAPABILITIES = [
    *((each, f"cu124-sm{each}", f"cu130-sm{each}") for each in ("75", "80", "86", "89", "90")),
    *((each, f"cu128-sm{each}", f"cu130-sm{each}") for each in ("100", "120")),
    ("87", "cu124-sm86", "cu130-sm86"),
    ("103", "cu128-sm100", "cu130-sm100"),
    ("121", "", "cu130-sm121"),
]


@pytest.mark.parametrize(("capability", "with_12", "with_13"), CAPABILITIES)
def test_every_gpu_gets_its_own_machine_code(capability: str, with_12: str, with_13: str) -> None:
    for facts, expected in (
        (host(capability, driver="570.86", cuda=12), with_12),
        (host(capability), with_13),
    ):
        if expected:
            choice = select(RELEASE, facts)
            assert short(choice.artifact.name) == expected
            assert (choice.native, choice.missing) == (True, ())


@pytest.mark.parametrize("name", ["Tesla V100-SXM2-16GB", "Tesla P100-PCIE-16GB", "Tesla P4"])
def test_older_than_turing_is_refused_with_what_there_is(name: str) -> None:
    capability = gpus.capability(name)
    assert capability
    with refused("NO_ARTIFACT_FOR_GPU", HostError) as caught:
        select(RELEASE, host(capability))
    assert f"{capability[0]}.{capability[1]}" in caught.value.message
    assert "CUDA 12.8 for 12.0a" in caught.value.message
    assert f"invoke build-cuda --archs '{capability}'" in caught.value.hint


def test_every_artifact_has_a_verdict_with_a_reason() -> None:
    choice = select(RELEASE, host("90", cuda=12))
    assert [verdict.name for verdict in choice.verdicts] == [a.name for a in RELEASE.artifacts]
    reasons = {short(verdict.name): verdict.reason for verdict in choice.verdicts}
    assert reasons["cu124-sm90"].startswith("chosen: machine code for 9.0")
    assert "is smaller" in reasons["cu128-sm90"]
    assert "libraries of" in reasons["cu130-sm90"]
    assert "is smaller" in reasons["cu124-seed"]
    assert reasons["cu124-sm80"] == "CUDA 12.4 for 8.0: not for 9.0"
    assert reasons["cpu-cpu"] == "has no CUDA code, and there is a GPU"


def test_machine_code_before_ptx_even_where_its_libraries_are_missing() -> None:
    release = manifest(
        artifact("cu124", "ptx", ptx="80", size=1_000), artifact("cu130", "sm90", "90")
    )
    choice = select(release, host("90", cuda=12))
    assert short(choice.artifact.name) == "cu130-sm90"
    assert choice.missing == ("libcublas.so.13", "libcublasLt.so.13", "libcudart.so.13")
    choice = select(manifest(artifact("cu124", "fat", "80", "80")), host("90", cuda=12))
    assert not choice.native
    assert "slow" in choice.reason


def test_of_two_with_ptx_the_one_that_older_drivers_take() -> None:
    """The driver's compiler takes PTX of toolkits up to its own, and no manifest says which."""
    release = manifest(
        artifact("cu128", "new", "80", "80", size=1), artifact("cu124", "old", ptx="80")
    )
    choice = select(release, host("90", driver="550.54", cuda=12))
    assert short(choice.artifact.name) == "cu124-old"
    assert "is taken by older drivers" in choice.verdicts[0].reason


@pytest.mark.parametrize(
    ("driver", "expected"),
    [("580.65", "cu130-sm90"), ("580.65.06", "cu130-sm90"), ("580.64", "cu124-sm90")],
)
def test_the_driver_decides_the_line(driver: str, expected: str) -> None:
    asked = replace(host("90", driver=driver), libraries=libraries(12, 13))
    assert short(select(RELEASE, asked).artifact.name) == expected


@pytest.mark.parametrize("allow_cpu", [False, True])
@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"glibc": "2.31"}, "GLIBC_TOO_OLD", "needs glibc"),
        ({"glibcxx": "3.4.28"}, "GLIBC_TOO_OLD", "needs GLIBC"),
        ({"glibc": None}, "GLIBC_TOO_OLD", "needs glibc"),
        ({"machine": "aarch64"}, "PLATFORM_UNSUPPORTED", "this machine is linux aarch64"),
        ({"driver": "470.82"}, "DRIVER_TOO_OLD", "470.82"),
    ],
)
def test_a_system_that_is_too_old_or_another(
    change: dict[str, Any], code: str, said: str, *, allow_cpu: bool
) -> None:
    asked = replace(host("90"), **change)
    if code == "DRIVER_TOO_OLD" and allow_cpu:
        assert select(RELEASE, asked, allow_cpu=True).runs_on == "cpu"
        return
    with refused(code, HostError) as caught:
        select(RELEASE, asked, allow_cpu=allow_cpu)
    assert said in caught.value.message


def test_no_gpu_is_an_error_unless_the_cpu_is_allowed() -> None:
    with refused("NO_GPU", HostError, hint="--allow-cpu"):
        select(RELEASE, BARE)
    choice = select(RELEASE, BARE, allow_cpu=True)
    assert (short(choice.artifact.name), choice.runs_on) == ("cpu-cpu", "cpu")
    assert choice.missing == ()


def test_a_gpu_without_an_artifact_falls_to_the_cpu_only_where_allowed() -> None:
    choice = select(RELEASE, host("70"), allow_cpu=True)
    assert choice.runs_on == "cpu"
    reasons = {short(one.name): one.reason for one in choice.verdicts}
    assert "not for 7.0" in reasons["cu124-sm75"]
    assert reasons["cpu-cpu"] == "chosen: built for the CPU"  # not that it was passed over before
    choice = select(manifest(artifact("cu130", "sm90", "90")), BARE, allow_cpu=True)
    assert choice.runs_on == "cpu"
    require_libraries(choice, BARE)
    for allow_cpu in (False, True):
        with pytest.raises(HostError, match="nothing at all"):
            select(manifest(), host("70"), allow_cpu=allow_cpu)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (
            replace(BARE, gpus=(Gpu("NVIDIA Mystery 9000", None),)),
            "Mystery 9000, whose compute capability is unknown",
        ),
        (
            replace(BARE, complaints=("GPU 0 is left out: NVML: GPU is lost (15)", "GPU 1: x")),
            "none was found; GPU 0 is left out: NVML: GPU is lost (15); GPU 1: x",
        ),
    ],
)
def test_no_gpu_is_said_with_what_is_known_of_it(facts: HostFacts, said: str) -> None:
    with refused("NO_GPU", HostError) as caught:
        select(RELEASE, facts)
    assert said in caught.value.message


def test_two_kinds_of_gpu_get_the_fat_build() -> None:
    choice = select(RELEASE, host("80", "90", cuda=12))
    assert short(choice.artifact.name) == "cu124-seed"
    single = next(v for v in choice.verdicts if "cu124-sm90" in v.name)
    assert "serves more GPUs, or those with more memory" in single.reason
    assert "none for 8.0" in single.reason


def test_missing_libraries_are_said_with_the_package_and_the_other_major() -> None:
    release = manifest(artifact("cu130", "sm90", "90"))
    asked = host("90", cuda=12)
    with refused("CUDA_LIBRARY_MISSING", HostError) as caught:
        require_libraries(select(release, asked), asked)
    assert "libcublas.so.13" in caught.value.message
    assert "libcublas.so.12 in /cu12" in caught.value.message
    assert caught.value.hint.endswith(": nvidia-cublas nvidia-cuda-runtime")
    older = manifest(artifact("cu124", "sm90", "90"))
    with pytest.raises(HostError, match="libcublas") as caught:
        require_libraries(select(older, host("90")), host("90"))
    assert caught.value.hint.endswith(": nvidia-cublas-cu12 nvidia-cuda-runtime-cu12")


def test_what_a_newer_farm_may_publish_is_passed_over() -> None:
    good = artifact("cu130", "sm90", "90")
    strange = [
        Artifact(**{**_fields(good), "name": "a", "format": "tar.br"}),
        Artifact(**{**_fields(good), "name": "b", "backend": "vulkan", "cuda": None}),
    ]
    choice = select(manifest(*strange, good), host("90"))
    assert choice.artifact.name == good.name
    assert [verdict.fits for verdict in choice.verdicts] == [False, False, True]
    assert "unknown to this loader" in choice.verdicts[0].reason
    with pytest.raises(HostError):
        select(manifest(*strange), host("90"))


def _fields(one: Artifact) -> dict[str, object]:
    return {name: getattr(one, name) for name in one.__struct_fields__}


def test_what_runs_where() -> None:
    for sass, ptx, target, expected in (
        *(("90", "", "90", "sass"), ("80", "", "86", "sass"), ("86", "", "80", "")),
        *(("80", "", "90", ""), ("", "80", "90", "ptx"), ("", "90", "89", "")),
        *(("120a", "", "120", "sass"), ("120a", "", "121", ""), ("120f", "", "121", "sass")),
        *(("100f", "", "103", "sass"), ("100f", "", "120", ""), ("", "90a", "120", "")),
        *(("", "90a", "90", "ptx"), ("", "120f", "121", "ptx"), ("", "100f", "120", "")),
        ("75", "75", "90", "ptx"),
    ):
        kind, _ = cuda_code(artifact("cu130", "x", sass, ptx), target) or ("", 0)
        assert kind == expected, (sass, ptx, target)


@given(
    st.sampled_from(["75", "80", "86", "87", "89", "90", "100", "103", "120", "121"]),
    st.sampled_from([None, "525.60", "550.54", "570.26", "580.65", "590.1"]),
    st.sets(st.sampled_from([11, 12, 13])),
)
def test_whatever_is_chosen_can_run_here(
    capability: str, driver: str | None, majors: set[int]
) -> None:
    asked = replace(host(capability, driver=driver), libraries=libraries(*majors))
    try:
        choice = select(RELEASE, asked)
    except HostError:
        assert driver == "525.60" or (capability == "121" and driver != "580.65")
        return
    assert choice.artifact.cuda
    assert cuda_code(choice.artifact, capability)
    if driver is not None:
        assert float(driver) >= float(choice.artifact.cuda.min_driver)
    again = select(manifest(*reversed(RELEASE.artifacts)), asked)
    assert again.artifact.name == choice.artifact.name
