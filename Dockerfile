# Gradhelm in a container. CPU by default; for CUDA:  docker build --build-arg COMPUTE=cu128 -t gradhelm .
# Checked with hadolint; it has not been built by its authors yet, who had no container runtime at hand.
#
#   docker build -t gradhelm .
#   docker run -d --name gradhelm -p 127.0.0.1:8000:8000 -v gradhelm:/data --stop-timeout 300 gradhelm
#   docker exec gradhelm gradhelm doctor
#
# With a GPU: add --gpus all and -e GRADHELM_ENGINE__DEVICE=cuda to `docker run`.
#
# `docker stop` sends SIGTERM: running jobs write a checkpoint and go on from it after the next start. They get
# GRADHELM_JOBS__STOP_SECONDS for that; --stop-timeout must be a little more, and the grace time of your longest job (shown
# on the job itself) less.

FROM python:3.11-slim-bookworm AS build
# What torch is made for: cpu, or a CUDA version such as cu128. The other packages are the same.
ARG COMPUTE=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/gradhelm
COPY constraints.txt ./
RUN sed -n 's/^torch==\([0-9.]*\).*/torch==\1/p' constraints.txt > /tmp/torch.txt \
    && /opt/gradhelm/bin/pip install --index-url "https://download.pytorch.org/whl/${COMPUTE}" -r /tmp/torch.txt
COPY pyproject.toml README.md LICENSE ./
COPY core core
COPY trainers trainers
COPY steering steering
COPY service service
RUN sed '/^torch==/d' constraints.txt > /tmp/others.txt \
    && /opt/gradhelm/bin/pip install -c /tmp/others.txt ".[postgres]"

FROM python:3.11-slim-bookworm
# libgomp is torch's OpenMP; tini reaps what runs leave behind and passes SIGTERM on.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --home-dir /data --shell /usr/sbin/nologin gradhelm \
    && chmod 0700 /data
COPY --from=build /opt/gradhelm /opt/gradhelm
ENV PATH=/opt/gradhelm/bin:$PATH \
    GRADHELM_HOME=/data \
    GRADHELM_JOBS__END_WITH_SERVER=true \
    GRADHELM_JOBS__STOP_SECONDS=240 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    OMP_WAIT_POLICY=PASSIVE \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /data
VOLUME ["/data"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["tini", "--"]
CMD ["gradhelm", "serve", "--host", "0.0.0.0", "--port", "8000"]
