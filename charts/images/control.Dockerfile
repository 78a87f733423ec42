# Gateway, operator, Valkey, hooks: everything but the engine's torch. From the root of the repository:
#   docker build -f charts/images/control.Dockerfile -t deepflow/control:0.1.0 .

FROM debian:12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
# The interpreter of the final image lies under the same path, so the environment's links hold there.
RUN python3 -m venv /opt/deepflow
WORKDIR /src
COPY pyproject.toml constraints.txt ./
COPY charts/images/requirements.py charts/images/
RUN /opt/deepflow/bin/python charts/images/requirements.py control > /tmp/requirements.txt \
    && /opt/deepflow/bin/pip install --no-cache-dir -c constraints.txt -r /tmp/requirements.txt
COPY README.md LICENSE setup.py ./
COPY protos protos
COPY kvtransfer kvtransfer
COPY flowserve flowserve
COPY controlplane controlplane
RUN /opt/deepflow/bin/pip install --no-cache-dir -c constraints.txt --no-deps . \
    && /opt/deepflow/bin/pip uninstall -y pip \
    && find /opt/deepflow -name '__pycache__' -prune -exec rm -rf {} +

# No shell and no package manager; runs as user 65532.
FROM gcr.io/distroless/python3-debian12:nonroot
COPY --from=build /opt/deepflow /opt/deepflow
ENV PATH=/opt/deepflow/bin:/usr/bin PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT []
CMD ["deepflow", "--help"]
