# Line cu130 where no registry is in reach: NVIDIA's wheels of CUDA 13.0, unpacked into one tree by
# farm/toolkit.py on the machine that has pip's index, on a Debian 12. Made by farm/base_image.py.
ARG BASE
FROM ${BASE}
COPY cuda /usr/local/cuda
# Programs in the container find cudart and cuBLAS as on NVIDIA's images; the stub stays unseen.
RUN echo /usr/local/cuda/lib64 > /etc/ld.so.conf.d/cuda.conf && ldconfig
ENV PATH=/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
