"""An NVIDIA driver without a GPU: a small NVML in C that answers, refuses and hangs when told."""

import shutil
import subprocess
from pathlib import Path

SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int shut = 0;

/* FAKE_NVML: "FUNCTION GPU CODE", what is refused, of every GPU with -1; "sleep" hangs in
   nvmlInit_v2. FAKE_NVML_NAME: the name of the GPUs. */
static int answer(const char *function, int gpu) {
    const char *told = getenv("FAKE_NVML");
    char name[64];
    int which, code;
    if (told && sscanf(told, "%63s %d %d", name, &which, &code) == 3)
        if (!strcmp(name, function) && (which == gpu || which < 0)) return code;
    return 0;
}
static int text(const char *function, int gpu, const char *words, char *buffer, unsigned length) {
    snprintf(buffer, length, "%s", words);
    return answer(function, gpu);
}
static int number(void *handle) { return (int)(long)handle - 1; }

int nvmlInit_v2(void) {
    const char *told = getenv("FAKE_NVML");
    if (told && !strcmp(told, "sleep")) sleep(60);
    return answer("nvmlInit_v2", 0);
}
int nvmlShutdown(void) { shut++; return 0; }
const char *nvmlErrorString(int code) {
    switch (code) {
        case 4: return "Insufficient Permissions";
        case 9: return "Driver Not Loaded";
        case 15: return "GPU is lost";
        case 18: return "Driver/library version mismatch";
        default: return "Unknown Error";
    }
}
int nvmlSystemGetDriverVersion(char *buffer, unsigned length) {
    return text("nvmlSystemGetDriverVersion", 0, "580.159.03", buffer, length);
}
int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = 2;
    return answer("nvmlDeviceGetCount_v2", 0);
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    *handle = (void *)(long)(index + 1);
    return answer("nvmlDeviceGetHandleByIndex_v2", index);
}
int nvmlDeviceGetName(void *handle, char *buffer, unsigned length) {
    const char *name = getenv("FAKE_NVML_NAME");
    return text("nvmlDeviceGetName", number(handle), name ? name : "NVIDIA H200", buffer, length);
}
int nvmlDeviceGetUUID(void *handle, char *buffer, unsigned length) {
    const char *uuid = number(handle) ? "GPU-b" : "GPU-a";
    return text("nvmlDeviceGetUUID", number(handle), uuid, buffer, length);
}
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory) {
    memory[0] = 150000000000; memory[1] = 149000000000; memory[2] = 1000000000;
    return answer("nvmlDeviceGetMemoryInfo", number(handle));
}
#ifndef OLD
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    *major = 9; *minor = 0;
    return answer("nvmlDeviceGetCudaComputeCapability", number(handle));
}
#endif
"""


def compiled(folder: Path, *options: str) -> Path:
    """Return a folder with a driver: libnvidia-ml.so.1, and a libcuda.so.1 that does nothing."""
    folder.mkdir(exist_ok=True)
    (folder / "nvml.c").write_text(SOURCE)
    library = folder / "libnvidia-ml.so.1"
    command = ["gcc", "-shared", "-fPIC", *options, "-o", str(library), str(folder / "nvml.c")]
    subprocess.run(command, check=True)
    shutil.copy(library, folder / "libcuda.so.1")
    return folder
