# One image for every part; the command chooses which. Runs as an ordinary user.
FROM python:3.13-slim AS build
WORKDIR /src
COPY requirements.lock ./
RUN pip install --no-cache-dir --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY em_bridge em_bridge
COPY backup_worker backup_worker
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:3.13-slim
# ssh-keygen checks the signatures of approvals.
RUN apt-get update && apt-get install --yes --no-install-recommends openssh-client \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 backup \
    && mkdir -p /backups /agents /state \
    && chown backup:backup /backups /agents /state \
    && chmod 700 /backups /state
COPY requirements-runtime.lock /tmp/
RUN pip install --no-cache-dir --require-hashes -r /tmp/requirements-runtime.lock
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --no-deps /wheels/*.whl
USER backup
WORKDIR /home/backup
ENV PYTHONUNBUFFERED=1 BACKUP_CONFIG=/config
ENTRYPOINT ["backup-worker"]
CMD ["status"]
