"""auto-round on given token blocks. Runs in the peers' environment.

python run_autoround.py MODEL_FOLDER TOKENS.json BITS GROUP_SIZE ITERS BATCH OUTPUT_FOLDER

Saved as its "fake" format: a plain folder of the weights as they come back from their integers. The
files are 16-bit; the bits per weight are those asked for.
"""

import json
import sys

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    model_path, tokens_path, bits, group_size, iters, batch, output = sys.argv[1:]
    with open(tokens_path, encoding="utf-8") as file:
        tokens = torch.tensor(json.load(file))
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(model_path),
        bits=int(bits),
        group_size=int(group_size),
        sym=False,
        iters=int(iters),
        batch_size=int(batch),
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=[{"input_ids": row.unsqueeze(0)} for row in tokens],
        device_map="cpu",
    )
    rounding.quantize_and_save(output, format="fake")


if __name__ == "__main__":
    main()
