# The command line and the page in the browser, on processors:
#
#     docker build -t prompt-cam .
#     docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" prompt-cam explain my_model bird.jpg --out traits
#     docker run --rm -p 7860:7860 -v "$PWD:/data" prompt-cam app my_model --host 0.0.0.0
FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY . .
RUN python -m venv /opt/prompt_cam \
 && /opt/prompt_cam/bin/python -m pip install --no-cache-dir -c constraints.txt --extra-index-url "$TORCH_INDEX" ".[app]"

FROM python:3.11-slim
COPY --from=build /opt/prompt_cam /opt/prompt_cam
# HOME and USER are for whoever comes by --user, so as to own what is written: /etc/passwd does not know them.
ENV PATH=/opt/prompt_cam/bin:$PATH \
    HOME=/tmp \
    USER=prompt_cam \
    HF_HOME=/data/.cache/huggingface \
    PYTHONUNBUFFERED=1
RUN useradd --no-create-home --uid 1000 prompt_cam \
 && mkdir /data \
 && chown prompt_cam /data
USER 1000
# The images and models of the one who runs it.
WORKDIR /data
EXPOSE 7860
ENTRYPOINT ["prompt-cam"]
CMD ["--help"]
