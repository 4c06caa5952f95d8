# Motet on a CPU.   docker build -t motet .
#                   docker run -p 8000:8000 motet                                        the embedded model
#                   docker run -p 8000:8000 -v /models:/models:ro motet /models/NAME --adapters-dir /models/adapters
#
# Two stages: the first one compiles our kernels and installs into a virtual environment, the second carries that environment.
# The usual build of torch brings gigabytes of CUDA: --build-arg TORCH_INDEX=… names the index with the builds for CPUs.

FROM python:3.12-slim-trixie AS build
ARG TORCH_INDEX=
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/motet
ENV PATH=/opt/motet/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN pip install -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY README.md LICENSE ./
COPY server server
COPY adapters adapters
COPY benchmarks benchmarks
RUN pip install -c constraints.txt '.[bench,s3]'

FROM python:3.12-slim-trixie
# libgomp: our kernels' threads.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 motet
COPY --from=build /opt/motet /opt/motet
ENV PATH=/opt/motet/bin:$PATH PYTHONUNBUFFERED=1 MOTET_HOST=0.0.0.0 MOTET_PORT=8000
USER motet
WORKDIR /home/motet
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"MOTET_PORT\"]}/health', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["motet", "serve"]
