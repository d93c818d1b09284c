# syntax=docker/dockerfile:1
# STELLAR on NVIDIA GPUs, see docs/docker.md. The CUDA libraries come with PyPI's torch, of
# the version that constraints.txt names; the host has the driver.
FROM python:3.12-slim

# Compiled blocks are built with a C compiler when a run starts.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ARG EXTRAS=eval,search,stream,export
WORKDIR /opt/stellar

# In a layer of their own: gigabytes that change less than the code.
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt torch torchvision

COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt ".[${EXTRAS}]"

# Whatever user it runs as, there is a home for caches, and a name, which torch asks for.
RUN useradd --create-home --uid 1000 stellar \
    && chmod 1777 /home/stellar \
    && install --directory --owner stellar --mode 1777 /data
ENV HOME=/home/stellar USER=stellar NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /data
VOLUME /data
ENTRYPOINT ["stellar"]
CMD ["--help"]
