#!/usr/bin/env bash
# Install a wheel of megam3 into an environment of its own, and see that its command starts. The container files beside
# this script run it; it serves a node without containers as well:
#
#   slurm/install.sh /opt/megam3 megam3-0.1.0-py3-none-any.whl
#
# PYTHON picks the interpreter, PIP_FLAGS passes options to pip: an index, or -c constraints.txt for the tested versions.
# torch's builds on PyPI bring CUDA; of the node only the driver is used.
set -euo pipefail

if [ $# -ne 2 ]; then
  echo 'install.sh: two arguments are required: install.sh ENVIRONMENT WHEEL' >&2
  exit 2
fi
environment=$1 wheel=$2
if [ ! -f "$wheel" ]; then
  echo "install.sh: no wheel $wheel: make one with pip wheel --no-deps --wheel-dir dist ." >&2
  exit 2
fi
[ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment"
# shellcheck disable=SC2086  # the flags are several words
"$environment/bin/python" -m pip install --no-cache-dir --disable-pip-version-check ${PIP_FLAGS:-} "$wheel"
"$environment/bin/megam3" --version
"$environment/bin/megam3" show-config unified --no-files >/dev/null
