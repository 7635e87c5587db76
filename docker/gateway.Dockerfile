FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY protos protos
COPY sdk sdk
COPY kernels kernels
COPY registry_service registry_service
COPY gateway gateway
COPY inference_service inference_service
# No torch here: this service knows no model.
RUN pip install --no-cache-dir -c constraints.txt ".[gateway,otel]"
USER nobody
ENTRYPOINT ["python", "-m", "softprompt_gateway"]
