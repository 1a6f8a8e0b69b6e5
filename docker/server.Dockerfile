# The coordinator: `cohortium serve /consortium`, and every other command of the coordinator.
#
#   docker build --file docker/server.Dockerfile --tag cohortium/server:0.2.0 .
#
# BASE       any Debian or Ubuntu with Python 3.11 or newer, or one that apt can give it to. Pin yours by digest.
# PIP_EXTRA  more options for pip, e.g. an index of CPU builds of torch. Only the build stage sees it.
# Private index: put its pip.conf beside the build and add `--secret id=pip,src=pip.conf`: a secret is in no layer.
# Offline: run docker/wheelhouse.sh first. docs/containers.md says the rest.
ARG BASE=debian:bookworm-20250520-slim

FROM ${BASE} AS python
# A base that has Python is left alone, so that an offline build asks nobody.
# No version is pinned (DL3008): Debian offers one in a release and takes away those with known holes.
# hadolint ignore=DL3008
RUN if ! python3 -c 'import ssl, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
      apt-get update && apt-get upgrade -y --no-install-recommends \
      && apt-get install -y --no-install-recommends ca-certificates python3 && rm -rf /var/lib/apt/lists/*; \
    fi

FROM python AS tools
# hadolint ignore=DL3008
RUN if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then \
      apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*; \
    fi
ARG PIP_INDEX_URL
ARG PIP_EXTRA=""
COPY pyproject.toml constraints.txt /src/
COPY docker/install.sh /src/docker/
RUN --mount=type=bind,source=docker/wheels,target=/wheels --mount=type=secret,id=pip,target=/etc/pip.conf \
    sh /src/docker/install.sh tools

FROM tools AS package
COPY README.md LICENSE /src/
COPY cohortium /src/cohortium
COPY common /src/common
COPY strategies /src/strategies
COPY client /src/client
COPY server /src/server
COPY simulations /src/simulations
RUN sh /src/docker/install.sh wheel

FROM python AS dependencies
# pip comes from the stage `tools` and is gone after each step.
RUN --mount=type=bind,from=tools,source=/python/build,target=/python/build \
    --mount=type=bind,from=tools,source=/src,target=/src \
    --mount=type=bind,source=docker/wheels,target=/wheels --mount=type=secret,id=pip,target=/etc/pip.conf \
    sh /src/docker/install.sh dependencies

FROM dependencies
LABEL org.opencontainers.image.title="Cohortium coordinator" \
      org.opencontainers.image.description="Runs studies over hospitals that share no patient record" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN --mount=type=bind,from=package,source=/python/build,target=/python/build \
    --mount=type=bind,from=package,source=/python/package,target=/python/package \
    --mount=type=bind,from=package,source=/src,target=/src \
    --mount=type=bind,source=docker/wheels,target=/wheels --mount=type=secret,id=pip,target=/etc/pip.conf \
    sh /src/docker/install.sh package \
    && groupadd --gid 49999 app \
    && useradd --uid 49999 --gid 49999 --no-create-home --home-dir /app --shell /usr/sbin/nologin app \
    && install -d -m 0755 /app /invitations && install -d -m 0700 -o 49999 -g 49999 /consortium
COPY docker/healthcheck.py /app/
# HOME is the tmpfs: the root file system is read-only. Flower tells nobody that it runs, and looks for no update.
ENV PATH=/python/venv/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1
# Service, enrolment and Fleet paths, all TLS. Flower's own port stays on the loopback interface.
EXPOSE 7441 7442 7443
WORKDIR /app
USER 49999:49999
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "/app/healthcheck.py", "ports", "/consortium/consortium.toml", "service_port", "enrol_port", "fleet_port"]
ENTRYPOINT ["cohortium"]
CMD ["serve", "/consortium"]
