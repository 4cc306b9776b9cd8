"""What is folded into a model before rounding. The table is literal: a recipe cannot bring code."""

from compress.quantize.transforms.awq_clip import AwqClip
from compress.quantize.transforms.awq_scale import AwqScale
from compress.quantize.transforms.opt import Opt
from compress.quantize.transforms.smooth import Smooth

TRANSFORMS = {"awq_scale": AwqScale, "awq_clip": AwqClip, "opt": Opt, "smooth": Smooth}
