# Executors. From the root of the repository:
#   docker build -f charts/images/worker.Dockerfile --target cpu  -t deepflow/worker-cpu:0.1.0 .
#   docker build -f charts/images/worker.Dockerfile --target cuda -t deepflow/worker-cuda:0.1.0 .
#   docker build -f charts/images/worker.Dockerfile --target npu  -t deepflow/worker-npu:0.1.0 \
#     --build-arg CANN=quay.io/ascend/cann:8.2.rc1-910b-ubuntu22.04-py3.11 --build-arg TORCH=2.7.1 --build-arg TORCH_NPU=2.7.1 .
#   docker build -f charts/images/worker.Dockerfile --target vllm -t deepflow/worker-vllm:0.1.0 .
# 910C takes the CANN image of its own (…-a3-…). pip stays: the fetcher of `pypi://` models runs it.

ARG CANN=quay.io/ascend/cann:8.2.rc1-910b-ubuntu22.04-py3.11
ARG VLLM=vllm/vllm-openai:v0.32.0

FROM debian:12-slim AS sources
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE setup.py ./
COPY charts/images/requirements.py charts/images/
COPY protos protos
COPY kvtransfer kvtransfer
COPY flowserve flowserve
COPY controlplane controlplane

FROM debian:12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv g++ python3-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/deepflow
COPY --from=sources /src /src
WORKDIR /src

# -- cpu: torch without CUDA, the compiled step; no shell, user 65532 ---------------------------------
FROM build AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN /opt/deepflow/bin/pip install --no-cache-dir -c constraints.txt --extra-index-url "$TORCH_INDEX" . \
    && find /opt/deepflow -name '__pycache__' -prune -exec rm -rf {} +

FROM gcr.io/distroless/python3-debian12:nonroot AS cpu
COPY --from=build-cpu /opt/deepflow /opt/deepflow
ENV PATH=/opt/deepflow/bin:/usr/bin PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT []
CMD ["python", "-P", "-m", "flowserve.shell", "--help"]

# -- cuda: torch of the package index, which brings CUDA's libraries; the host brings the driver --------
FROM build AS build-cuda
RUN /opt/deepflow/bin/pip install --no-cache-dir -c constraints.txt . \
    && find /opt/deepflow -name '__pycache__' -prune -exec rm -rf {} +

# Triton compiles its kernels' launchers at run time: gcc and Python's headers stay.
FROM debian:12-slim AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /opt/deepflow /opt/deepflow
ENV PATH=/opt/deepflow/bin:/usr/bin:/bin PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
CMD ["python", "-P", "-m", "flowserve.shell", "--help"]

# -- npu: on Huawei's CANN image, whose torch-npu asks for its own torch ---------------------------------
FROM ${CANN} AS npu
ARG TORCH=2.7.1
ARG TORCH_NPU=2.7.1
USER root
COPY --from=sources /src /src
WORKDIR /src
RUN grep -v '^torch==' constraints.txt > /tmp/constraints.txt \
    && python3 charts/images/requirements.py control > /tmp/requirements.txt \
    && python3 -m pip install --no-cache-dir -c /tmp/constraints.txt -r /tmp/requirements.txt \
         "torch==${TORCH}" "torch-npu==${TORCH_NPU}" \
    && python3 -m pip install --no-cache-dir --no-deps . \
    && ln -sf "$(command -v python3)" /usr/local/bin/python \
    && rm -rf /src /tmp/requirements.txt /tmp/constraints.txt
WORKDIR /
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 65532:65532
CMD ["python", "-P", "-m", "flowserve.shell", "--help"]

# -- vllm: on vLLM's own image, whose torch and CUDA stay as they are; pools with `engine: vllm` -----------
FROM ${VLLM} AS vllm
USER root
COPY --from=sources /src /src
WORKDIR /src
RUN python3 charts/images/requirements.py control > /tmp/requirements.txt \
    && python3 -m pip install --no-cache-dir -r /tmp/requirements.txt \
    && python3 -m pip install --no-cache-dir --no-deps . \
    && ln -sf "$(command -v python3)" /usr/local/bin/python \
    && rm -rf /src /tmp/requirements.txt
WORKDIR /
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp VLLM_NO_USAGE_STATS=1
USER 65532:65532
ENTRYPOINT []
CMD ["python", "-P", "-m", "flowserve.shell", "--help"]
