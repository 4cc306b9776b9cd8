"""Compiles the kernels of a packed linear for a GPU that need not be there, as the linear would launch them.

    python tests/compress/kernels/compile_linear.py CAPABILITY FORMAT TOKENS N K [FUSION] [-v]

FORMAT: as in w4-g128, w4-g64-asym, w16, fp8-channel, fp8-block+group; FUSION: norm, gated or both with a
comma. Prints a line of JSON for each kernel: shared memory, registers, stack, and the instructions of its
longest loop for each weight.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.kernels import triton_linear, tuning
from compress.kernels.fusion import Fusion
from compress.kernels.packed_linear import TritonWeight
from compress.quantize.inputs import InputScheme
from compress.quantize.qtensor import QTensor

# Of an H200, where the configuration is chosen.
PROCESSORS = 132
TYPES = {
    torch.int32: "i32",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
}


def weight_of(name: str, N: int, K: int) -> TritonWeight:
    """A weight without contents."""
    if name == "w16":
        return TritonWeight.dense(torch.empty(N, K, dtype=torch.bfloat16, device="meta"))
    form, _, inputs = name.partition("+")
    kind, size, *asym = form.split("-")
    bits = 8 if kind == "fp8" else int(kind[1:])
    block = (128, 128) if size == "block" else None
    groups = {"channel": 1, "block": -(-K // 128)}.get(size) or K // int(size[1:])
    scale = torch.empty(-(-N // 128) if block else N, groups, dtype=torch.bfloat16, device="meta")
    q = QTensor(
        torch.empty(N, K, dtype=torch.uint8, device="meta"),
        scale,
        torch.empty(N, groups, dtype=torch.uint8, device="meta") if asym else None,
        bits,
        "float" if kind == "fp8" else "int",
        block,
        inputs=InputScheme("float" if kind == "fp8" else "int", inputs) if inputs else None,
    )
    return TritonWeight.pack(q, torch.device("meta"))


class Recorder:
    """Stands in for a kernel and compiles what it is launched with."""

    def __init__(self, kernel: Any, capability: int, report: Callable[..., None]):
        self.kernel, self.capability, self.report = kernel, capability, report

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **constants: self.launch(grid, args, constants)

    def launch(
        self, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:
        names = self.kernel.arg_names
        options = {"num_warps": constants.pop("num_warps", 4)}
        values = dict(constants)
        kinds, aligned = dict.fromkeys(constants, "constexpr"), {}
        for index, (name, value) in enumerate(zip(names, args, strict=False)):
            if isinstance(value, torch.Tensor):
                kinds[name] = "*" + TYPES[value.dtype]
                aligned[(index,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                kinds[name] = "fp32"
            elif value == 1 and name not in ("magic", "per"):
                kinds[name], values[name] = "constexpr", 1
            else:
                kinds[name] = "i32"
                if value % 16 == 0 and name not in ("magic", "per"):
                    aligned[(index,)] = [["tt.divisibility", 16]]
        ordered = {name: kinds[name] for name in names}
        source = ASTSource(
            self.kernel, ordered, {(names.index(n),): v for n, v in values.items()}, aligned
        )
        made = triton.compile(
            source, target=GPUTarget("cuda", self.capability, 32), options=options
        )
        self.report(self.kernel.__name__, grid, made, 32 * options["num_warps"], constants)


def loop(sass: str) -> list[str]:
    """The instructions of the longest loop that holds no other."""
    place, found, lines = {}, [], []
    for line in sass.splitlines():
        text = line.rpartition("\t")[2].strip()
        if match := re.fullmatch(r"(\.?\w+):", line.strip()):
            place[match[1]] = len(lines)
            continue
        lines.append(text)
        match = re.search(r"\bBRA\b.*?(\w+);", text)
        if match and match[1] in place and len(lines) - place[match[1]] > 2:
            found = max(found, lines[place[match[1]] :], key=len)
    return found


def stack_of(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", text)[0])


def main() -> None:
    verbose = "-v" in sys.argv
    capability, name, tokens, N, K, *rest = (a for a in sys.argv[1:] if a != "-v")
    parts = rest[0].split(",") if rest else []
    weight = weight_of(name, int(N), int(K))
    layout = weight.layout
    key = tuning.Key(
        "",
        "bfloat16",
        weight.name,
        layout.zero < 0,
        layout.group,
        int(N),
        int(K),
        tuning.bucket(int(tokens)),
    )
    config = tuning.default(key, PROCESSORS)

    def report(kernel: str, grid: Any, made: Any, threads: int, constants: dict[str, Any]) -> None:
        body = loop(made.asm["sass"])
        line: dict[str, Any] = {
            "kernel": kernel,
            "config": str(config),
            "programs": grid[0] * (grid[1] if len(grid) > 1 else 1),
            "shared": made.metadata.shared,
            "stack": stack_of(made.asm["cubin"]),
            "loop": len(body),
        }
        if kernel == "linear_kernel":
            weights = constants["S"] * constants["R"] * 128 / threads
            line["instructions a weight"] = round(len(body) / weights, 2)
            line["copied 16 bytes at a time"] = made.asm["ptx"].count("cp.async.cg.shared.global")
        print(json.dumps(line))
        if verbose:
            print(Counter(re.sub(r"^@\S+ ", "", x).split(".")[0].split(" ")[0] for x in body))

    for kernel in ("linear_kernel", "reduce_kernel", "prepare_kernel", "dequantize_kernel"):
        own = Recorder(getattr(triton_linear, kernel), int(capability), report)
        setattr(triton_linear, kernel, own)
    x = torch.empty(int(tokens), int(K), dtype=torch.bfloat16, device="meta")
    norm = torch.empty(int(K), dtype=torch.bfloat16, device="meta") if "norm" in parts else None
    weight.fused(x, Fusion(norm, 1e-5, gated="gated" in parts), config=config)


if __name__ == "__main__":
    main()
