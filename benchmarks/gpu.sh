#!/usr/bin/env bash
# Everything that is measured on a GPU, in one command of a few minutes:
#
#     benchmarks/gpu.sh --output results
#     WHEELS=wheels benchmarks/gpu.sh --output results --parts b,h
#
# WHEELS is a folder of wheels that the machine lacks: they are put on the path of this
# run alone, and nothing is fetched. PYTHON is the interpreter, python3 by default.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
path=$PWD
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    # The version of the checkout, which is not installed but on the path.
    "$python" -c "from setuptools import build_meta as build
build.prepare_metadata_for_build_wheel('$site')" > /dev/null
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --target "$site" "$WHEELS"/*.whl
    path=$path:$site
fi
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1
"$python" -m benchmarks.gpu "$@"
