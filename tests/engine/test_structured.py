"""Grammars in the engine: the same output at any draft depth, the masked model's distribution (brute force), failure
of one request alone."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from stepflash.assistant.budget import ThoughtLimit
from stepflash.chat.answer_format import AnswerFormat
from stepflash.chat.grammar import AnswerGrammar, GrammarCompiler
from stepflash.chat.messages import Tool
from stepflash.chat.parser import parse
from stepflash.chat.tokenizer import Tokenizer
from stepflash.chat.tool_grammar import CallRules, answer_grammar
from stepflash.engine.constraints import AllOf
from stepflash.engine.core import EngineCore
from tests.engine.conftest import MICRO, drive, request
from tests.engine.test_sampler import CHI_SQUARE_999, chi_square

NewCore = Callable[..., EngineCore]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "colors": {
            "type": "array",
            "items": {"enum": ["red", "green", "blue"]},
            "minItems": 1,
            "maxItems": 3,
        },
        "size": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "colors", "size"],
    "additionalProperties": False,
}
TOOL = Tool(
    definition={"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}, is_strict=True
)
JSON = AnswerFormat("json_schema", SCHEMA, "f").grammar()
CALLS = answer_grammar([TOOL], CallRules(demanded=("paint",), is_single=True), None)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(MICRO)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def asked(name: str, constraint: Any, **options: Any) -> Any:
    options = {"max_tokens": 200, "ignore_eos": False, "constraint": constraint, **options}
    return request(name, [9, 10, 11] * 6, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("grammar", [JSON, CALLS], ids=["json", "call"])
def test_the_answer_is_the_same_at_any_depth_and_fits(
    new_core: NewCore, compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: str, temperature: float
) -> None:
    outputs = []
    for depth in (0, 1, 2, 3, None):
        core = new_core(eos_token_ids=tuple(tokenizer.eos_token_ids), vocab_limit=tokenizer.vocab_size)
        constraint = compiler.compile(grammar, param="f")
        done = drive(core, asked("a", constraint, temperature=temperature, seed=5, draft_depth=depth))["a"]
        assert done.last.finish_reason == "stop"
        outputs.append(done.token_ids)
        if grammar == CALLS:
            assert done.stats.num_forced_tokens > 10
            assert done.stats.num_steps < len(done.token_ids)
    assert all(other == outputs[0] for other in outputs)
    text = tokenizer.decode(outputs[0][:-1])
    if grammar == CALLS:
        (call,) = parse(f"\n</think>\n{text}", [TOOL]).tool_calls
        value: Any = dict(call.arguments)
    else:
        value = json.loads(text)
    jsonschema.validate(value, SCHEMA)


def test_a_grammar_behind_a_thought_with_a_budget(
    new_core: NewCore, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    """A thought of ten tokens, its closing, then JSON: both constraints at once, drafts or not."""
    closing = tokenizer.encode("Enough.</think>")  # this vocabulary has no token for the tag
    outputs = []
    for depth in (0, 3):
        core = new_core(eos_token_ids=tuple(tokenizer.eos_token_ids), vocab_limit=tokenizer.vocab_size)
        limit = ThoughtLimit(10, closing, token_bytes=tokenizer.token_bytes)
        both = AllOf([limit, compiler.compile(JSON, param="f", in_thought=True)])
        outputs.append(drive(core, asked("a", both, draft_depth=depth, max_tokens=300))["a"].token_ids)
    assert outputs[0] == outputs[1]
    assert outputs[0][10 : 10 + len(closing)] == closing
    answer = tokenizer.decode(outputs[0][10 + len(closing) : -1])
    jsonschema.validate(json.loads(answer), SCHEMA)


def test_sampling_under_a_grammar_has_the_distribution_of_the_masked_model(
    new_core: NewCore, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    """Every path to one of a few words is scored by hand: softmax over the tokens that can still lead to a word."""
    words = [a + b for a, b in itertools.product("ab", "xyz")]
    grammar = "start: " + " | ".join(json.dumps(word) for word in words)
    core = new_core(
        max_num_batched_tokens=256,
        max_num_seqs=32,
        max_waiting=4000,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
        vocab_limit=tokenizer.vocab_size,
    )
    prompt = [9] * 8
    requests = [
        request(
            f"r{i}",
            prompt,
            max_tokens=4,
            temperature=1.5,
            seed=i,
            ignore_eos=False,
            constraint=compiler.compile(grammar, param="f"),
        )
        for i in range(1000)
    ]
    done = drive(core, *requests, max_steps=100_000)
    counts = Counter(tokenizer.decode(entry.token_ids[:-1]) for entry in done.values())
    assert set(counts) <= set(words)

    expected = dict.fromkeys(words, 0.0)

    def follow(token_ids: list[int], written: str, probability: float) -> None:
        if written in words:
            expected[written] += probability
            return
        ways = [
            i
            for i in range(tokenizer.vocab_size)
            if (text := tokenizer.decode([i])) and any(word.startswith(written + text) for word in words)
        ]
        logits = core.runner.model.logits(torch.tensor([*prompt, *token_ids]))[-1][ways].double() / 1.5
        for way, weight in zip(ways, logits.softmax(-1).tolist(), strict=True):
            follow([*token_ids, way], written + tokenizer.decode([way]), probability * weight)

    follow([], "", 1.0)
    assert sum(expected.values()) == pytest.approx(1.0)
    statistic, freedom = chi_square(
        np.array([counts[word] for word in words]), np.array([expected[word] for word in words])
    )
    assert statistic < CHI_SQUARE_999[freedom]


def test_a_grammar_that_fails_ends_its_own_request(
    new_core: NewCore, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    class Careless(AnswerGrammar):
        """Allows any first token, and so one that the grammar does not know."""

        def mask(self) -> Any:
            return super().mask() if self._answer else np.ones(tokenizer.vocab_size, dtype=np.bool_)

    made = compiler.compile('start: "never"', param="f")
    careless = Careless(made._vocabulary, made._matcher, param="f", in_thought=False, may_end=False)
    core = new_core(eos_token_ids=tuple(tokenizer.eos_token_ids), vocab_limit=tokenizer.vocab_size)
    done = drive(core, asked("good", compiler.compile(JSON, param="f")), asked("bad", careless))
    assert done["good"].last.finish_reason == "stop"
    assert done["bad"].last.finish_reason == "error"
    assert "f: the grammar cannot go on" in str(done["bad"].last.error)
    fault = done["bad"].last.request_error
    assert fault is not None
    assert (fault.param, fault.code) == ("f", "grammar_failed")
