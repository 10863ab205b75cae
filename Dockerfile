# The server with its library of adapters. Build on a machine that reaches PyPI; the model is fetched at the first start
# and kept in the cache folder (mount a volume there).
FROM python:3.11-slim

# For Linux, PyPI's own torch brings the CUDA libraries along; this index has the build for processors.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH=torch==2.13.0

# The kernels are compiled in the background of the first load, for the processor they then run on.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home midstream
WORKDIR /opt/midstream
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$TORCH"
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
COPY library ./library
RUN pip install --no-cache-dir .

USER midstream
ENV MIDSTREAM_LIBRARY=/opt/midstream/library \
    MIDSTREAM_SERVE_HOST=0.0.0.0
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
CMD ["midstream", "serve"]
