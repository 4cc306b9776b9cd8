"""How integers are picked. The table is literal: a recipe names a method, it cannot bring code."""

from compress.quantize.rounding.nearest import Nearest

ROUNDINGS = {"nearest": Nearest}
