# syntax=docker/dockerfile:1
# docker build -t dpctl .                                    # ONNX Runtime with CUDA, TensorRT
# docker build -t dpctl --build-arg EXTRAS=gpu,rtx,text .    # TensorRT-RTX as well
# docker run --gpus all dpctl                                # what this machine can do
# docker run --gpus all --user "$(id -u):$(id -g)" -e HOME=/tmp -v "$PWD:/work" dpctl run --out demo
# Which versions belong together, and where that is written: docs/docker.md.

FROM ubuntu:24.04 AS wheel
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python3 -m venv /build \
    && /build/bin/pip install --no-cache-dir --constraint constraints.txt hatchling \
    && /build/bin/python -m hatchling build --target wheel --directory /wheels

# `base` has the CUDA runtime alone: cuBLAS, cuDNN and the rest come once, with torch.
FROM nvidia/cuda:13.0.3-base-ubuntu24.04
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 --shell /bin/bash dpctl \
    && install --directory --owner=dpctl --group=dpctl /work \
    && python3 -m venv /opt/dpctl/venv

# What is large and changes seldom comes first, in layers of its own: they are kept while dpctl changes.
COPY constraints.txt constraints-gpu.txt /opt/dpctl/
WORKDIR /opt/dpctl
RUN venv/bin/pip install --no-cache-dir --constraint constraints.txt --constraint constraints-gpu.txt torch
# hadolint ignore=DL3059
RUN venv/bin/pip install --no-cache-dir --constraint constraints.txt --constraint constraints-gpu.txt tensorrt
ARG EXTRAS=gpu,text
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    wheel=$(echo /wheels/*.whl) \
    && venv/bin/pip install --no-cache-dir --constraint constraints.txt --constraint constraints-gpu.txt "${wheel}[${EXTRAS}]"

USER 10001
ENV PATH=/opt/dpctl/venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["dpctl"]
CMD ["doctor"]
