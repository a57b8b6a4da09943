# Source it in the project's folder: . scripts/environment.sh FILE
# It makes and enters the virtual environment .venv, and installs a requirements file there unless that was done before.
# PYTHON chooses the interpreter, VENV another place for the environment.

venv="${VENV:-.venv}"
if [ ! -x "$venv/bin/python" ]; then
    for python in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            break
        fi
        python=""
    done
    if [ -z "$python" ]; then
        echo "error: no Python 3.10 or newer found; install one, or name it: PYTHON=/path/to/python3 bash $0" >&2
        exit 2
    fi
    echo "making the environment $venv with $("$python" --version)"
    if ! "$python" -m venv "$venv"; then
        rm -rf "$venv"
        echo "error: $python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 2
    fi
fi
. "$venv/bin/activate"

wanted="$(cat requirements*.txt)"
stamp="$venv/installed-$(basename "$1")"
if [ "$wanted" != "$(cat "$stamp" 2>/dev/null)" ]; then
    echo "installing $1 (a few minutes the first time)"
    python -m pip install --quiet --disable-pip-version-check -r "$1"
    printf '%s\n' "$wanted" > "$stamp"
fi
