"""Hydra's launchers of ``compress.cluster``: Hydra makes launchers only of classes in this name space."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from compress.cluster import Ended, Job, check_amounts, on_ray, on_submitit

log = logging.getLogger("compress.cluster")


class _Launcher(Launcher):
    """Returns an ``Ended`` of every job."""

    def __init__(self, **_: Any) -> None:
        self.context: HydraContext
        self.config: DictConfig

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.config = hydra_context, config

    @abstractmethod
    def run(self, jobs: Sequence[Job], words: Any) -> Generator[Ended]:
        """words: the section hydra.launcher"""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from compress.report.table import METRICS

        setup_globals()
        hydra = self.config.hydra
        configure_log(hydra.hydra_logging, hydra.verbose)
        words = OmegaConf.to_object(hydra.launcher)
        check_amounts(words)
        jobs = [
            self._job(list(overrides), number)
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        # Of a sweep that goes on, which the command has compared with what it would make.
        found = {
            job.folder: Ended(job.words, job.folder)
            for job in jobs
            if (job.folder / METRICS).exists()
        }
        for job in jobs:
            said = "finished before" if job.folder in found else " ".join(job.words)
            log.info("%s: %s", job.folder, said)
        left = [job for job in jobs if job.folder not in found]
        # However this ends, jobs that still run are ended.
        with closing(self.run(left, words)) as ends:
            for done in ends:
                found[done.folder] = done
                how = "finished" if done.reason is None else f"failed: {done.reason}"
                log.info("%d of %d, %s: %s", len(found), len(jobs), done.folder, how)
        return [
            JobReturn(job.words, status=JobStatus.COMPLETED, _return_value=found[job.folder])
            for job in jobs
        ]

    def _job(self, overrides: list[str], number: int) -> Job:
        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
        # What ${hydra:...} in its folder's name is looked up in.
        HydraConfig.instance().set_config(config)
        folder = Path(config.hydra.sweep.dir, config.hydra.sweep.subdir).absolute()
        return Job(list(config.hydra.overrides.task), folder)


class RayLauncher(_Launcher):
    def run(self, jobs: Sequence[Job], words: Any) -> Generator[Ended]:
        return on_ray(jobs, words.ray)


class LocalLauncher(_Launcher):
    def run(self, jobs: Sequence[Job], words: Any) -> Generator[Ended]:
        return on_submitit(jobs, words, Path(self.config.hydra.sweep.dir, ".submitit").absolute())


class SlurmLauncher(LocalLauncher):
    pass
