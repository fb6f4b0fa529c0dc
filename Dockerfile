# The serving image: TorchServe and what the handler imports. No fastai, no notebooks, no compiler.
#
#   docker build -t fastunet .                                   for the CPU, gigabytes smaller
#   docker build -t fastunet --build-arg TORCH_BACKEND=cu126 .   for a GPU, CUDA 12: NVIDIA driver 525.60 or newer
#   docker build -t fastunet --build-arg SERVER=uvicorn .        without TorchServe and Java: Starlette on uvicorn serves
#   docker build -t fastunet --build-arg RUNTIME=openvino .      for archives of OpenVINO alone: on uvicorn and without
#                                                                PyTorch, a tenth of the size
#   docker build … --build-arg BULK=1 .                          also a node of a Ray cluster: see deployment/kuberay.yaml
#
# TORCH_BACKEND is one of torch-builds.txt, which names the versions and the NVIDIA driver that each needs; `pypi` is
# PyTorch as PyPI has it, with CUDA 13. PyPI's is also taken, and the build says so, where the build for the CPU cannot
# be fetched because PyTorch's own index is out of reach, unless TORCH_FALLBACK=no.
# Behind a proxy or with a package index of your own, hand the build your settings as secrets, which stay out of the
# image: `--secret id=pip,src=pip.conf --secret id=uv,src=uv.toml --secret id=ca,src=ca-certificates.crt`.

# Debian's own Python and Java: both get security fixes for as long as Debian 12 does; a rebuild takes them in.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3-venv \
    && apt-get clean && rm -rf /var/lib/apt/lists/*
ARG RUNTIME=all
ARG TORCH_BACKEND=cpu
ARG TORCH_FALLBACK=yes
ARG SERVER=torchserve
ARG BULK=
ENV UV_SYSTEM_CERTS=true UV_COMPILE_BYTECODE=true UV_LINK_MODE=copy UV_CACHE_DIR=/var/cache/uv
COPY deployment/requirements*.txt constraints.txt torch-builds.txt ./
# Of the CUDA packages each build of PyTorch pins its own versions. Triton goes again: it is a compiler of 1 GB that calls
# a C compiler in its turn, and the image has none. No runtime needs it. Of OpenVINO, what computes on
# CPUs and reads its own files stays: the other half is for other devices and formats, and for C++.
# KubeRay submits a job through the dashboard of ray[default], and asks with wget whether a node is well.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=cache,target=/var/cache/uv \
    python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir --disable-pip-version-check uv==0.13.9 \
    && /opt/uv/bin/uv venv --python /usr/bin/python3 /opt/venv \
    && grep -vE '^(cuda|nvidia|triton|torch(vision)?=)' constraints.txt > pins.txt \
    && awk -v build="$TORCH_BACKEND" '$1 == build { print "torch==" $2 "\ntorchvision==" $3 }' torch-builds.txt > torch.txt \
    && if [ ! -s torch.txt ]; then echo "torch-builds.txt has no build $TORCH_BACKEND" >&2; exit 1; fi \
    && if [ "$SERVER" != torchserve ]; then sed -i '/^torchserve/d' requirements.txt; fi \
    && if [ "$RUNTIME" = openvino ]; then mv requirements-openvino.txt requirements.txt; fi \
    && if [ "$BULK" ]; then { grep -v '^-r' requirements-bulk.txt; echo 'ray[default]'; } >> requirements.txt; fi \
    && install() { \
         /opt/uv/bin/uv pip install --python /opt/venv --requirements requirements.txt --constraints pins.txt \
             --overrides torch.txt "$@"; \
       } \
    && case "${RUNTIME}-${TORCH_BACKEND}" in \
         openvino-* | *-pypi) install ;; \
         *-cpu) install --torch-backend=cpu || { [ "$TORCH_FALLBACK" = yes ] || exit 1; \
                echo "PyTorch's build for the CPU cannot be fetched: taking PyPI's, which is gigabytes larger" >&2; \
                install; } ;; \
         *) install "--torch-backend=${TORCH_BACKEND}" ;; \
       esac \
    && /opt/uv/bin/uv pip uninstall --python /opt/venv triton \
    && cd /opt/venv/lib/python3*/site-packages/openvino \
    && rm -rf include libs/cache.json libs/libopenvino_intel_[gn]pu_plugin.so \
    && find libs -name '*_frontend.so.*' ! -name '*_ir_frontend.so.*' -delete

FROM ${BASE}
ARG RUNTIME=all
ARG SERVER=torchserve
ARG BULK=
RUN apt-get update \
    && if [ "$RUNTIME-$SERVER" = all-torchserve ]; then java=openjdk-17-jre-headless; fi \
    && apt-get install -y --no-install-recommends ca-certificates $java python3 ${BULK:+wget} \
    && apt-get clean && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home serve
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY deployment deployment
# The archive, where there is one; without it the container takes the one that AIP_STORAGE_URI names.
COPY model_store model_store
USER serve
# The name of the model, and so of its route; empty: the archive's.
ARG NAME=
# AIP_HTTP_PORT is AI Platform's name for the port of health checks and predictions; it overrides this default.
# Google's GPU machines put NVIDIA's driver and nvidia-smi, by which TorchServe finds the GPU, into /usr/local/nvidia.
ENV PATH=/opt/venv/bin:$PATH:/usr/local/nvidia/bin LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    PYTHONUNBUFFERED=1 AIP_HTTP_PORT=8080 MODEL_NAME=${NAME}
# What the image was built for: `deployment.ai_platform upload --torch-backend` takes the same word.
ARG TORCH_BACKEND=cpu
LABEL torch_backend=${TORCH_BACKEND}
EXPOSE 8080
# Whether a worker can answer, as /ping says too; the image has no curl.
HEALTHCHECK --interval=15s --timeout=10s --start-period=3m CMD ["python", "-m", "deployment.serve", "--check"]
ENTRYPOINT ["python", "-m", "deployment.serve"]
