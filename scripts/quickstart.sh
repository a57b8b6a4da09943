#!/usr/bin/env bash
# Sets up the environment and runs the main job: SO on the embedded digits. Arguments go to main.py.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements.txt
python main.py "$@"
