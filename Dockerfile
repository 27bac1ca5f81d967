# syntax=docker/dockerfile:1
# docker build -t dpctl .
# docker run --gpus all --user "$(id -u):$(id -g)" -e HOME=/tmp -v "$PWD:/work" dpctl run --out demo

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

FROM nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 --shell /bin/bash dpctl \
    && install --directory --owner=dpctl --group=dpctl /opt/dpctl /work

USER 10001
# torch by itself and first: the largest layer is kept while dpctl changes.
COPY --chown=dpctl:dpctl constraints.txt /opt/dpctl/
RUN python3 -m venv /opt/dpctl/venv \
    && /opt/dpctl/venv/bin/pip install --no-cache-dir --constraint /opt/dpctl/constraints.txt torch
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    wheel=$(echo /wheels/*.whl) \
    && /opt/dpctl/venv/bin/pip install --no-cache-dir --constraint /opt/dpctl/constraints.txt "${wheel}[gpu,text]"

ENV PATH=/opt/dpctl/venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["dpctl"]
CMD ["--help"]
