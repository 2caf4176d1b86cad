# What a build container needs, on top of any devel image with apt: NVIDIA's ubuntu22.04 ones, or
# the ones that `invoke base-image` makes. Made by farm/engines/docker.py with docker's classic
# builder: no RUN --mount, no heredoc.
ARG BASE
FROM ${BASE}

# Only what is missing is installed, so an image that has all of it needs no network.
RUN set -eu; \
    missing=""; \
    for need in g++:g++ cmake:cmake ninja:ninja-build ccache:ccache git:git ld:binutils; do \
        command -v "${need%%:*}" > /dev/null || missing="$missing ${need#*:}"; \
    done; \
    [ -e /etc/ssl/certs/ca-certificates.crt ] || missing="$missing ca-certificates"; \
    if [ -n "$missing" ]; then \
        export DEBIAN_FRONTEND=noninteractive; \
        apt-get update; \
        apt-get install -y --no-install-recommends $missing; \
        apt-get clean; \
        rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log; \
    fi; \
    for tool in g++ cmake ninja ccache git ld; do "$tool" --version | head -n 1; done
