# `onerec serve` in a container. Written without a machine to build it on: it was not built.
#
#   docker build -t onerec .
#   docker build -t onerec-cuda --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 .
#   docker run -p 8000:8000 -e ONEREC_SERVE_TOKEN -v $PWD/outputs/mymodel:/model:ro onerec --repo /model
ARG BASE=python:3.12-slim
FROM ${BASE}
# pip reads these: an index with CPU builds of torch makes a smaller image
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN command -v python3 && python3 -m venv --help > /dev/null \
    || (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*)
RUN python3 -m venv /home/venv
ENV PATH=/home/venv/bin:$PATH HF_HUB_DISABLE_TELEMETRY=1
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY onerec_hf onerec_hf
RUN pip install --no-cache-dir -c constraints.txt '.[serve]'
RUN useradd --create-home onerec
USER onerec
WORKDIR /home/onerec
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready')"]
ENTRYPOINT ["onerec", "serve", "--host", "0.0.0.0"]
