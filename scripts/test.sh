#!/usr/bin/env bash
# Sets up the environment and passes all checks: lint, format, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements-dev.txt
ruff check .
ruff format --check .
python -m pytest -q "$@"
