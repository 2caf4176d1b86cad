# Line cu124 where no registry is in reach: CUDA 12.4.1 out of Debian 13's packages (component
# non-free), on a Debian 12. Made by farm/base_image.py.
#
# Debian 13's glibc 2.41 would raise the floor of everything that is built, so nothing of Debian 13
# is installed: NVIDIA's programs and libraries in these packages need no glibc newer than Debian
# 12's, and are put into NVIDIA's own layout under /usr/local/cuda, where nvcc finds its parts by
# itself and CMake finds the rest. Debian's own layout (/etc/nvcc.profile, a g++ wrapper that asks
# for g++-13) is left behind: the host compiler is Debian 12's g++ 12, which CUDA 12.4 accepts.
ARG BASE
FROM ${BASE}

# One step, so that neither 1.3 GB of packages nor what is not needed of them stays in a layer.
# apt checks Debian 13's signatures with the keys that Debian 12 carries. Of 2.5 GB in
# nvidia-cuda-dev, four fifths are static libraries: they are never unpacked.
RUN set -eu; \
    cuda=/usr/local/cuda; list=/etc/apt/sources.list.d/trixie.list; \
    sed -n 's/ bookworm main$/ trixie main non-free/p' /etc/apt/sources.list > "$list"; \
    apt-get update; \
    mkdir /debs /parts; cd /debs; \
    apt-get -o APT::Sandbox::User=root download -t trixie \
        nvidia-cuda-toolkit nvidia-cuda-dev libcudart12 libcublas12 libcublaslt12 \
        libthrust-dev libcub-dev libcu++-dev; \
    for deb in *.deb; do \
        echo "unpacking $deb"; \
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C /parts \
            --exclude='*cublas*_static.a' --exclude='*libcufft*' --exclude='*libcurand*' \
            --exclude='*libcuso*' --exclude='*libcusparse*' --exclude='*libnpp*' \
            --exclude='*libnv*' --exclude='*libculibos*' --exclude='*compute-sanitizer*'; \
    done; \
    mkdir -p "$cuda/bin" "$cuda/doc" "$cuda/nvvm/bin" "$cuda/lib64/stubs"; \
    cd /parts/usr; \
    mv include "$cuda/"; \
    cp share/doc/nvidia-cuda-toolkit/copyright "$cuda/doc/"; \
    (cd bin && mv __nvcc_device_query bin2c cudafe++ cuobjdump fatbinary nvlink ptxas "$cuda/bin/"); \
    (cd lib/nvidia-cuda-toolkit && mv bin/nvcc bin/crt "$cuda/bin/" \
        && mv bin/cicc "$cuda/nvvm/bin/" && mv libdevice "$cuda/nvvm/"); \
    (cd lib/x86_64-linux-gnu && mv libcudart.so* libcudart_static.a libcudadevrt.a \
        libcublas.so* libcublasLt.so* "$cuda/lib64/" && mv stubs/libcuda.so "$cuda/lib64/stubs/"); \
    ln -s libcuda.so "$cuda/lib64/stubs/libcuda.so.1"; \
    printf '%s\n' \
        'TOP = $(_HERE_)/..' \
        'CICC_PATH = $(TOP)/nvvm/bin' \
        'NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice' \
        'LD_LIBRARY_PATH += $(TOP)/lib64:' \
        'PATH += $(CICC_PATH):$(_HERE_):' \
        'INCLUDES += "-I$(TOP)/include" $(_SPACE_)' \
        'LIBRARIES =+ $(_SPACE_) "-L$(TOP)/lib64/stubs" "-L$(TOP)/lib64"' \
        > "$cuda/bin/nvcc.profile"; \
    rm -rf /debs /parts "$list" /var/lib/apt/lists/* /var/cache/apt/*.bin; \
    "$cuda/bin/nvcc" --version | grep 'release 12\.4'

# Programs in the container find cudart and cuBLAS as on NVIDIA's images; the stub stays unseen.
RUN echo /usr/local/cuda/lib64 > /etc/ld.so.conf.d/cuda.conf && ldconfig
ENV PATH=/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
