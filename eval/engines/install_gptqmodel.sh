#!/bin/sh
# Make an environment in the folder given as the first argument in which GPTQModel runs on the CPU and this
# project's environment, .venv, is at hand. Run from the project's folder. GPTQModel asks for a newer torch than
# constraints.txt pins: it is taken without its dependencies, and those that its import needs are named here.
set -eu
env=$1
.venv/bin/python -m venv "$env"
site=$("$env/bin/python" -c 'import site; print(site.getsitepackages()[0])')
.venv/bin/python -c 'import site; print(site.getsitepackages()[0])' > "$site/project.pth"
"$env/bin/pip" install -q -U setuptools wheel
BUILD_CUDA_EXT=0 "$env/bin/pip" install -q --no-deps --no-build-isolation gptqmodel==7.7.0
"$env/bin/pip" install -q --no-deps optimum==2.3.0 device-smi==0.5.7 pypcre==0.6.4 tokenicer==0.0.14 \
    logbar==0.4.15 threadpoolctl==3.8.0 defuser==0.0.28
