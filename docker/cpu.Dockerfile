# syntax=docker/dockerfile:1
# STELLAR on a CPU, see docs/docker.md.
FROM python:3.12-slim

ARG EXTRAS=eval,search,stream,export
WORKDIR /opt/stellar

# The CPU's torch and torchvision, a pair without CUDA libraries, in a layer of their own.
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu torch torchvision

COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt ".[${EXTRAS}]"

# Whatever user it runs as, there is a home for caches, and a name, which torch asks for.
RUN useradd --create-home --uid 1000 stellar \
    && chmod 1777 /home/stellar \
    && install --directory --owner stellar --mode 1777 /data
ENV HOME=/home/stellar USER=stellar
USER 1000
WORKDIR /data
VOLUME /data
ENTRYPOINT ["stellar"]
CMD ["--help"]
