"""From command-line words to settings: Hydra's composition, with its errors told in one sentence.

This file, ``__main__`` and ``config.settings_of`` are the only places that see a DictConfig.
"""

from __future__ import annotations

import functools
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException, ValidationError

from compress.cluster import LAUNCHERS, keys_of
from compress.config import RecipeConfig, settings_of
from compress.errors import UserError
from compress.model.folder import STUMBLES
from compress.model.shapes import PREFIX

RECIPES = Path(__file__).parent.parent / "recipes"
GROUPS = [folder.name for folder in RECIPES.iterdir() if folder.is_dir()]
# model=PATH and data=PATH: the option that takes a path, and the key it goes to.
SHORTHAND = {"model": ("folder", "model.source"), "data": ("text", "data.source")}


# What a command line may set of Hydra's own, and what beside that stays as recipes/config.yaml has it:
# most of it names code to run, or files to write. Launchers have words of their own (_check_launcher).
FREE = ("run.dir", "sweep.dir", "sweep.subdir", "verbose")
# Hydra's own, which runs one job after another in this process.
LAUNCHER, SERIAL = "hydra/launcher", "basic"
FIXED = (
    "callbacks",
    "launcher",
    "sweeper",
    "searchpath",
    "hydra_logging",
    "job_logging",
    "output_subdir",
    "job.name",
    "job.chdir",
    "job.env_set",
    "job.env_copy",
    *FREE,
)
# What is resolved where Hydra itself reads it, if it is not one of these.
FOREIGN = re.compile(r"\$\{(?!now:|hydra:|hydra\.|model\.)")
# Its flags that read settings from elsewhere, the last one from a pickle.
FLAGS = ("config_path", "config_name", "config_dir", "package", "experimental_rerun")


def register() -> None:
    """Make the schema and the resolver known to Hydra. Calling it again changes nothing."""
    # Which looks for launchers of others: those of the same names are ours.
    Plugins.instance()
    store = ConfigStore.instance()
    for name, words in LAUNCHERS.items():
        store.store(group=LAUNCHER, name=name, node=words, provider="compress")
    store.store(name="schema", node=RecipeConfig)
    OmegaConf.register_new_resolver("basename", _basename, replace=True)
    # Settings end up in files that are handed on; the environment holds what nobody else should see.
    OmegaConf.clear_resolver("oc.env")


def check_flags(asked: Namespace) -> None:
    """Raises UserError for a flag of Hydra's that would have settings come from elsewhere than recipes/."""
    for flag in FLAGS:
        if getattr(asked, flag, None):
            raise UserError(
                f"--{flag.replace('_', '-')} is not allowed: recipes are the files in {RECIPES}, and "
                "KEY=VALUE changes what they say"
            )


def _check_words(overrides: Sequence[str]) -> None:
    """Raises UserError for a word that changes what Hydra itself does."""
    for word in overrides:
        if word.startswith("hydra.") and (FOREIGN.search(word) or not word.isprintable()):
            raise UserError(
                f"{word} is not allowed: in it ${{now:...}} and ${{model.name}} may stand, and no line breaks"
            )
    words = [word.partition("=")[0].lstrip("+~") for word in overrides]
    launcher = launcher_of(overrides)
    for word in words:
        section, _, key = word.replace("/", ".").partition(".")
        if section != "hydra" or key in FREE or word == LAUNCHER:
            continue
        if word.startswith("hydra.launcher."):
            _check_launcher(word, launcher)
            continue
        known = ", ".join(f"hydra.{name}" for name in FREE)
        raise UserError(
            f"{word} is not allowed: of Hydra's own settings {known} may be set, and {LAUNCHER} with its keys"
        )


def is_hydra(word: str) -> bool:
    """Whether a word sets something of Hydra's own."""
    return re.match(r"[+~]*hydra[./]", word) is not None


def launcher_of(overrides: Sequence[str]) -> str:
    """The launcher that is asked for. Raises UserError if none of the known ones is."""
    asked = [word for word in overrides if word.partition("=")[0].lstrip("+~") == LAUNCHER]
    names = [word.partition("=")[2] if word[0] not in "+~" else "" for word in asked]
    for word, name in zip(asked, names, strict=True):
        if name not in (SERIAL, *LAUNCHERS):
            known = ", ".join((SERIAL, *LAUNCHERS))
            raise UserError(f"{word} is not known: known are {LAUNCHER}={known}")
    return names[-1] if names else SERIAL


def _check_launcher(word: str, launcher: str) -> None:
    """Raises UserError for a key that a launcher does not have. What sbatch takes beside these, commands to
    run among it, is for the environment that the sweep is started in."""
    if launcher == SERIAL:
        others = ", ".join(f"{LAUNCHER}={name}" for name in LAUNCHERS)
        raise UserError(f"{word} is a key of other launchers: choose one of {others}")
    key = word.removeprefix("hydra.launcher.")
    known = keys_of(launcher)
    if key not in known and not key.startswith("ray.remote.resources."):
        raise UserError(
            f"{word} is not a key of {LAUNCHER}={launcher}: known are {', '.join(known)}"
        )


def _check_hydra(hydra: DictConfig, overrides: Sequence[str]) -> None:
    """Raises UserError if a recipe changes what Hydra itself does. overrides: all that is set"""
    own = tuple(word for word in overrides if is_hydra(word))
    for key in FIXED:
        if _plain(hydra, key) != _plain(_hydra_of_config(own), key):
            raise UserError(f"a recipe changes hydra.{key}, which only recipes/config.yaml may say")


def _plain(hydra: DictConfig, key: str) -> Any:
    found = OmegaConf.to_container(hydra, resolve=False)
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


@functools.cache
def _hydra_of_config(words: tuple[str, ...]) -> DictConfig:
    """What recipes/config.yaml says of Hydra with these words; called within its initialization."""
    return compose("config", overrides=list(words), return_hydra_config=True).hydra


def _basename(path: str) -> str:
    folder = Path(path).expanduser()
    return folder.resolve().name if folder.exists() else path.rstrip("/").split("/")[-1]


def options(group: str) -> list[str]:
    """The choices of a group: its YAML files."""
    return sorted(file.stem for file in (RECIPES / group).glob("*.yaml"))


def expand_shorthand(words: Sequence[str]) -> list[str]:
    """Replace model=PATH and data=PATH by the option that takes a path.

    Raises UserError if a sweep mixes names and paths, which Hydra cannot express.
    """
    expanded: list[str] = []
    for word in words:
        group, equals, value = word.partition("=")
        if not equals or group not in SHORTHAND:
            expanded.append(word)
            continue
        values = value.split(",")
        named = [v in options(group) for v in values]
        if all(named) or not any(_like_path(v) for v in values):
            expanded.append(word)
        elif any(named):
            raise UserError(
                f"{word} mixes names and paths: sweep over one kind, named are "
                f"{', '.join(options(group))}"
            )
        else:
            option, key = SHORTHAND[group]
            expanded += [f"{group}={option}", f"{key}={value}"]
    return expanded


def _like_path(value: str) -> bool:
    return (
        value.startswith(PREFIX)
        or "/" in value
        or "." in value
        or value.startswith("~")
        or Path(value).exists()
    )


def compose_settings(overrides: list[str]) -> RecipeConfig:
    """The settings that these overrides give. Raises UserError, one sentence, if they do not fit."""
    register()
    _check_words(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(RECIPES), version_base="1.3"):
            config = _composed(overrides)
            _check_hydra(config.hydra, overrides)
            with open_dict(config):
                del config["hydra"]
            return settings_of(config)
    except (HydraException, OmegaConfBaseException) as error:
        GlobalHydra.instance().clear()
        raise UserError(one_sentence(error, overrides)) from error


# Groups that may be none.
NOTHING = ("eval", "speed", "context", "search", "head", "kv_cache", "repair")


def _composed(overrides: list[str]) -> DictConfig:
    """Raises UserError for words over which Hydra stumbles without an error of its own."""
    try:
        return compose("config", overrides=overrides, return_hydra_config=True)
    except STUMBLES as error:
        if isinstance(error, HydraException | OmegaConfBaseException):
            raise
        for group in NOTHING:
            beside = [word for word in overrides if word.startswith(f"{group}.")]
            if beside and f"{group}=none" in overrides:
                raise UserError(f"{beside[0]} has no place beside {group}=none") from error
        words = ", ".join(word for word in overrides if _stumbles(word)) or ", ".join(overrides)
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{words} has another form than its key ({reason}): compress --help has the groups and lists"
        ) from error


def _stumbles(word: str) -> bool:
    """Whether a word fails by itself."""
    try:
        compose("config", overrides=[word])
    except (*STUMBLES, HydraException):
        return True
    return False


def one_sentence(error: BaseException, overrides: Sequence[str]) -> str:
    """A Hydra or OmegaConf error as one sentence that names the key and what is allowed.

    overrides: what was asked for when it happened
    """
    cause = error.__cause__ or error
    if isinstance(cause, ValidationError) and cause.full_key:
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    if merging := re.match(r"Error merging override (\S+)", str(error)):
        return (
            f"{merging[1]} has another form than its key: compress --help has the lists and numbers"
        )
    if unknown := re.match(r"Could not override '([^']+)'", str(error)):
        # Of a value in braces the part that is not known.
        key = getattr(cause, "full_key", None) or unknown[1]
        return f"{key} is not a known key: known are {', '.join(_known_keys(key, overrides))}"
    if missing := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", str(error)):
        group, option = missing.groups()
        path = ", or the path of something that exists" if group in SHORTHAND else ""
        return f"{group}={option} is not known: known are {', '.join(options(group))}{path}"
    return re.sub(r"\s*\n\s*", "; ", str(error).strip())


def _known_keys(key: str, overrides: Sequence[str]) -> list[str]:
    """The keys beside ``key`` in its innermost section that exists, with the same groups chosen."""
    groups = [o for o in overrides if o.partition("=")[0] in GROUPS]
    with initialize_config_dir(config_dir=str(RECIPES), version_base="1.3"):
        try:
            section = compose("config", overrides=groups)
        except (*STUMBLES, HydraException):
            section = compose("config")
    for part in key.split(".")[:-1]:
        if not isinstance(section.get(part), DictConfig):
            break
        section = section[part]
    return sorted(str(name) for name in section)
