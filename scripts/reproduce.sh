#!/usr/bin/env bash
# Sets up the environment and reproduces the paper's tables: docs/reproduce.md. Arguments go to scripts/reproduce.py.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements-all.txt
python scripts/reproduce.py "$@"
