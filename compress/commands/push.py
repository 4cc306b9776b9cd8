"""``compress push FOLDER owner/name``: upload an export folder, with its model card, to the Hugging Face hub.

Nothing else in this tool sends anything anywhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from huggingface_hub import HfApi

from compress.commands.words import plain, read_pairs, truth
from compress.errors import UserError
from compress.export.audit import CHECKPOINT, verify
from compress.hub import HTTP_ERROR, NAME
from compress.model.card import CARD
from compress.serve.command import served_name

KEYS = ("private", "revision")


def main(words: list[str]) -> int:
    """Verifies the folder first; prints the address of the commit."""
    parser = argparse.ArgumentParser("compress push", description=plain(__doc__))
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a run, or its checkpoint/")
    parser.add_argument("repository", metavar="owner/name", help="made if it does not exist")
    parser.add_argument(
        "words",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="private=true (of a repository that is made), revision=BRANCH; the token is that of "
        "`hf auth login` or HF_TOKEN",
    )
    asked = parser.parse_intermixed_args(words)
    given = read_pairs(asked.words, KEYS)
    private = truth("private", given.get("private", "false"))
    folder = asked.folder
    if (folder / CHECKPOINT).is_dir():
        folder = folder / CHECKPOINT
    _check(folder, asked.repository)
    print(_upload(folder, asked.repository, private, given.get("revision")))
    return 0


def _check(folder: Path, repository: str) -> None:
    if not NAME.fullmatch(repository):
        raise UserError(f"{repository} is no name on the hub: give owner/name")
    problems = verify(folder)
    if problems:
        raise UserError(f"{folder} is not as it was written, so it is not uploaded: {problems[0]}")
    if not (folder / CARD).exists():
        raise UserError(f"{folder} has no {CARD}: a run writes one when it has measured")


def _upload(folder: Path, repository: str, private: bool, revision: str | None) -> str:
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message=f"Upload {served_name(folder)} by compress",
        )
    except (OSError, ValueError, HTTP_ERROR) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{repository} cannot be uploaded to the hub: {reason}") from error
    return str(done.commit_url)
