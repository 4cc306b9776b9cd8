"""The one exception that is for people: a mistake the user can mend."""

# What a command that a person got wrong ends with.
USER_ERROR = 2
# Characters of a sentence that are shown: a name in a file may be as long as the file.
SHOWN = 1000


class UserError(ValueError):
    """A wrong option, folder, or file, told in one sentence that names the thing and what is allowed.

    The command line prints the sentence and exits with code 2. Everything else that goes wrong is a
    broken invariant and keeps its traceback.
    """


def one_line(error: UserError) -> str:
    """The sentence as it may be printed: names that a file brings may hold line breaks, and worse."""
    text = " ".join(str(error).split())
    if len(text) > SHOWN:
        text = f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"
    return printable(text)


def printable(line: str) -> str:
    """A line with what a terminal does not show, or takes for a command, spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
