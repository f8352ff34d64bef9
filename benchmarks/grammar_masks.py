"""What a grammar costs per token: masks, tokens accepted, compiling, over nano's vocabulary and any other one.

    python benchmarks/grammar_masks.py [FOLDER OF A TOKENIZER]...

Prints one JSON object per vocabulary; times in microseconds unless named otherwise.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from stepflash.chat.answer_format import AnswerFormat
from stepflash.chat.grammar import GrammarCompiler
from stepflash.chat.messages import Tool
from stepflash.chat.tokenizer import Tokenizer
from stepflash.chat.tool_grammar import CallRules, answer_grammar
from stepflash.weights.hub import resolve_model

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mail": {"type": "string", "pattern": r"^[a-z]+@[a-z]+\.com$"},
        "note": {"type": "string"},
    },
    "required": ["name", "tags", "age", "mail", "note"],
    "additionalProperties": False,
}
NOTE = "She wrote the first program; the engine was never built. " * 4
VALUE = {"name": "Ada", "tags": ["red", "blue"], "age": 36, "mail": "ada@math.com", "note": NOTE.strip()}
TOOL = Tool(definition={"type": "function", "function": {"name": "f", "parameters": SCHEMA}}, is_strict=True)
CASES = {
    "json_schema": (AnswerFormat("json_schema", SCHEMA, "f").grammar(), json.dumps(VALUE)),
    "free text beside a strict tool": (answer_grammar([TOOL], CallRules(), None) or "", NOTE * 3),
}


def measure(tokenizer: Tokenizer, grammar: str, text: str) -> dict[str, float]:
    compiler = GrammarCompiler(tokenizer)
    start = time.perf_counter()
    compiler.compile('start: "x"', param="f")
    indexed = time.perf_counter()
    constraint = compiler.compile(grammar, param="f")
    compiled = time.perf_counter()
    masks: list[float] = []
    rest = text.encode()
    while rest:
        before = time.perf_counter()
        mask = constraint.mask()
        masks.append((time.perf_counter() - before) * 1e6)
        canonical = tokenizer.encode(rest.decode())[0]
        token_id = canonical
        if not mask[canonical]:
            ways = (i for i in mask.nonzero()[0].tolist() if tokenizer.token_bytes(i))
            token_id = next(i for i in ways if rest.startswith(tokenizer.token_bytes(i)))
        constraint.accept(token_id)
        rest = rest[len(tokenizer.token_bytes(token_id)) :]
    return {
        "index_seconds": round(indexed - start, 4),
        "compile_ms": round((compiled - indexed) * 1e3, 2),
        "num_tokens": len(masks),
        "mask_median": round(statistics.median(masks), 1),
        "mask_p99": round(sorted(masks)[int(0.99 * (len(masks) - 1))], 1),
        "mask_max": round(max(masks), 1),
    }


def main() -> None:
    for folder in [resolve_model("nano"), *map(Path, sys.argv[1:])]:
        tokenizer = Tokenizer.from_pretrained(folder)
        results = {name: measure(tokenizer, *case) for name, case in CASES.items()}
        print(json.dumps({"vocab_size": tokenizer.vocab_size, **results}))


if __name__ == "__main__":
    main()
