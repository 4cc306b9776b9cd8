"""What is handed to a cluster: words, options of sbatch, variables; and what is said where it cannot be."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from compress import cluster
from compress.cluster import (
    LAUNCHERS,
    Job,
    Ray,
    RayInit,
    RayRemote,
    RayWords,
    Slurm,
    check_amounts,
    check_launcher,
    environ_of,
    keys_of,
    on_ray,
    on_submitit,
)
from compress.errors import UserError

# Keeps the batch file. Job 1 of the array is said to have run out of time, job 0 leaves its result as it is.
SBATCH = """#!/bin/sh
cp "$1" {folder}/batch.sh
echo Submitted batch job 77
"""
SACCT = """#!/bin/sh
printf 'JobID|State|NodeList\\n77_0|NODE_FAIL|a\\n77_1|TIMEOUT|b\\n'
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with commands by the names of SLURM's."""
    commands = {
        "sbatch": SBATCH.format(folder=tmp_path),
        "sacct": SACCT,
        "srun": "#!/bin/sh\n",
        "scancel": "#!/bin/sh\n",
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def test_slurm_gets_one_array_and_tells_of_each_job(slurm: Path) -> None:
    check_launcher("submitit_slurm")
    words = Slurm(partition="gpu", gpus_per_node=1, cpus_per_task=3, mem_gb=20, array_parallelism=2)
    # All other keys are options that submitit knows.
    for key in ("qos", "account", "constraint", "exclude", "gres", "comment"):
        setattr(words, key, "x y")
    words.cpus_per_gpu, words.gpus_per_task, words.mem_per_gpu, words.mem_per_cpu = 1, 1, "1", "1"
    jobs = [Job([word], slurm / word) for word in ("a", "b")]
    # Its process was lost after the run had finished.
    jobs[0].folder.mkdir()
    (jobs[0].folder / "metrics.json").write_text("{}")
    found = {done.words[0]: done for done in on_submitit(jobs, words, slurm / "logs")}
    assert found["a"].reason is None
    assert "its process is gone (timeout)" in str(found["b"].reason)
    options = [line for line in (slurm / "batch.sh").read_text().splitlines() if "#SBATCH" in line]
    for option in (
        "--array=0-1%2",
        "--partition=gpu",
        "--gpus-per-node=1",
        "--cpus-per-task=3",
        "--mem=20GB",
        "--time=60",
        "--job-name=compress",
        "--account='x y'",
        "--gpus-per-task=1",
    ):
        assert f"#SBATCH {option}" in options
    assert sys.executable in (slurm / "batch.sh").read_text()


def test_what_slurm_refuses_is_told(slurm: Path) -> None:
    (slurm / "bin" / "sbatch").write_text("#!/bin/sh\necho 'invalid partition: gpu' >&2\nexit 1\n")
    jobs = [Job(["a"], slurm / "a"), Job(["b"], slurm / "b")]
    with pytest.raises(UserError, match=r"SLURM takes no such jobs: .*invalid partition: gpu"):
        list(on_submitit(jobs, Slurm(partition="gpu"), slurm / "logs"))


def test_a_launcher_that_cannot_start_jobs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="needs SLURM's sbatch, which this machine does not have"):
        check_launcher("submitit_slurm")
    monkeypatch.setattr(cluster, "find_spec", lambda _: None)
    for launcher, package in (("ray", "ray"), ("submitit_local", "submitit")):
        with pytest.raises(UserError, match=f"needs the package {package} in this environment"):
            check_launcher(launcher)


def test_a_job_that_would_wait_forever_is_refused(tmp_path: Path) -> None:
    words = RayWords(RayInit(num_cpus=1, num_gpus=0), RayRemote(num_gpus=0.5))
    with pytest.raises(UserError, match=r"a job asks for 0.5 GPU .* and this Ray has 0"):
        list(on_ray([Job(["a"], tmp_path / "a")], words))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            Ray(ray=RayWords(remote=RayRemote(num_cpus=0))),
            "hydra.launcher.ray.remote.num_cpus=0 is not",
        ),
        (
            Ray(ray=RayWords(remote=RayRemote(num_gpus=-1))),
            "hydra.launcher.ray.remote.num_gpus=-1 is",
        ),
        (Slurm(array_parallelism=0), "hydra.launcher.array_parallelism=0 is not allowed: choose"),
    ],
)
def test_amounts_that_no_job_can_take_are_refused(words: object, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        check_amounts(words)


def test_jobs_get_the_threads_of_the_sweep_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("HF_", "OMP_", "XDG_")):
            monkeypatch.delenv(name)
    assert environ_of(None) == {}
    assert environ_of(4) == {"OMP_NUM_THREADS": "4"}
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert environ_of(4) == {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}


def test_no_launcher_takes_commands_to_run() -> None:
    for launcher in LAUNCHERS:
        known = set(keys_of(launcher))
        assert not known & {"_target_", "setup", "additional_parameters", "python"}
        assert len(known) > 5
