"""The wide table for a paper."""

from __future__ import annotations

from compress.report.table import Row, cells

# What is no letter to LaTeX. The backslash first: the others are written with it.
_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "\n": " ",
}


def escaped(text: str) -> str:
    """Text as LaTeX sets it, letter by letter."""
    return "".join(_ESCAPES.get(letter, letter) for letter in text)


def latex_table(rows: list[Row]) -> str:
    """A tabular with the rules of booktabs; a line between models. Needs booktabs and T1 fonts."""
    header, *lines = cells(rows)
    text = [
        r"% \usepackage{booktabs} \usepackage[T1]{fontenc}",
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        r"\toprule",
        _line(header),
    ]
    for row, line in zip(rows, lines, strict=True):
        text += [r"\midrule"] if row.base is None else []
        text.append(_line(line))
    return "\n".join([*text, r"\bottomrule", r"\end{tabular}", ""])


def _line(row: list[str]) -> str:
    return " & ".join(map(escaped, row)) + r" \\"
