#!/usr/bin/env bash
# The kernels' tests with the address and undefined-behaviour sanitizers.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python - "$folder/_C.so" <<'PYTHON'
import sys
from pathlib import Path

from fastrel import build

build.compile_library(Path(sys.argv[1]), build.CPU, ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"])
PYTHON
preload=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so):$(g++ -print-file-name=libstdc++.so)
# Some of the many cases; all of them before a release. Python itself leaks at exit by design.
[ "${FASTREL_EXAMPLES:-30}" -ge 300 ] || set -- -m "not slow and not load" "$@"
FASTREL_LIBRARY=$folder/_C.so ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD=$preload python -m pytest -n 0 tests/test_kernels.py tests/test_poison.py "$@"
