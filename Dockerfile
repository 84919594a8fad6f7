# Two images from one file:
#   docker build --target cpu  -t lorax-py:cpu .
#   docker build --target cuda -t lorax-py:cuda .
# The CUDA image needs nothing from the host but its driver, which the NVIDIA container toolkit
# brings in; torch's wheels hold the CUDA libraries.

FROM python:3.12.11-slim-bookworm AS base
ENV PATH=/opt/lorax/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
# Compilers stay: CPU kernels are built at the first start, Triton's launchers at the first use.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

FROM base AS source
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY proto proto
COPY router router
COPY shard shard
COPY launcher launcher
COPY bench bench

FROM source AS build-cpu
RUN python -m venv /opt/lorax \
    && pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu \
    && pip install --constraint constraints.txt ".[otel,s3]"

FROM source AS build-cuda
RUN python -m venv /opt/lorax \
    && pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130 \
    && pip install --constraint constraints.txt ".[otel,s3]"

FROM base AS runtime
RUN useradd --create-home --uid 10001 lorax \
    && mkdir --parents /data /adapters \
    && chown lorax:lorax /data /adapters
# Prepared models, compiled kernels, fetched adapters; downloads from the hub beside them.
ENV LORAX_CACHE=/data/lorax \
    HF_HOME=/data/hub \
    TRITON_CACHE_DIR=/data/triton
VOLUME ["/data", "/adapters"]
USER 10001
WORKDIR /home/lorax
EXPOSE 3000
# A large model takes minutes to load; until then nobody listens.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:3000/health', timeout=4)"]
# Children are ended in good order on this signal; give them --grace-period seconds.
STOPSIGNAL SIGTERM
# Out of a container's own loopback nothing comes: which ports are published decides who gets in.
ENTRYPOINT ["lorax-launcher", "--hostname", "0.0.0.0"]
CMD ["--port", "3000", "--json-output", "--adapter-local-root", "/adapters"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/lorax /opt/lorax

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/lorax /opt/lorax
