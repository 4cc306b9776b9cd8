"""A Dockerfile and a compose.yaml that serve a checkpoint by an engine's official image.

The folder is mounted read-only, not copied: the image is the engine, and the flags are those of
``serve_command``. Tags are those of the versions that ``engines`` speaks of, but for llama.cpp: its rows are
about the wheel xllamacpp, which does not say its build; the tag is the build whose flags were read. Not run
here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from compress.engines import LLAMA_CPP, SGLANG, VLLM, VLLM_CPU
from compress.errors import UserError
from compress.serve.command import serve_command
from compress.serve.files import write_new

# The image of an engine, and how its server is started there.
IMAGES = {
    VLLM: ("vllm/vllm-openai:v0.33.0", "vllm"),
    VLLM_CPU: ("public.ecr.aws/q9t5s3a7/vllm-cpu-release-repo:v0.32.0", "vllm"),
    SGLANG: ("lmsysorg/sglang:v0.5.23", "python3"),
    LLAMA_CPP: ("ghcr.io/ggml-org/llama.cpp:server-b11206", "/app/llama-server"),
}
ON_GPU = (VLLM, SGLANG)
# In the container.
PORT = 8000
DOCKERFILE = """\
# Serves {name} by {engine}; `docker compose up --build` mounts the checkpoint at {place}.
FROM {image}
{environment}EXPOSE {port}
VOLUME {place}
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \\
  CMD curl --fail --silent http://127.0.0.1:{port}/health || exit 1
ENTRYPOINT {words}
CMD []
"""


def write_docker(
    engine: str,
    folder: Path,
    target: Path,
    *,
    name: str,
    port: int,
    context: int | None = None,
    tp: int = 1,
) -> Path:
    """Write the new folder ``target`` with both files. port: on this machine. Raises UserError if ``target``
    exists, or the engine has no image of its own."""
    if engine not in IMAGES:
        raise UserError(f"docker= has no image of {engine}: choose engine={', '.join(IMAGES)}")
    image, program = IMAGES[engine]
    place = Path("/models") / name
    command = serve_command(
        engine,
        folder,
        host="0.0.0.0",
        port=PORT,
        name=name,
        context=context,
        tp=tp,
        program=program,
        place=place,
    )
    dockerfile = DOCKERFILE.format(
        name=name,
        engine=engine,
        image=image,
        place=place,
        port=PORT,
        environment="".join(f"ENV {key}={value}\n" for key, value in command.environment.items()),
        words=json.dumps(command.words),
    )
    service = _service(engine, folder.resolve(), place, f"{name}:{engine}", port, tp)
    compose = yaml.safe_dump({"services": {name.lower(): service}}, sort_keys=False)
    return write_new(target, {"Dockerfile": dockerfile, "compose.yaml": compose})


def _service(
    engine: str, folder: Path, place: Path, image: str, port: int, tp: int
) -> dict[str, Any]:
    service: dict[str, Any] = {
        "build": ".",
        "image": image.lower(),
        "ports": [f"127.0.0.1:{port}:{PORT}"],
        "volumes": [
            {
                "type": "bind",
                # A single dollar would be a variable of compose.
                "source": str(folder).replace("$", "$$"),
                "target": str(place),
                "read_only": True,
            }
        ],
        # Nothing is fetched: all that it serves is in the folder.
        "environment": {"HF_HUB_OFFLINE": "1"},
        "restart": "unless-stopped",
    }
    if engine != LLAMA_CPP:
        # Processes of a server speak through shared memory.
        service["ipc"] = "host"
    if engine in ON_GPU:
        devices = [{"driver": "nvidia", "count": tp, "capabilities": ["gpu"]}]
        service["deploy"] = {"resources": {"reservations": {"devices": devices}}}
    return service
