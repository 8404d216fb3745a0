#!/usr/bin/env bash
# files.sh FILE...: wheels and source archives, as an index and an installer see them.
set -euo pipefail
twine check --strict "$@"
for file in "$@"; do
  case $file in
    *.whl) check-wheel-contents "$file" && abi3audit --strict --summary "$file" ;;
  esac
done
