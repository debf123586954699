# syntax=docker/dockerfile:1
# An example of an image, not built in CI: docs/installing.md. PyTorch brings CUDA's libraries
# itself, so the base is NVIDIA's smallest; the driver comes from the host.
ARG CUDA=13.0.2
FROM nvidia/cuda:${CUDA}-base-ubuntu24.04

RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt/lists,sharing=locked \
    apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv

# .cache too: pip's mount below would leave it to root, and Hugging Face's hub writes there.
RUN useradd --create-home --uid 10001 user \
    && install --directory --owner=user /opt/mlm-eval /work /home/user/.cache
USER user
ENV PATH=/opt/mlm-eval/bin:$PATH
RUN python3 -m venv /opt/mlm-eval

# With the tested versions. pip's cache outlives the build: a change of the code downloads nothing.
COPY --chown=user . /tmp/source
RUN --mount=type=cache,target=/home/user/.cache/pip,uid=10001 \
    pip install --constraint /tmp/source/constraints.txt '/tmp/source[all]'

WORKDIR /work
ENTRYPOINT ["mlm-eval"]
CMD ["--help"]
