"""llm-compressor on given token blocks. Runs in the peers' environment.

python run_llmcompressor.py METHOD MODEL_FOLDER TOKENS.json BITS GROUP_SIZE OUTPUT_FOLDER
METHOD: awq (duo scaling "both"), gptq (activation order "static", which files without g_idx can hold),
gptq-imatrix (the same on grids searched by activation-weighted error instead of min-max); and at 8 bits by
row, with no use for GROUP_SIZE: w8a16, w8a8, fp8 (rounded to nearest), smooth-w8a8 and smooth-gptq-w8a8
(SmoothQuant of strength 0.8 before, as in its examples)
"""

import json
import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM


def main() -> None:
    method, model_path, tokens_path, bits, group_size, output = sys.argv[1:]
    if not torch.cuda.is_available():
        # 0.14 pins host memory even without an accelerator, where pinning fails.
        torch.Tensor.pin_memory = lambda tensor, *_: tensor
    with open(tokens_path, encoding="utf-8") as file:
        tokens = json.load(file)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens]
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    weights = {
        "num_bits": int(bits),
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": int(group_size),
    }
    if method == "gptq-imatrix":
        weights["observer"] = "imatrix_mse"
    scheme = {"ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"]}}}
    scheme["config_groups"]["group_0"]["weights"] = weights
    channel = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    by_row = {"ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"]}}}
    by_row["config_groups"]["group_0"]["weights"] = channel
    preset = {"ignore": ["lm_head"], "targets": "Linear"}
    recipe = {
        "awq": lambda: [AWQModifier(duo_scaling="both"), QuantizationModifier(**scheme)],
        "gptq": lambda: [GPTQModifier(actorder="static", **scheme)],
        "gptq-imatrix": lambda: [GPTQModifier(actorder="static", **scheme)],
        "w8a16": lambda: [QuantizationModifier(**by_row)],
        "w8a8": lambda: [QuantizationModifier(scheme="W8A8", **preset)],
        "fp8": lambda: [QuantizationModifier(scheme="FP8_DYNAMIC", **preset)],
        "smooth-w8a8": lambda: [
            SmoothQuantModifier(smoothing_strength=0.8),
            QuantizationModifier(scheme="W8A8", **preset),
        ],
        "smooth-gptq-w8a8": lambda: [
            SmoothQuantModifier(smoothing_strength=0.8),
            GPTQModifier(scheme="W8A8", **preset),
        ],
    }[method]()
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        max_seq_length=len(tokens[0]),
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    model.save_pretrained(output, save_compressed=True)


if __name__ == "__main__":
    main()
