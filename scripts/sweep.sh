#!/usr/bin/env bash
# A grid of runs, one after another. Edit the variables, or set them for one call. Arguments go to every run, so all
# METHODS must have these flags; scripts/sweep.py takes grids whose rows differ in their flags.
#
#     bash scripts/sweep.sh
#     DATASETS="dtd eurosat" SHOTS="1 4" ROOT_PATH=$DATA bash scripts/sweep.sh --precision bf16
#
# Recorded runs are skipped: to continue an interrupted sweep, start it again. A run that fails does not stop the others;
# failures are listed at the end, and the exit code is 1. Ctrl-C stops the run and the sweep.

METHODS=${METHODS:-so lora}
DATASETS=${DATASETS:-digits}
SHOTS=${SHOTS:-1 2 4 8 16}
SEEDS=${SEEDS:-1 2 3}
ROOT_PATH=${ROOT_PATH:-} # folder of the datasets
RESULTS_DIR=${RESULTS_DIR:-results}
PYTHON=${PYTHON:-python}

if ! command -v "$PYTHON" > /dev/null; then
    echo "error: there is no $PYTHON; source .venv/bin/activate, or name one: PYTHON=/path/to/python bash $0" >&2
    exit 2
fi
if ! "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"; then
    echo "error: $PYTHON has no torch; source .venv/bin/activate, or name another: PYTHON=/path/to/python bash $0" >&2
    exit 2
fi
main="$(dirname "$0")/../main.py"
failures=""

stop() { # the run keeps its last checkpoint
    trap "" INT TERM HUP
    kill -TERM "$run" 2> /dev/null
    wait "$run" 2> /dev/null
    echo "stopped; the same command continues" >&2
    exit "$1"
}
trap "stop 130" INT
trap "stop 143" TERM
trap "stop 129" HUP

for seed in $SEEDS; do
    for dataset in $DATASETS; do
        for shots in $SHOTS; do
            for method in $METHODS; do
                command=("$PYTHON" "$main" --method "$method" --dataset "$dataset" --shots "$shots" --seed "$seed")
                command+=(--root_path "$ROOT_PATH" --results_dir "$RESULTS_DIR" --wait "$@")
                printf -v words "%q " "${command[@]}"
                echo "== $words"
                "${command[@]}" & # in the foreground bash would handle a signal only after the run
                run=$!
                wait "$run" || failures+="(exit code $?) $words"$'\n'
            done
        done
    done
done

if [ -n "$failures" ]; then
    printf "failed, for reasons that each run printed above:\n%s" "$failures" >&2
    exit 1
fi
