FROM python:3.11-slim
# The default index has torch with CUDA; name an index of CPU builds here for a smaller image without it.
ARG TORCH_INDEX_URL=""
# Triton compiles what launches its kernels at the first start, as we compile the kernels for processors.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} torch==2.13.0
COPY protos protos
COPY sdk sdk
COPY kernels kernels
COPY registry_service registry_service
COPY gateway gateway
COPY inference_service inference_service
RUN pip install --no-cache-dir -c constraints.txt ".[inference,otel]"
ENTRYPOINT ["python", "-m", "softprompt_inference"]
