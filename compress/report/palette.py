"""Colours and shapes of every picture: told apart without colour too.

Okabe and Ito's colours (2008), the clearest on white first.
"""

PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#F0E442",
)
# By Plotly's names.
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down", "cross")
DASHES = ("solid", "dash", "dot", "dashdot")
