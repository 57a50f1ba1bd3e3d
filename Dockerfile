# CleanVLA without a GPU: docker build -t cleanvla . && docker run --rm cleanvla
# linux/amd64 on ARM too, where it is emulated: SAPIEN and mplib have no wheels for Linux on ARM
FROM --platform=linux/amd64 python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /cleanvla

# The environment, from what it depends on alone: a change of the code does not make it again
COPY Makefile pyproject.toml README.md LICENSE ./
COPY scripts/setup.sh scripts/constraints.txt scripts/renderer.py scripts/
RUN mkdir -p common/model common/run common/simulation demonstrations tiny \
    && PIP_NO_CACHE_DIR=1 make setup && rm -rf /var/lib/apt/lists/*

COPY . .
RUN useradd --create-home user && mkdir runs demos && chown user . runs demos
USER user
CMD ["make", "demo"]
