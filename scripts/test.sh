#!/usr/bin/env bash
# Sets up the environment and runs all checks: lint, format, and tests on all cores. Arguments go to pytest; -n 0 runs
# the tests one after another in one process.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements-dev.txt
ruff check .
ruff format --check .
# As many processes as this one may use cores (-n auto would count the whole machine's), with one thread in each.
cores="$(python -c 'import os; print(len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)))')"
export OMP_NUM_THREADS=1
python -m pytest -q -n "$cores" --dist worksteal "$@"
