"""How integers are picked. The table is literal: a recipe names a method, it cannot bring code."""

from compress.quantize.block import Rounding
from compress.quantize.rounding.gptq import Gptaq, Gptq
from compress.quantize.rounding.learned import Learned
from compress.quantize.rounding.nearest import Nearest

ROUNDINGS: dict[str, type[Rounding]] = {
    "nearest": Nearest,
    "gptq": Gptq,
    "gptaq": Gptaq,
    "learned": Learned,
}
