"""Runs of a sweep elsewhere: as tasks of Ray, or as jobs that submitit hands to SLURM or starts here.

A job is ``compress WORDS hydra.run.dir=FOLDER`` in a process of its own. It is handed words, and its results
are the files in its folder: all machines must see that, the model and this program under the same paths. What
happens to one job (a mistake, an error, a killed process, a time limit) is told of it alone.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from compress.errors import USER_ERROR, UserError, printable

# Where the classes are that Hydra makes of the words below.
PLUGINS = "hydra_plugins.compress_launchers"
# Hydra's log file of a run.
LOG = "compress.log"
# Seconds between two looks at the jobs of a queue, and that jobs have to end when they are stopped.
EVERY, GRACE = 1.0, 60.0
# Seconds for a Ray of this machine to start: 30 are too few where many others work.
START = 300


@dataclass
class RayInit:
    """address: local starts a Ray of this machine for the sweep, auto and HOST:PORT join one that runs;
    num_cpus, num_gpus: what a local one has, null all there are"""

    address: str = "local"
    num_cpus: int | None = None
    num_gpus: int | None = None


@dataclass
class RayRemote:
    """What each job takes. memory: bytes; resources: names that a cluster gives its machines -> how much"""

    num_cpus: int = 1
    num_gpus: float = 0
    memory: int | None = None
    resources: dict[str, float] = field(default_factory=dict)


@dataclass
class RayWords:
    init: RayInit = field(default_factory=RayInit)
    remote: RayRemote = field(default_factory=RayRemote)


@dataclass
class Ray:
    _target_: str = f"{PLUGINS}.RayLauncher"
    ray: RayWords = field(default_factory=RayWords)


@dataclass
class Local:
    """What each job takes. timeout_min: minutes until it is ended; array_parallelism: jobs at a time"""

    _target_: str = f"{PLUGINS}.LocalLauncher"
    name: str = "compress"
    timeout_min: int = 60
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    mem_gb: int | None = None
    array_parallelism: int = 2


@dataclass
class Slurm(Local):
    """The other keys are options of sbatch."""

    _target_: str = f"{PLUGINS}.SlurmLauncher"
    array_parallelism: int = 256
    partition: str | None = None
    qos: str | None = None
    account: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gres: str | None = None
    comment: str | None = None
    cpus_per_gpu: int | None = None
    gpus_per_task: int | None = None
    mem_per_gpu: str | None = None
    mem_per_cpu: str | None = None


# By the names, and with the keys, that Hydra's own launchers for these have.
LAUNCHERS: dict[str, type] = {"ray": Ray, "submitit_local": Local, "submitit_slurm": Slurm}


def keys_of(launcher: str) -> list[str]:
    """The keys below hydra.launcher that may be set."""
    return [key for key in _keys(LAUNCHERS[launcher]()) if key != "_target_"]


def _keys(section: Any) -> Iterator[str]:
    for key, value in vars(section).items():
        inner = _keys(value) if hasattr(value, "__dataclass_fields__") else ()
        yield from (f"{key}.{name}" for name in inner) if inner else (key,)


def check_launcher(launcher: str) -> None:
    """Raises UserError if what a launcher needs is not installed."""
    package = "ray" if launcher == "ray" else "submitit"
    if find_spec(package) is None:
        raise UserError(
            f"hydra/launcher={launcher} needs the package {package} in this environment: "
            "pip install 'compress[cluster]'"
        )
    if launcher == "submitit_slurm" and shutil.which("sbatch") is None:
        raise UserError(
            f"hydra/launcher={launcher} needs SLURM's sbatch, which this machine does not have: "
            "choose submitit_local or ray"
        )


def check_amounts(section: Any, of: str = "hydra.launcher") -> None:
    """Raises UserError for an amount that no job can take."""
    for key, value in vars(section).items():
        if hasattr(value, "__dataclass_fields__"):
            check_amounts(value, f"{of}.{key}")
        elif isinstance(value, int | float) and value <= 0 and not (value == 0 and "gpus" in key):
            raise UserError(f"{of}.{key}={value:g} is not allowed: choose more than 0")


@dataclass(frozen=True)
class Job:
    """words: its overrides; folder: of its run, absolute"""

    words: list[str]
    folder: Path


@dataclass(frozen=True)
class Ended:
    """A run of a sweep that is no more. reason: why it has no results, for a person; None if it has"""

    words: list[str]
    folder: Path
    reason: str | None = None
    code: int = 0


def ended(job: Job, code: int, reason: str) -> Ended:
    """What came of a job. reason: why its exit code is not 0"""
    from compress.report.table import METRICS

    if code != USER_ERROR and (job.folder / METRICS).exists():
        # Also if it is the code of a gate, or the process died on its way out.
        return Ended(job.words, job.folder)
    if code == 0:
        reason = (
            "it ended well, but its folder is not here: all machines must share the file system"
        )
    return Ended(job.words, job.folder, reason, code or 1)


def named(error: BaseException) -> str:
    """An error on one line."""
    first, _, _ = str(error).strip().partition("\n")
    return printable(f"{type(error).__name__}: {first}" if first else type(error).__name__)


class _Heard(io.TextIOBase):
    """Passes on what is written to it, and remembers it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.text = stream, io.StringIO()

    def write(self, text: str) -> int:
        self.text.write(text)
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


def work(words: list[str], folder: Path, place: Path, environ: dict[str, str]) -> tuple[int, str]:
    """A job, in the process that the cluster started for it. Returns its exit code, and why it is not 0.

    place: the folder that relative paths of the words begin in; environ: variables that decide results
    Why is in the log of the run too, of an error that is no UserError with its traceback.
    """
    # Before torch is imported, which reads the number of threads once.
    os.environ.update(environ)
    heard = _Heard(sys.stderr)
    try:
        os.chdir(place)
        # By name: it is above this module.
        command = importlib.import_module("compress.__main__")
        with contextlib.redirect_stderr(heard):
            code = command._code([*words, f"hydra.run.dir='{folder}'"])
    except Exception as error:
        _note(folder, traceback.format_exc())
        return 1, named(error)
    text = heard.text.getvalue()
    told = [line for line in text.splitlines() if line.startswith("compress: ")]
    reason = told[-1].removeprefix("compress: ") if told else f"it ended with code {code}"
    _, broken, trace = text.rpartition("Traceback (most recent call last)")
    if code == 1 and broken:
        # Of an error that is no mistake of a person; its last line says what it was.
        reason = printable(trace.strip().rpartition("\n")[2])
    if code != 0:
        _note(folder, f"{broken}{trace}" if code == 1 and broken else f"{reason}\n")
    return code, reason


def _note(folder: Path, text: str) -> None:
    """To the log of a run, if there is one."""
    with contextlib.suppress(OSError), (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(text)


def environ_of(threads: int | None) -> dict[str, str]:
    """What of this environment goes to every job: threads, where caches are, what the hub's client is told.

    threads: if the environment does not say. Secrets stay here
    """
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in ("OMP_NUM_THREADS", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
        or (name.startswith("HF_") and "TOKEN" not in name)
    }
    return ({} if threads is None else {"OMP_NUM_THREADS": str(threads)}) | passed


def on_ray(jobs: Sequence[Job], words: RayWords) -> Generator[Ended]:
    """Run jobs as tasks of Ray, each in a new process; they come as they end.

    Raises UserError if there is no such Ray, or a local one has not what a job asks for.
    """
    if not jobs:
        return
    _connect(words)
    import ray

    running: dict[Any, Job] = {}
    try:
        # A process that dies is told, not tried again: the same command goes on from what it left.
        task = ray.remote(max_retries=0, max_calls=1, **asdict(words.remote))(work)
        environ = environ_of(words.remote.num_cpus)
        for job in jobs:
            running[task.remote(job.words, job.folder, Path.cwd(), environ)] = job
        while running:
            (first,), _ = ray.wait(list(running), num_returns=1)
            job = running.pop(first)
            try:
                code, reason = ray.get(first)
            except ray.exceptions.RayTaskError as error:
                code, reason = 1, f"its process did not begin: {named(error.cause)}"
            except ray.exceptions.RayError as error:
                code, reason = 1, f"its process is gone: {named(error)}"
            yield ended(job, code, reason)
    finally:
        for reference in running:
            # Raises KeyboardInterrupt there.
            ray.cancel(reference)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=GRACE)
        ray.shutdown()


def _connect(words: RayWords) -> None:
    """Join a Ray, or start one of this machine. Raises UserError if that cannot be, or jobs would wait
    there forever."""
    # Ray would tell its makers of each start.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_raylet_start_wait_time_s", str(START))
    import ray

    local, on_term = words.init.address == "local", signal.getsignal(signal.SIGTERM)
    init = {key: value for key, value in asdict(words.init).items() if value is not None}
    if local:
        # What passes through its store are words.
        init |= {"object_store_memory": 100_000_000, "include_dashboard": False}
    try:
        ray.init(**init, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        # Of no common class.
        raise UserError(
            f"no Ray at hydra.launcher.ray.init.address={words.init.address}: {named(error)}"
        ) from error
    # It puts a handler of its own there.
    signal.signal(signal.SIGTERM, on_term)
    there = ray.cluster_resources()
    remote = words.remote
    asked = {"CPU": remote.num_cpus, "GPU": remote.num_gpus, **remote.resources}
    for name, amount in asked.items():
        if local and amount > there.get(name, 0):
            ray.shutdown()
            raise UserError(
                f"a job asks for {amount:g} {name} of hydra.launcher.ray.remote, and this Ray has "
                f"{there.get(name, 0):g}"
            )


def on_submitit(jobs: Sequence[Job], words: Local, logs: Path) -> Generator[Ended]:
    """Run jobs by submitit, on SLURM as one array; they come as they end.

    logs: the folder for what submitit writes, on the shared file system
    """
    import submitit

    cluster = "slurm" if isinstance(words, Slurm) else "local"
    asked = {key: value for key, value in asdict(words).items() if key != "_target_"}
    at_once = asked.pop("array_parallelism")
    common = {"name", "timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb"}
    executor = submitit.AutoExecutor(folder=logs / "%j", cluster=cluster)
    executor.update_parameters(
        **{k if k in common else f"slurm_{k}": v for k, v in asked.items() if v is not None}
    )
    if cluster == "slurm":
        executor.update_parameters(slurm_array_parallelism=at_once)
        at_once = len(jobs)
    environ = environ_of(words.cpus_per_task)
    waiting, running = list(jobs), list[tuple[Any, Job]]()
    try:
        while waiting or running:
            starting = waiting[: at_once - len(running)]
            if starting:
                lists = zip(
                    *((j.words, j.folder, Path.cwd(), environ) for j in starting), strict=True
                )
                running += zip(_submitted(executor, lists), starting, strict=True)
                waiting = waiting[len(starting) :]
            gone = [(handle, job) for handle, job in running if handle.done()]
            running = [pair for pair in running if pair not in gone]
            for handle, job in gone:
                yield ended(job, *_outcome(handle))
            if not gone:
                time.sleep(EVERY)
    finally:
        for handle, _ in running:
            handle.cancel(check=False)
        until = time.monotonic() + GRACE
        while cluster == "local" and any(not handle.done() for handle, _ in running):
            if time.monotonic() > until:
                break
            time.sleep(0.1)


def _submitted(executor: Any, lists: Any) -> list[Any]:
    """Raises UserError if SLURM takes no such jobs."""
    from submitit.core.utils import FailedJobError

    try:
        return executor.map_array(work, *lists)
    except FailedJobError as error:
        last = str(error).strip().rpartition("\n")[2]
        raise UserError(f"SLURM takes no such jobs: {printable(last)}") from error


def _outcome(handle: Any) -> tuple[int, str]:
    """The exit code of a job of submitit, and why it is not 0."""
    error = handle.exception()
    if error is None:
        code, reason = handle.result()
        return int(code), str(reason)
    reason = f"its process is gone ({handle.state.lower()}): {handle.paths.stderr} has what it said"
    return 1, reason
