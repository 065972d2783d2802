# Fleetloop without a broker: worker, views, exporters, executors, simulator. What it runs is the command.
FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /opt/fleetloop
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY schemas schemas
COPY models models
COPY streams streams
COPY agents agents
COPY views views
COPY exporters exporters
COPY executors executors
COPY simulator simulator
COPY cli cli
RUN /opt/fleetloop/bin/pip install --no-cache-dir -c constraints.txt .

FROM python:3.11-slim
COPY --from=build /opt/fleetloop /opt/fleetloop
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/fleetloop fleetloop
ENV PATH=/opt/fleetloop/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    FLEETLOOP_STATE_DIR=/var/lib/fleetloop \
    FLEETLOOP_LOG_FORMAT=json
USER 10001
WORKDIR /var/lib/fleetloop
ENTRYPOINT ["fleetloop"]
CMD ["--help"]
