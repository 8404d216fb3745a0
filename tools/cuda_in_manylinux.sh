#!/usr/bin/env bash
# For a container of manylinux_2_28 on x86-64: the parts of CUDA 12.8 that setup.py needs, in /usr/local/cuda-12.8. It is the
# first that knows every architecture in setup.py, and what a CUDA 12 library needs is a driver of R525 or later.
set -euo pipefail
dnf install -y dnf-plugins-core
dnf config-manager --add-repo https://developer.download.nvidia.com/compute/cuda/repos/rhel8/x86_64/cuda-rhel8.repo
dnf install -y cuda-nvcc-12-8 cuda-cudart-devel-12-8
