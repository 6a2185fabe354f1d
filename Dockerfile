# docker build -t mfdetr-cache . && mkdir out
# docker run --rm -v "$PWD/out:/out" --user "$(id -u)" mfdetr-cache
# docker run --rm --gpus all ... mfdetr-cache fit --dataset /data --weights /data/detector.pth --out /out/run
FROM python:3.12-slim

# Triton compiles its kernels' launchers with a C compiler when a GPU is first used.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY mfdetr_cache mfdetr_cache
COPY pipelines pipelines
COPY cli cli
RUN pip install --no-cache-dir .

# Any user may run it: compiled kernels and caches of libraries go where all may write.
ENV HOME=/tmp
USER 1000
WORKDIR /out
ENTRYPOINT ["mfdetr"]
CMD ["demo", "--out", "/out/demo"]
