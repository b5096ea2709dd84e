# docker build -t loraplex .                              the CUDA image: vLLM's own, plus this server
# docker build -t loraplex:cpu --build-arg VARIANT=cpu .  without a GPU, for trying it out
ARG VARIANT=cuda

FROM vllm/vllm-openai:v0.32.0 AS cuda
COPY config/requirements-cuda.txt /tmp/
RUN python3 -m pip install --no-cache-dir --no-deps -r /tmp/requirements-cuda.txt

FROM python:3.11-slim AS cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libnuma1 make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /tmp/install
COPY Makefile ./
COPY config/requirements-torch.txt config/requirements-cpu.txt config/
RUN make runtime PIP="python3 -m pip --no-cache-dir --disable-pip-version-check"
# GiB; without it vLLM takes most of the machine's memory. Wins over kv_cache_memory_bytes.
ENV VLLM_CPU_KVCACHE_SPACE=4

# hadolint ignore=DL3006
FROM ${VARIANT}
RUN useradd --uid 10001 --create-home loraplex && install -d -o loraplex -g loraplex /data
WORKDIR /app
COPY adapters adapters
COPY config config
COPY server server
# By number, so that an orchestrator can see that it is not root.
USER 10001
ENV LORAPLEX_HOST=0.0.0.0 \
    LORAPLEX_PORT=8000 \
    LORAPLEX_DATA_DIR=/data \
    HF_HUB_OFFLINE=1 \
    PYTHONUNBUFFERED=1
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import os, httpx; httpx.get(f'http://127.0.0.1:{os.environ[\"LORAPLEX_PORT\"]}/health').raise_for_status()"]
ENTRYPOINT ["python3", "-m", "server"]
CMD ["serve"]
