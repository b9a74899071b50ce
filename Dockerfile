# One image for every part; the command chooses which. Runs as an ordinary user.
FROM python:3.13-slim

RUN useradd --create-home --uid 10001 backup \
    && mkdir -p /backups /agents /state \
    && chown backup:backup /backups /agents /state

WORKDIR /app
COPY requirements.lock pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir --require-hashes -r requirements.lock
COPY em_bridge em_bridge
COPY backup_worker backup_worker
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

USER backup
ENV PYTHONUNBUFFERED=1 BACKUP_CONFIG=/config
ENTRYPOINT ["backup-worker"]
CMD ["status"]
