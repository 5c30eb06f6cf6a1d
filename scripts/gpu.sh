#!/usr/bin/env bash
# Test or measure on a machine with one NVIDIA GPU and no network, from the root of the repository:
#
#     bash scripts/gpu.sh test|bench
#
# PYTHON has torch, transformers and pytest; WHEELS is the folder of what it lacks (make wheels-gpu). An
# environment of its own is made in GPU_VENV: the machine's is not written to. Logs and results go to OUT.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:?"say test or bench"}
python=${PYTHON:-python3} wheels=${WHEELS:-.whl} venv=${GPU_VENV:-.venv-gpu} out=${OUT:-output/gpu}
seconds=570 # a machine may be lent for ten minutes at a time

if [ ! -e "$venv/.ready" ]; then
    if ! compgen -G "$wheels/*.whl" >/dev/null; then
        echo "no wheel in $wheels: make wheels-gpu where there is a network" >&2
        exit 2
    fi
    "$python" -m venv --without-pip "$venv"
    # Of a Python that is a virtual environment itself, --system-site-packages would give its base's packages.
    machine=$("$python" -c 'import importlib.util, pathlib
print(pathlib.Path(importlib.util.find_spec("torch").origin).parents[1])')
    own=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$machine" >"$own/machine.pth"
    "$python" -m pip --python "$venv/bin/python" install --quiet --disable-pip-version-check \
        --no-index --no-deps --no-compile --ignore-installed "$wheels"/*.whl
    touch "$venv/.ready"
fi

mkdir -p "$out"
export PYTHONUNBUFFERED=1
case $what in
test)
    # What other versions of the libraries deprecate is no failure here.
    timeout --signal=INT "$seconds" "$venv/bin/python" -m pytest tests/gpu -vv -W default \
        -p no:cacheprovider --durations=15 2>&1 | tee "$out/test.log"
    ;;
bench)
    timeout --signal=INT "$seconds" "$venv/bin/python" -m benchmarks.gpu --output "$out" --write "$out/gpu.md" \
        2>&1 | tee "$out/bench.log"
    ;;
*)
    echo "$what is neither test nor bench" >&2
    exit 2
    ;;
esac
