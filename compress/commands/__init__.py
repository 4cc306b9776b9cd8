"""Verbs of the command line: one file each, whose ``main`` takes the words after the verb and returns the
exit code. A file is imported when its verb is used."""

VERBS = (
    "bench",
    "compare",
    "evaluate",
    "export",
    "families",
    "plan",
    "push",
    "serve",
    "traffic",
    "verify",
)
