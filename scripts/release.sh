#!/usr/bin/env bash
# A release: checks the tree, builds sdist and wheel, checks and installs both. Uploads only when told to.
#
#   scripts/release.sh              builds into dist/ and checks
#   scripts/release.sh --upload     the same, then asks, tags and uploads with twine
#
# The wheel holds the CPU kernels, compiled (scripts/wheel.sh), and the sources of all. It is tried with the oldest and
# the newest of everything; FASTREL_RELEASE_TORCH="2.12.0" tries it with this torch instead.
set -euo pipefail
cd "$(dirname "$0")/.."
upload=no
case "${1-}" in
  "") ;;
  --upload) upload=yes ;;
  *) echo "usage: scripts/release.sh [--upload]" >&2; exit 2 ;;
esac
fail() { echo "release: $*" >&2; exit 1; }

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' fastrel/version.py)
[ -n "$version" ] || fail "no version in fastrel/version.py"
grep -q "^version: $version$" CITATION.cff || fail "CITATION.cff is of another version than $version"
grep -q "^## $version" CHANGELOG.md || fail "CHANGELOG.md has no section $version"
if [ "$upload" = yes ]; then
  [ -z "$(git status --porcelain)" ] || fail "there are changes that are not committed"
  grep -q "^## $version - [0-9]\{4\}-[0-9][0-9]-[0-9][0-9]$" CHANGELOG.md || fail "CHANGELOG.md: section $version has no date (## $version - YYYY-MM-DD)"
  ! git rev-parse -q --verify "refs/tags/v$version" > /dev/null || fail "there is a tag v$version already"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Builds both, and tries the wheel where there is no compiler.
scripts/wheel.sh ${FASTREL_RELEASE_TORCH-oldest newest}
python3 -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet twine
"$work/tools/bin/twine" check --strict dist/*

# The wheel is made from the sdist: what it lacks, the sdist lacks.
python3 - "$version" << 'PYTHON'
import sys
import tarfile
import zipfile
from pathlib import Path

version = sys.argv[1]
(wheel,), (sdist,) = Path("dist").glob("*.whl"), Path("dist").glob("*.tar.gz")
assert f"-{version}-" in wheel.name and sdist.name == f"fastrel-{version}.tar.gz", (wheel.name, sdist.name)
names = set(zipfile.ZipFile(wheel).namelist())
for needed in (
    "fastrel/_C.abi3.so", "fastrel/py.typed", "fastrel/demo/model.safetensors", "fastrel/demo/scenes.npz", "fastrel/serving/page.html",
    "fastrel/csrc/cpu/zplus_linear.cpp", "fastrel/csrc/include/fastrel/kernels.h", "fastrel/csrc/cuda/linear.cu",
    "fastrel/triton_kernels/zplus_linear.py",
):
    assert needed in names, f"{wheel.name} lacks {needed}"
assert not [name for name in names if name.startswith(("tests/", "docs/"))], "tests or docs in the wheel"
inside = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
for needed in ("pyproject.toml", "setup.py", "LICENSE", "README.md", "csrc/cpu/zplus_linear.cpp", "triton_kernels/zplus_linear.py"):
    assert needed in inside, f"{sdist.name} lacks {needed}"
print(f"{wheel.name}: {len(names)} files, {sdist.name}: {len(inside)} files")
PYTHON

echo "release: $version is built in dist/ and explains its samples"

[ "$upload" = yes ] || { echo "release: nothing was uploaded; --upload does"; exit 0; }
read -r -p "upload fastrel $version and tag v$version? [yes/no] " answer
[ "$answer" = yes ] || fail "not uploaded"
git tag -a "v$version" -m "fastrel $version"
"$work/tools/bin/twine" upload dist/*
echo "release: uploaded; now: git push origin v$version"
