#!/usr/bin/env bash
# Measure the numbers of BERT/README.md: SO at three densities and 0 (only the dense group), LoRA at three ranks, and SO
# without a dense group, seed after seed. Recorded runs are skipped, so an interrupted call can be repeated.
# Usage: bash benchmarks/bert_rte.sh MODEL DATA_DIR RESULTS_DIR [flags for all runs]   PYTHON chooses the interpreter.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n 's/^# Usage: /usage: /p' "$0" >&2
    exit 2
fi
python="${PYTHON:-python}" bert="$(cd "$(dirname "$0")/.." && pwd)/BERT"
model="$1" data="$2" results="$3"
shift 3

failed=0
grid() { # a script of BERT/ and its flags; continues after failed runs (1), ends at a mistake (2)
    local code=0
    "$python" "$bert/$1" --model "$model" --data_dir "$data" --out "$results/$2_results.csv" "${@:3}" || code=$?
    if [ $code -gt 1 ]; then exit $code; fi
    failed=$((failed | code))
}

for seed in 1 2 3 4 5; do
    grid script.py so_grid --kappa 0 1e-5 1e-4 1e-3 --T_sparse 10 --seed $seed "$@"
    grid script_LoRA.py lora_grid --rank 2 8 16 --seed $seed "$@"
done
for seed in 1 2 3; do
    grid script.py dense_none --dense none --max_steps 1000 --kappa 1e-5 1e-4 1e-3 --T_sparse 10 --seed $seed "$@"
done
exit $failed
