"""The kernels of ``cpu.cpp`` as ``torch.ops.compress``, compiled by the machine's own compiler when they are
first wanted and kept in the user cache."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from compress.user_cache import cache_dir

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "cpu.cpp"
# What the kernels need of a CPU, as Linux names it (AMD from Zen 4 on, Intel from Cooper Lake on).
NEEDED = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"})
# Instructions are named one by one, not as the native ones: a home folder may serve several machines.
FLAGS = (
    *("-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-mavx2", "-mfma", "-mf16c"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
)


@functools.cache
def available() -> bool:
    """Whether the kernels run here. The first call loads them, and compiles them where nobody has: some ten
    seconds. A CPU that could run them without a compiler that works is told once, as a warning."""
    if not cpu_fits():
        return False
    try:
        torch.ops.load_library(library())
    except subprocess.CalledProcessError as error:
        message = (error.stderr.strip() or str(error)).splitlines()[0]
    except OSError as error:
        message = str(error)
    else:
        return True
    log.warning("decoding on this CPU is slower than it could be, its kernels fail: %s", message)
    return False


@functools.cache
def cpu_fits() -> bool:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return set(flags.split()) >= NEEDED


def library() -> Path:
    """The compiled library of this source for this compiler and torch. Processes that compile at the same
    time do not wait for each other: each writes a file of its own, and the last to finish stays.

    Raises OSError or subprocess.CalledProcessError where the compiler is absent or fails.
    """
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    home = Path(torch.__file__).parent
    flags = [*FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    version = _run([*compiler, "--version"])
    key = "\n".join([SOURCE.read_text(), *compiler, version, *flags, torch.__version__])
    folder = cache_dir() / "kernels"
    target = folder / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        log.info("compiling the CPU's kernels, once: %s", target)
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            built = Path(fresh) / target.name
            places = [f"-I{home / 'include'}", f"-L{home / 'lib'}"]
            _run(
                [*compiler, *flags, *places, str(SOURCE), "-o", str(built), "-ltorch_cpu", "-lc10"]
            )
            built.replace(target)
    return target


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
