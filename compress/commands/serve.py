"""``compress serve FOLDER [engine=NAME]``: the command that serves a checkpoint, printed or run.

FOLDER is an export folder, or a run: of that, the folder of the format that the engine loads.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compress.commands.words import plain, read_pairs, truth
from compress.engines import ENGINES, VLLM
from compress.errors import UserError
from compress.serve.command import (
    HOST,
    PORT,
    Command,
    at_hand,
    missing,
    plain_name,
    serve_command,
    served_name,
)
from compress.serve.docker import IMAGES, write_docker
from compress.serve.loads import Answer, answers, checkpoints, place
from compress.serve.triton import how_to_run, write_repository

KEYS = ("engine", "run", "host", "port", "name", "context", "tp", "triton", "docker")
Found = Mapping[Path, Mapping[str, Answer]]


@dataclass(frozen=True)
class Asked:
    """What the words ask for; None: not asked."""

    engine: str | None
    run: bool
    host: str
    port: int
    name: str | None
    context: int | None
    tp: int
    triton: str | None
    docker: str | None

    def command(self, engine: str, folder: Path, program: str | None) -> Command:
        return serve_command(
            engine,
            folder,
            host=self.host,
            port=self.port,
            name=self.name,
            context=self.context,
            tp=self.tp,
            program=program,
        )


def main(words: list[str]) -> int:
    """Prints commands as lines of a shell script, all else as its comments; with run=true it becomes the
    server."""
    parser = argparse.ArgumentParser("compress serve", description=plain(__doc__))
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a run, or its checkpoint/")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE",
        help=f"engine ({', '.join(ENGINES)}; default: the one installed here, else all that load it), "
        "run=true (start it), host, port, name (what requests call the model), context (tokens of a "
        "request), tp (devices); triton=FOLDER|true, docker=FOLDER|true: write a model repository for "
        "Triton's vLLM backend, or a Dockerfile and compose.yaml",
    )
    given = parser.parse_intermixed_args(words)
    asked = _asked(given.words)
    found = {path: answers(path, asked.tp) for path in checkpoints(given.folder)}
    if asked.engine is not None:
        _refuse(found, asked.engine)
    if asked.triton or asked.docker:
        return _write(found, asked)
    chosen, program = _choose(found, asked)
    if asked.run:
        if chosen is None:
            raise UserError(
                f"no engine that loads {given.folder} is installed here: choose engine= and install it"
            )
        _run(found, asked, chosen, program)
    told = [_tell(found, asked, engine, program) for engine in ([chosen] if chosen else ENGINES)]
    if not any(told):
        raise UserError(f"no engine serves {given.folder} as asked")
    return 0


def _choose(found: Found, asked: Asked) -> tuple[str | None, str | None]:
    """The engine that is asked for, or the first that is installed and serves it, with its program."""
    if asked.engine is not None:
        return asked.engine, at_hand(asked.engine)
    for engine in ENGINES:
        folder, answer = place(found, engine)
        program = at_hand(engine) if answer.loads else None
        if program is not None and not isinstance(_command(asked, engine, folder, program), str):
            return engine, program
    return None, None


def _command(asked: Asked, engine: str, folder: Path, program: str | None) -> Command | str:
    """The command of an engine that loads the folder, or why its server does not do what is asked."""
    try:
        return asked.command(engine, folder, program)
    except UserError as error:
        return str(error)


def _refuse(found: Found, engine: str) -> None:
    folder, answer = place(found, engine)
    if not answer.loads:
        raise UserError(
            f"{engine} {answer.version} does not load {folder}: {'; '.join(answer.reasons)}"
        )


def _tell(found: Found, asked: Asked, engine: str, program: str | None) -> bool:
    """Whether there is a command. Raises UserError if there is none of the engine that is asked for."""
    folder, answer = place(found, engine)
    if not answer.loads:
        _remark(f"{engine} {answer.version}: no, {'; '.join(answer.reasons)}")
        return False
    command = _command(asked, engine, folder, program)
    if isinstance(command, str):
        if asked.engine is not None:
            raise UserError(command)
        _remark(command)
        return False
    model = json.dumps(command.model, ensure_ascii=False)
    said = [*answer.notes, *command.notes, f'requests say "model": {model}']
    _remark(f"{engine} {answer.version}: {'; '.join(said)}")
    print(command.line(), flush=True)
    return True


def _remark(text: str) -> None:
    """A comment for a shell, on one line whatever is in it."""
    print("#", " ".join(text.splitlines()), flush=True)


def _run(found: Found, asked: Asked, engine: str, program: str | None) -> None:
    """Become the server. Raises UserError if its program is not there."""
    folder, _ = place(found, engine)
    if program is None:
        raise UserError(f"{engine} is not installed here: {missing(engine)}")
    command = asked.command(engine, folder, program)
    if shutil.which(command.words[0]) is None:
        raise UserError(f"{command.words[0]} cannot be run")
    _remark(command.line())
    os.execvpe(command.words[0], command.words, {**os.environ, **command.environment})


def _write(found: Found, asked: Asked) -> int:
    if asked.triton:
        if asked.engine not in (None, VLLM):
            raise UserError(f"triton= is for {VLLM} alone: leave out engine={asked.engine}")
        _refuse(found, VLLM)
        folder, _ = place(found, VLLM)
        target = _target(asked.triton, folder, "triton")
        write_repository(
            folder, target, name=_name(asked, folder), context=asked.context, tp=asked.tp
        )
        _remark(f"{target}: a model repository; YY.MM of the image decides its vLLM")
        print(how_to_run(folder, target, asked.port))
    if asked.docker:
        loads = [e for e in IMAGES if place(found, e)[1].loads]
        if asked.engine is None and not loads:
            raise UserError(f"docker= has images of {', '.join(IMAGES)}, and none of them loads it")
        engine = asked.engine or loads[0]
        folder, _ = place(found, engine)
        target = _target(asked.docker, folder, "docker")
        write_docker(
            engine,
            folder,
            target,
            name=_name(asked, folder),
            port=asked.port,
            context=asked.context,
            tp=asked.tp,
        )
        _remark(f"{target}: {engine} by {IMAGES[engine][0]}")
        print(
            shlex.join(["docker", "compose", "--project-directory", str(target), "up", "--build"])
        )
    return 0


def _name(asked: Asked, folder: Path) -> str:
    """A name that may be a folder and part of a URL."""
    return plain_name(asked.name or served_name(folder))


def _target(word: str, folder: Path, kind: str) -> Path:
    """Beside the checkpoint, whose own files its manifest knows, or where the word says."""
    return folder.with_name(f"{folder.name}-{kind}") if word == "true" else Path(word)


def _asked(words: list[str]) -> Asked:
    given = read_pairs(words, KEYS)
    engine = given.get("engine")
    if engine is not None and engine not in ENGINES:
        raise UserError(f"engine={engine} is not known: choose one of {', '.join(ENGINES)}")
    written = [key for key in ("triton", "docker") if _folder(given.get(key))]
    lost = [key for key in ("run", "host") if given.get(key, "false") != "false"]
    if written and lost:
        raise UserError(f"{written[0]}= writes files: leave out {' and '.join(lost)}=")
    context = given.get("context")
    return Asked(
        engine=engine,
        run=truth("run", given.get("run", "false")),
        host=given.get("host", HOST),
        port=_number("port", given.get("port", str(PORT)), 65535),
        name=given.get("name"),
        context=None if context is None else _number("context", context),
        tp=_number("tp", given.get("tp", "1")),
        triton=_folder(given.get("triton")),
        docker=_folder(given.get("docker")),
    )


def _folder(word: str | None) -> str | None:
    return None if word == "false" else word


def _number(key: str, word: str, most: int | None = None) -> int:
    if not word.isdecimal() or int(word) < 1 or (most is not None and int(word) > most):
        allowed = "of 1 or more" if most is None else f"from 1 to {most}"
        raise UserError(f"{key}={word} is not allowed: choose a number {allowed}")
    return int(word)
