#!/usr/bin/env bash
# A team's MLflow server: runs in PostgreSQL, artifacts in S3, a name and a password for everyone; see docs/team.md.
set -euo pipefail

# Secrets come from the environment alone: a command line can be read by every user of the machine
: "${PGHOST:?the machine that PostgreSQL runs on}" "${PGUSER:?its user}" "${PGPASSWORD:?and the password of that}"
: "${ARTIFACTS:?where artifacts go, such as s3://team/mlflow}"
: "${AWS_ACCESS_KEY_ID:?a key of the S3 server}" "${AWS_SECRET_ACCESS_KEY:?and its secret}"
: "${MLFLOW_AUTH_ADMIN_PASSWORD:?the password of the user admin, who is made by the first start}"
: "${MLFLOW_FLASK_SERVER_SECRET_KEY:?a long random text, which signs the sessions of browsers}"

MLFLOW_AUTH_CONFIG_PATH="$(cd "$(dirname "$0")" && pwd)/basic_auth.ini"
export MLFLOW_AUTH_CONFIG_PATH
# Not used here; it makes the start three times as long
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true

# Without a host, the address has libpq take it, the user and the password from PGHOST, PGPORT, PGUSER and PGPASSWORD
exec "${PYTHON:-python}" -m mlflow server --app-name basic-auth \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}" --workers "${WORKERS:-4}" \
    --backend-store-uri postgresql+psycopg2:///mlflow --artifacts-destination "$ARTIFACTS"
