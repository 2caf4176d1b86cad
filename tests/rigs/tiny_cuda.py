"""The tiny llama.cpp with real CUDA units: an arch set of it is compiled in seconds, with nvcc."""

import shutil
from pathlib import Path

TINY = Path(__file__).parent / "tiny_llama"
NVCC = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime")
"""The packages of NVIDIA's toolkit that compile; cuBLAS (400 MB) is not among them."""

_CMAKE = """
if(GGML_CUDA)
    enable_language(CUDA)
    file(GLOB units ggml/src/ggml-cuda/*.cu)
    add_library(ggml-cuda MODULE ${units})
    add_dependencies(llama-server ggml-cuda)
endif()
"""
_UNIT = """// The kernel is another one for each architecture, and the host code tells where it lay.
__device__ static int kernel_arch() {
#ifdef __CUDA_ARCH__
    return __CUDA_ARCH__;
#else
    return 0;
#endif
}
__global__ void kernel_NAME(float * x, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) { x[i] = __fsqrt_rn(x[i]) * kernel_arch() + NUMBER; }
}
extern "C" const char * where_NAME(float * x, int n) {
    kernel_NAME<<<1, 32>>>(x, n);
    return __FILE__;
}
"""


def tree(folder: Path, units: tuple[str, ...]) -> Path:
    """Make a source tree with these CUDA units."""
    made = Path(shutil.copytree(TINY, folder / "llama.cpp"))
    cuda = made / "ggml" / "src" / "ggml-cuda"
    cuda.mkdir(parents=True)
    for number, name in enumerate(units):
        unit(made, name).write_text(
            _UNIT.replace("NAME", name).replace("NUMBER", str(number)), "utf-8"
        )
    with (made / "CMakeLists.txt").open("a", encoding="utf-8") as file:
        file.write(_CMAKE)
    return made


def unit(made: Path, name: str) -> Path:
    """Return a unit's file."""
    return made / "ggml" / "src" / "ggml-cuda" / f"{name}.cu"
