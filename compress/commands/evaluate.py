"""``compress evaluate FOLDER``: accuracy and size of any plain or exported folder."""

from __future__ import annotations

import argparse
import json
import sys

from compress.commands.words import plain
from compress.compose import compose_settings, expand_shorthand
from compress.config import device_of
from compress.errors import UserError
from compress.measure.accuracy import check_texts, measure_accuracy, open_windows
from compress.measure.size import measure_size
from compress.measure.tasks import check_tasks
from compress.model.check import check_tokens
from compress.model.folder import ModelFolder
from compress.model.sources import open_tokenizer, resolve_model
from compress.report.verdict import passed, verdict


def main(words: list[str]) -> int:
    """Prints JSON: size and accuracy of FOLDER, and with --base the divergence from it and a verdict.

    1 if the gate does not let it through.
    """
    parser = argparse.ArgumentParser("compress evaluate", description=plain(__doc__))
    parser.add_argument(
        "folder", metavar="FOLDER", help="a folder, owner/name, or a run's checkpoint/"
    )
    parser.add_argument("--base", metavar="FOLDER", help="the original, for KL and top-1 agreement")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="eval.*, gate.* and device"
    )
    asked = parser.parse_intermixed_args(words)
    settings = compose_settings(expand_shorthand(asked.overrides))
    if settings.eval is None:
        raise UserError("eval=none leaves nothing to evaluate")
    pickle = settings.model.allow_pickle
    folder = ModelFolder(resolve_model(asked.folder, None, pickle))
    base = None if asked.base is None else ModelFolder(resolve_model(asked.base, None, pickle))
    if base is not None and base.config.get("vocab_size") != folder.config.get("vocab_size"):
        raise UserError(
            f"{asked.base} has another vocabulary than {asked.folder}: choose its original"
        )
    if base is None and settings.gate.limits:
        raise UserError(f"gate.{next(iter(settings.gate.limits))} needs --base, the original")
    # Both are asked the same, in the words of the original.
    original = folder if base is None else base
    tokenizer = open_tokenizer(original)
    check_texts(settings.eval, folder)
    windows = open_windows(settings.eval, tokenizer)
    for blocks in windows.values():
        check_tokens(blocks.tokens, original)
    check_tasks(settings.eval, original)
    size = measure_size(folder)
    accuracy = measure_accuracy(
        folder, base, windows, settings.eval, tokenizer, device_of(settings)
    )
    judged = None
    if base is not None:
        judged = verdict(accuracy.rows["candidate"], accuracy.rows["base"], settings.gate.limits)
        accuracy.rows["candidate"]["verdict"] = judged
    print(json.dumps({"size": size, **accuracy.rows}, indent=2))
    if judged is not None and not passed(judged):
        failed = "; ".join(judged["gate"]["failed"])
        print(f"compress: {asked.folder} is outside the gate: {failed}", file=sys.stderr)
    return int(not passed(judged))
