"""Toolkits that a host has, and one made of wheels; nvcc is a script here, the stub is real."""

import ctypes
import io
import zipfile
from pathlib import Path

import pytest

from farm.errors import EngineError, SourceError, UsageError
from farm.inputs import toolkit
from farm.inputs.packages import cache_folder
from farm.inputs.pins import PackagePin
from tests.rigs.heard import heard, script
from tests.rigs.package_index import PackageIndex
from tests.rigs.refusals import refused

NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {version}, V{version}.99" ;;
--list-gpu-code) printf 'sm_75\\nsm_100\\nsm_75\\n' ;;
--dryrun) echo "#$ _SPACE_= " >&2; echo "#$ _HERE_={here}" >&2 ;;
esac
"""
CUDA_H = """
#define cuMemAlloc cuMemAlloc_v2
#define cuMemFree                           cuMemFree_v2
#define CUDA_VERSION 13000
CUresult CUDAAPI cuInit(unsigned int Flags);
CUresult CUDAAPI cuMemAlloc(CUdeviceptr *dptr, size_t bytesize);
CUresult CUDAAPI
    cuMemFree(CUdeviceptr dptr);
typedef CUresult (CUDAAPI *PFN)(void);
"""


def make_toolkit(root: Path, version: str = "12.8") -> Path:
    (root / "include").mkdir(parents=True)
    (root / "lib64").mkdir()
    for name in ("include/cuda_runtime.h", "include/cublas_v2.h", "lib64/libcublas.so"):
        (root / name).touch()
    script(root / "bin" / "nvcc", NVCC.format(version=version, here=root / "bin"))
    return root


@pytest.fixture
def bare_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host whose PATH holds an empty folder only, and that has no toolkit."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(toolkit, "DEFAULT_ROOT", tmp_path / "local" / "cuda")
    return tmp_path


def test_a_folder_and_cuda_path_are_taken_as_they_are(
    bare_host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_toolkit(bare_host / "cuda-12.8")
    assert toolkit.locate(str(root)) == toolkit.Toolkit(root, "12.8", (75, 100))
    monkeypatch.setenv("CUDA_PATH", str(root))
    assert toolkit.locate().codes == (75, 100)
    (root / "lib64" / "libcublas.so").unlink()
    with refused("TOOLKIT_INVALID", UsageError, "lib64/libcublas.so", hint="--toolkit pypi"):
        toolkit.locate()


def test_a_wrapper_on_path_leads_to_the_toolkit(bare_host: Path) -> None:
    root = make_toolkit(bare_host / "opt" / "cuda", "13.0")
    script(bare_host / "bin" / "nvcc", f'#!/bin/sh\nexec {root}/bin/nvcc "$@"\n')
    assert toolkit.locate() == toolkit.Toolkit(root, "13.0", (75, 100))


def test_the_usual_place_comes_last(bare_host: Path) -> None:
    root = make_toolkit(bare_host / "local" / "cuda")
    assert toolkit.locate().root == root


def test_no_toolkit_says_how_to_get_one(bare_host: Path) -> None:
    del bare_host
    with pytest.raises(UsageError, match="no CUDA toolkit") as missing:
        toolkit.locate()
    assert "--toolkit pypi" in missing.value.hint


def test_a_folder_that_is_none_names_what_is_missing(
    bare_host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_PATH", str(bare_host))
    with pytest.raises(UsageError, match=r"CUDA_PATH: .*bin/nvcc and include/cuda_runtime\.h"):
        toolkit.locate()


@pytest.mark.parametrize("text", ["#!/bin/sh\necho hello\n", "#!/no/such/interpreter\n"])
def test_an_nvcc_that_tells_no_version_is_refused(bare_host: Path, text: str) -> None:
    root = make_toolkit(bare_host / "cuda")
    script(root / "bin" / "nvcc", text)
    with refused("TOOLKIT_INVALID", UsageError):
        toolkit.locate(str(root))


def wheel(files: dict[str, str]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return packed.getvalue()


def wheels_on(index: PackageIndex, *contents: dict[str, str]) -> list[PackagePin]:
    return [
        PackagePin(version="1", **index.add(f"part-{n}", f"part-{n}.whl", wheel(files)))  # type: ignore[arg-type]
        for n, files in enumerate(contents)
    ]


NVCC_WHEEL = {
    "nvidia/cu13/bin/nvcc": NVCC.format(version="13.0", here="."),
    "nvidia/cu13/bin/nvcc.profile": "TOP = $(_HERE_)/..",
    "nvidia/cu13/nvvm/bin/cicc": "#!/bin/sh",
}
LIBRARY_WHEEL = {
    "nvidia/cu13/include/cuda.h": CUDA_H,
    "nvidia/cu13/lib/libcudart.so.13": "library",
}


def test_wheels_become_one_tree_that_nvcc_and_cmake_accept(index: PackageIndex) -> None:
    wheels = wheels_on(index, NVCC_WHEEL, LIBRARY_WHEEL)
    made = toolkit.from_wheels(wheels)
    asked = len(index.asked)
    assert toolkit.from_wheels(wheels) == made
    assert len(index.asked) == asked
    assert made.version == "13.0"
    assert (made.root / "lib64" / "libcudart.so").read_text("utf-8") == "library"
    assert (made.root / "nvvm" / "bin" / "cicc").stat().st_mode & 0o111
    stub = made.root / "lib" / "stubs" / "libcuda.so.1"
    assert ctypes.CDLL(str(stub)).cuMemAlloc_v2() == 34  # CUDA_ERROR_STUB_LIBRARY


def test_wheels_that_make_no_toolkit_leave_nothing(index: PackageIndex) -> None:
    with pytest.raises(SourceError, match="make no toolkit"):
        toolkit.from_wheels(wheels_on(index, LIBRARY_WHEEL))
    assert list(cache_folder("toolkits").iterdir()) == []


def test_the_driver_s_functions_are_read_from_its_header() -> None:
    names = ["cuInit", "cuMemAlloc", "cuMemAlloc_v2", "cuMemFree", "cuMemFree_v2"]
    assert toolkit.driver_functions(CUDA_H) == names


def test_the_stub_links_as_the_driver_and_needs_nothing(tmp_path: Path) -> None:
    toolkit.make_stub(["cuInit"], tmp_path / "libcuda.so")
    told = heard(["readelf", "-dW", str(tmp_path / "libcuda.so")], check=True).stdout
    assert "[libcuda.so.1]" in told
    assert "NEEDED" not in told


def test_no_compiler_no_stub(bare_host: Path) -> None:
    with pytest.raises(EngineError, match="no C compiler"):
        toolkit.make_stub(["cuInit"], bare_host / "libcuda.so")
