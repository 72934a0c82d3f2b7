#!/usr/bin/env bash
# MLflow server for a team: runs in PostgreSQL, artifacts in S3, accounts with passwords; see docs/team.md.
set -euo pipefail

# Secrets come from environment variables: every user of the machine can read a command line
: "${PGHOST:?set it to the host of PostgreSQL}" "${PGUSER:?set it to the PostgreSQL user}"
: "${PGPASSWORD:?set it to the password of PGUSER}" "${ARTIFACTS:?set it to a location such as s3://team/mlflow}"
: "${AWS_ACCESS_KEY_ID:?set it to an access key of the S3 server}" "${AWS_SECRET_ACCESS_KEY:?set it to the secret key}"
: "${MLFLOW_AUTH_ADMIN_PASSWORD:?set it to a password for the user admin, whom the first start creates}"
: "${MLFLOW_FLASK_SERVER_SECRET_KEY:?set it to a long random text, which signs browser sessions}"

MLFLOW_AUTH_CONFIG_PATH="$(cd "$(dirname "$0")" && pwd)/basic_auth.ini"
export MLFLOW_AUTH_CONFIG_PATH
# The job runner is not used here and makes the start take three times as long
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true

# The URI has no host: libpq reads PGHOST, PGPORT, PGUSER and PGPASSWORD
exec "${PYTHON:-python}" -m mlflow server --app-name basic-auth \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}" --workers "${WORKERS:-4}" \
    --backend-store-uri postgresql+psycopg2:///mlflow --artifacts-destination "$ARTIFACTS"
