# One image for every service of ours and for the demo's device: a virtual environment with exactly the locked packages.
ARG PYTHON=python:3.14-slim
FROM ${PYTHON} AS build
WORKDIR /src
COPY requirements/server.lock requirements/
RUN python3 -m venv /opt/restante \
 && /opt/restante/bin/pip install --quiet --no-cache-dir --no-compile --only-binary :all: --require-hashes \
      -r requirements/server.lock
COPY pyproject.toml README.md LICENSE ./
COPY topology topology
COPY fabric fabric
COPY device_agent device_agent
COPY api api
COPY deploy/rabbitmq deploy/rabbitmq
COPY deploy/systemd deploy/systemd
RUN /opt/restante/bin/pip install --quiet --no-cache-dir --no-compile --no-deps --no-build-isolation . \
 # What built it is not needed to run it, and an agent refuses handlers that others than their owner may write.
 && /opt/restante/bin/pip uninstall --quiet --yes editables hatchling pathspec pluggy tomlkit trove-classifiers pip \
 && find /opt/restante -depth -type d -name tests -exec rm -r {} + \
 && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/restante/lib
COPY examples/garage_door /opt/restante/garage_door
RUN chmod -R go-w /opt/restante/garage_door
# The mount points of volumes: a new volume takes owner and mode of the directory it is first mounted on.
RUN install -d -m 700 /root-of-image/agent /root-of-image/volumes \
 && cd /root-of-image/volumes && install -d -m 700 gateway worker broker edge control database operator ticket \
      mailboxes ledger metrics \
 && install -d -m 700 ../state ../state/authority ../state/keys ../state/revocations ../state/secrets \
      ../state/secrets/tokens ../state/secrets/commands

FROM ${PYTHON}
COPY deploy/compose/passwd /etc/passwd
COPY --from=build /opt/restante /opt/restante
COPY --from=build --chown=10001:10001 /root-of-image /
ENV PATH=/opt/restante/bin:/usr/local/bin:/usr/bin:/bin PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    RESTANTE_STATE_DIR=/state
USER 10001:10001
# Gateway and worker touch this file every two seconds while they can do their work.
HEALTHCHECK --interval=3s --timeout=3s --start-period=60s --retries=4 \
    CMD ["/bin/sh", "-c", "test -n \"$(find /tmp/ready -newermt '-10 seconds')\""]
ENTRYPOINT ["restante"]
