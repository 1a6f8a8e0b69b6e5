# A hospital's two containers, guard and courier, from one image: `cohortium site guard|courier /site`.
#
#   docker build --file docker/client.Dockerfile --tag cohortium/client:0.2.0 .
#
# The build arguments and stages are those of server.Dockerfile, so that a builder's cache serves both; this image
# adds what reads hospitals' databases and key rings. docs/containers.md says the rest.
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
RUN sh /src/docker/install.sh wheel sql,keyring

FROM python AS dependencies
# pip comes from the stage `tools` and is gone after each step.
RUN --mount=type=bind,from=tools,source=/python/build,target=/python/build \
    --mount=type=bind,from=tools,source=/src,target=/src \
    --mount=type=bind,source=docker/wheels,target=/wheels --mount=type=secret,id=pip,target=/etc/pip.conf \
    sh /src/docker/install.sh dependencies

FROM dependencies
LABEL org.opencontainers.image.title="Cohortium site" \
      org.opencontainers.image.description="Guard and courier: computes on a hospital's records, lets noised sums out" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# Two users who share nothing but the socket's directory, whose group is the courier's (`app`). What lies below /site is
# mounted, and only what a container needs of it: in the courier's there is no /site/guard.
RUN --mount=type=bind,from=package,source=/python/build,target=/python/build \
    --mount=type=bind,from=package,source=/python/package,target=/python/package \
    --mount=type=bind,from=package,source=/src,target=/src \
    --mount=type=bind,source=docker/wheels,target=/wheels --mount=type=secret,id=pip,target=/etc/pip.conf \
    sh /src/docker/install.sh package \
    && groupadd --gid 49998 guard && groupadd --gid 49999 app \
    && useradd --uid 49998 --gid guard --no-create-home --home-dir /app --shell /usr/sbin/nologin guard \
    && useradd --uid 49999 --gid app --no-create-home --home-dir /app --shell /usr/sbin/nologin app \
    && install -d -m 0755 /app /site /data /invitations
COPY docker/healthcheck.py docker/hospital_it.py /app/
# HOME is the tmpfs: the root file system is read-only. Flower tells nobody that it runs, and looks for no update.
ENV PATH=/python/venv/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1
WORKDIR /app
USER 49999:49999
# Both containers are well while the guard answers on its socket; the compose files ask the courier for more.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "/app/healthcheck.py", "socket", "/site/run/guard.sock"]
ENTRYPOINT ["cohortium"]
CMD ["site", "--help"]
