#!/usr/bin/env bash
# repair_wheel.sh WHEEL FOLDER: writes WHEEL into FOLDER under the name of the oldest systems that it runs on. torch's libraries
# stay out: they are those of the torch that is installed.
set -euo pipefail
if [ "$(uname)" = Darwin ]; then
  delocate-wheel --ignore-missing-dependencies --exclude libtorch --exclude libc10 --wheel-dir "$2" "$1"
else
  auditwheel repair --exclude 'libtorch*.so*' --exclude 'libc10*.so*' --wheel-dir "$2" "$1"
fi
for wheel in "$2"/*.whl; do
  if python3 -m zipfile --list "$wheel" | grep -E 'xbn_ext\.libs/|\.dylibs/'; then
    echo "$wheel contains libraries of others" >&2
    exit 1
  fi
done
