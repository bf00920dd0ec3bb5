# Talkie's image: the binary `handler` and what it loads; no Python and no weights.
#
#   docker build --build-arg VARIANT=cpu  -t talkie:cpu  .
#   docker build --build-arg VARIANT=cuda -t talkie:cuda .
#
# Base images are arguments so that a build can name them by digest, as .github/workflows/deploy.yml does; by hand the
# tags do. `scripts/check-dockerfile.sh` lints this file, `scripts/prove-image.sh` runs its steps without an engine.
ARG RUST_IMAGE=rust:1.95-slim-bookworm
ARG DEBIAN_IMAGE=debian:bookworm-slim
ARG VARIANT=cpu

FROM ${RUST_IMAGE} AS source
# OpenH264 and FDK-AAC are compiled from the C++ sources that their crates ship. The certificates are for the image.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .

FROM source AS build-cpu
RUN cargo build --release --locked --package handler --bin handler \
    && install -D --strip target/release/handler /out/usr/local/bin/handler

# scripts/build-cuda.sh takes the toolchain from PyPI's wheels and leaves target/cuda/handler, which starts without any
# CUDA library, and target/cuda/libraries.txt: for each library that is loaded later a line
# `soname package==version --hash=sha256:…`. Only these come into the image: cuBLAS, cuBLASLt and cuRAND, 730 MB
# together; no cuDNN. libcuda is the host's.
FROM source AS build-cuda
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-pip \
    && rm -rf /var/lib/apt/lists/*
RUN scripts/build-cuda.sh \
    && install -D --strip target/cuda/handler /out/usr/local/bin/handler
RUN cut -d ' ' -f 2- target/cuda/libraries.txt | sort -u >/wheels.txt \
    && python3 -m pip download --no-deps --only-binary=:all: --require-hashes --dest /wheels -r /wheels.txt \
    && for wheel in /wheels/*.whl; do python3 -m zipfile -e "$wheel" /wheels/x; done \
    && cut -d ' ' -f 1 target/cuda/libraries.txt | while read -r soname; do \
        install -D -m 644 -t /out/usr/lib/x86_64-linux-gnu "$(find /wheels/x -name "$soname" -print -quit)"; \
      done

# hadolint ignore=DL3006
FROM build-${VARIANT} AS build

FROM ${DEBIAN_IMAGE} AS final
# The C++ runtime is for the encoders; the user owns nothing but its home.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libstdc++6 \
    && rm -rf /var/lib/apt/lists/* /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log \
    && useradd --system --uid 10001 --user-group --create-home --home-dir /var/lib/talkie --shell /usr/sbin/nologin talkie
# Certificates alone: Debian's package would bring OpenSSL along.
COPY --from=source /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY LICENSE docs/THIRD-PARTY.md /usr/share/doc/talkie/
COPY --from=build /out /

ARG VERSION=0.0.0
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="Talkie" \
      org.opencontainers.image.description="A portrait and a voice in, a lip-synced talking video out" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"

# What NVIDIA's container toolkit mounts where there is a GPU.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HOME=/var/lib/talkie
USER 10001:10001
WORKDIR /var/lib/talkie
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["/usr/local/bin/handler", "doctor", "--quick"]
# Without a verb it is what its surroundings want: RunPod's worker, an AWS Lambda function, or the gateway.
ENTRYPOINT ["/usr/local/bin/handler"]
