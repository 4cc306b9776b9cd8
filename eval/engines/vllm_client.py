"""vLLM on token prompts. Runs in vLLM's own environment, alone.

    python vllm_client.py FOLDER PROMPTS.json OUTPUT.json

PROMPTS: list of token lists. OUTPUT: for each, the greedy continuation and the log-probability of
every prompt token but the first.
"""

import json
import sys

from vllm import LLM, SamplingParams
from vllm import __version__ as version

NEW_TOKENS = 16


def main() -> None:
    folder, prompts_path, output = sys.argv[1:]
    with open(prompts_path, encoding="utf-8") as file:
        prompts = json.load(file)
    engine = LLM(
        folder, dtype="bfloat16", enforce_eager=True, max_model_len=512, max_num_seqs=8, seed=0
    )
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, prompt_logprobs=0)
    answers = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling)
    found = [
        {
            "tokens": list(answer.outputs[0].token_ids),
            "text": answer.outputs[0].text,
            "logprobs": [
                entry[token].logprob
                for token, entry in zip(prompt[1:], answer.prompt_logprobs[1:], strict=True)
            ],
        }
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    with open(output, "w", encoding="utf-8") as file:
        json.dump({"version": version, "answers": found}, file)


if __name__ == "__main__":
    main()
