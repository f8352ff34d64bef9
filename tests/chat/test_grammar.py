"""Grammars over token ids: against jsonschema and `re` (independent), and against a fresh constraint (property)."""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
import time
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.chat.answer_format import JSON_OBJECT, AnswerFormat
from stepflash.chat.grammar import PATIENCE_SECONDS, SLOW_MASK_SECONDS, AnswerGrammar, GrammarCompiler
from stepflash.chat.messages import Tool
from stepflash.chat.thought_end import THINK_END, advance
from stepflash.chat.tool_grammar import FREE_CALLS, answer_grammar
from stepflash.errors import BadSchema, RequestError
from tests.chat.grammar_walks import compiler, tokenizer, walk
from tests.scripted_engine import byte_tokenizer

PROPERTY = settings(max_examples=60)


def compiled(form: AnswerFormat, **options: Any) -> AnswerGrammar:
    form.check()
    return compiler().compile(form.grammar(), param=form.param, **options)


def schemas(depth: int = 2) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas that are enforced in full."""
    annotated = st.fixed_dictionaries(
        {}, optional={"title": st.just("T"), "description": st.text(max_size=5)}
    )
    scalars: list[st.SearchStrategy[dict[str, Any]]] = [
        st.just({"type": "string"}),
        st.just({"type": "string", "minLength": 2, "maxLength": 5}),
        st.sampled_from(["^[a-z]{2,4}$", "[a-z]", "^(ja|nein)$", "[aeiou]|^$"]).map(
            lambda pattern: {"type": "string", "pattern": pattern}
        ),
        st.sampled_from(["date", "uuid", "made-up-format"]).map(lambda f: {"type": "string", "format": f}),
        st.tuples(st.integers(-50, 50), st.integers(0, 50)).map(
            lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
        ),
        st.sampled_from(["integer", "number", "boolean", "null"]).map(lambda kind: {"type": kind}),
        st.lists(
            st.one_of(st.text(max_size=4), st.integers(-9, 9), st.none(), st.booleans()),
            min_size=1,
            max_size=4,
        ).map(lambda values: {"enum": values}),
    ]
    scalar = st.tuples(st.one_of(scalars), annotated).map(lambda pair: {**pair[1], **pair[0]})
    if depth == 0:
        return scalar
    inner = schemas(depth - 1)
    arrays = st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
        lambda t: {"type": "array", "items": t[0], "minItems": t[1], "maxItems": t[1] + t[2]}
    )
    objects = st.tuples(
        st.dictionaries(st.sampled_from(["a", "b c", "\u00e9", 'q"']), inner, max_size=3), st.integers(0, 7)
    ).map(
        lambda t: {
            "type": "object",
            "properties": t[0],
            "required": [name for i, name in enumerate(t[0]) if t[1] >> i & 1],
            "additionalProperties": False,
        }
    )
    either = st.lists(inner, min_size=1, max_size=3).map(lambda ways: {"anyOf": ways})
    return st.one_of(scalar, arrays, objects, either)


@PROPERTY
@given(schema=schemas(), seed=st.integers(0, 2**32))
def test_every_answer_fits_its_schema(schema: dict[str, Any], seed: int) -> None:
    text = walk(compiled(AnswerFormat("json_schema", schema, "f")), seed)
    assert text is not None
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.parametrize("seed", range(12))
def test_json_objects_are_json_objects(seed: int) -> None:
    text = walk(compiled(AnswerFormat("json_schema", JSON_OBJECT, "f")), seed, num_free=15)
    assert text is not None
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("pattern", [r"\d{3}-\d{4}", "(yes|no)!?", "[^a]{1,3}", "a/b+"])
def test_a_regular_expression_matches_as_a_whole(pattern: str) -> None:
    for seed in range(10):
        text = walk(compiled(AnswerFormat("regex", pattern, "f")), seed, num_free=4)
        assert text is not None
        assert re.fullmatch(pattern, text), text


def test_references_and_recursion() -> None:
    schema = {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 3},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                },
                "required": ["name", "children"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    }
    for seed in range(10):
        text = walk(compiled(AnswerFormat("json_schema", schema, "f")), seed)
        assert text is not None
        jsonschema.validate(json.loads(text), schema)


WRONG: list[tuple[Any, Any, str]] = [
    ("json_schema", 5, "must be a JSON schema"),
    ("json_schema", False, "must be a JSON schema"),
    ("json_schema", {"type": "strin"}, "strin"),
    ("json_schema", {"type": "string", "pattern": "a("}, "unclosed group"),
    ("json_schema", {"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
    ("json_schema", {"type": "object", "properties": {"x": {"not": {}}}}, "not"),
    ("json_schema", {"$ref": "#/$defs/nowhere"}, "nowhere"),
    ("json_schema", {"$ref": "http://example.com/schema"}, "example.com"),
    ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    ("regex", "a(", "unclosed group"),
    ("regex", "(?!a)b", "look-around"),
    ("regex", None, "must be a string"),
    ("lark", "start: foo", "foo"),
    ("lark", "start foo ((", "Expected token"),
    ("lark", "", "mpty"),
    ("lark", "start: " + "(" * 100_000 + '"a"' + ")" * 100_000, "nested"),
    ("lark", "x" * (1 << 20) + "y", "longer than"),
]


@pytest.mark.parametrize(("kind", "definition", "message"), WRONG)
def test_what_cannot_be_enforced_is_refused(kind: Any, definition: Any, message: str) -> None:
    with pytest.raises(BadSchema, match=message) as error:
        AnswerFormat(kind, definition, "response_format.x").check()
    assert error.value.param == "response_format.x"
    assert str(error.value).startswith("response_format.x: ")
    assert "\n" not in str(error.value)


def test_deeply_nested_schemas_are_refused() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(150):
        schema = {"type": "array", "items": schema}
    with pytest.raises(BadSchema, match="levels deep"):
        AnswerFormat("json_schema", schema, "f").check()


# The thought before the answer

NUMBER = AnswerFormat("regex", "[0-9]{2}", "f")


def test_the_first_token_behind_the_thought_is_constrained() -> None:
    ids, end = tokenizer(), tokenizer().think_end_id
    constraint = compiled(NUMBER, in_thought=True)
    for token_id in ids.encode("I think of {\n"):
        assert constraint.mask()[token_id]
        constraint.accept(token_id)
    assert not constraint.mask()[sorted(ids.eos_token_ids)].any()
    assert end is not None
    constraint.accept(end)
    allowed = {ids.decode([int(i)]) for i in np.flatnonzero(constraint.mask())}
    assert {text[0] for text in allowed} <= set("0123456789")
    constraint.rollback(1)
    assert constraint.mask().sum() == ids.vocab_size - len(ids.eos_token_ids)
    loose = compiled(NUMBER, in_thought=True, may_end_in_thought=True)
    assert loose.mask()[sorted(ids.eos_token_ids)].all()


def test_a_closing_tag_that_is_spelled_out_ends_the_thought_too() -> None:
    constraint = GrammarCompiler(byte_tokenizer()).compile(NUMBER.grammar(), param="f", in_thought=True)
    single = byte_tokenizer().backend.get_vocab(with_added_tokens=True)
    for character in "x<</think>":
        assert constraint.mask().sum() > 100
        constraint.accept(single[character])
    assert constraint.mask().sum() == 10


def test_no_token_may_reach_from_the_thought_into_the_answer() -> None:
    """Of a vocabulary that has such tokens: they are masked where they would, and only there."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from stepflash.chat.tokenizer import Tokenizer

    texts = [
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "nk>5",
        "k>",
        ">7",
        "a</think>b",
        "</think>",
        "<|im_end|>",
    ]
    backend = tokenizers.Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken("<|im_end|>", normalized=False)])
    token = {text: i for i, text in enumerate(texts)}
    constraint = GrammarCompiler(Tokenizer(backend)).compile(NUMBER.grammar(), param="f", in_thought=True)
    masks = {}
    for written in ["", *"</thin"]:
        if written:
            constraint.accept(token[written])
        masks[written] = constraint.mask()
    for written, mask in masks.items():
        assert mask[token["nk>5"]] == (written != "i")
        assert mask[token["k>"]]
        assert not mask[token["a</think>b"]]
    assert masks["n"][token[">7"]]
    constraint.accept(token["k"])
    assert not constraint.mask()[token[">7"]]
    constraint.accept(token[">"])
    assert constraint.mask().sum() == 10


@given(
    tokens=st.lists(
        st.binary(max_size=4) | st.sampled_from([b"<", b"</", b"think", b">", b"nk>", b"</think>"])
    )
)
def test_the_end_of_a_thought_is_where_the_text_has_the_tag(tokens: list[bytes]) -> None:
    progress, text = 0, b""
    for token in tokens:
        progress, text = advance(progress, token), text + token
        assert (progress == len(THINK_END)) == (THINK_END in text)
        if progress == len(THINK_END):
            break


# Back and forth

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "n": {"type": "integer"}, "f": {"enum": ["on", "off"]}},
    "required": ["name", "n", "f"],
}


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), in_thought=st.booleans())
def test_any_walk_forward_and_back_gives_the_masks_of_the_path(seed: int, in_thought: bool) -> None:
    form = AnswerFormat("json_schema", SCHEMA, "f")
    draw = random.Random(seed)
    constraint = compiled(form, in_thought=in_thought)
    path: list[int] = []
    undone: list[int] = []
    for _ in range(60):
        choice = draw.random()
        if choice < 0.25 and path:
            count = draw.randint(1, min(5, len(path)))
            undone = path[len(path) - count :]
            constraint.rollback(count)
            del path[len(path) - count :]
        elif choice < 0.4 and undone:
            # Forth again as before, as after the verification of drafts.
            constraint.accept(undone[0])
            path.append(undone.pop(0))
        else:
            undone = []
            allowed = [
                int(i) for i in np.flatnonzero(constraint.mask()) if i not in tokenizer().eos_token_ids
            ]
            if not allowed:
                continue
            end = tokenizer().think_end_id
            token_id = end if end in allowed and draw.random() < 0.3 else draw.choice(allowed)
            constraint.accept(token_id)
            path.append(token_id)
        fresh = compiled(form, in_thought=in_thought)
        for token_id in path:
            fresh.accept(token_id)
        if draw.random() < 0.7:
            assert (constraint.mask() == fresh.mask()).all()
            assert list(constraint.forced()) == list(fresh.forced())


def test_forced_tokens_are_the_only_ones_allowed() -> None:
    constraint = compiled(AnswerFormat("json_schema", SCHEMA, "f"))
    for token_id in tokenizer().encode('{"'):
        constraint.accept(token_id)
    forced = constraint.forced()
    assert tokenizer().decode(forced).startswith("name")
    for token_id in forced:
        assert np.flatnonzero(constraint.mask()).tolist() == [token_id]
        constraint.accept(token_id)


def test_a_copy_goes_its_own_way() -> None:
    constraint = compiled(NUMBER)
    constraint.accept(tokenizer().encode("1")[0])
    twin = copy.deepcopy(constraint)
    twin.accept(tokenizer().encode("2")[0])
    assert twin.mask()[sorted(tokenizer().eos_token_ids)].all()
    assert not constraint.mask()[sorted(tokenizer().eos_token_ids)].any()


def test_a_token_that_was_never_allowed_fails_this_constraint_alone() -> None:
    constraint, other = compiled(NUMBER), compiled(NUMBER)
    constraint.accept(tokenizer().encode("x")[0])
    with pytest.raises(ValueError, match="cannot go on"):
        constraint.mask()
    assert other.mask().any()


def test_a_grammar_that_failed_on_a_draft_goes_on_without_it() -> None:
    constraint, other = compiled(NUMBER), compiled(NUMBER)
    one, wrong = tokenizer().encode("1")[0], tokenizer().encode("x")[0]
    for both in (constraint, other):
        both.accept(one)
    constraint.accept(wrong)
    with pytest.raises(ValueError, match="cannot go on"):
        constraint.mask()
    constraint.rollback(1)
    assert (constraint.mask() == other.mask()).all()
    for both in (constraint, other):
        both.accept(one)
    assert (constraint.mask() == other.mask()).all()


def test_a_grammar_that_takes_ever_longer_fails_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, SLOW_MASK_SECONDS * 1.5)  # read twice for each mask
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    digit = tokenizer().encode("1")[0]
    constraint = compiled(AnswerFormat("regex", "[0-9]*", "f"))
    with pytest.raises(RequestError, match=r"f: the grammar is too ambiguous: .* 30 ms a token"):  # noqa: PT012
        while True:
            constraint.mask()
            constraint.accept(digit)
    assert PATIENCE_SECONDS <= next(clock) / 2 < PATIENCE_SECONDS + 0.1


def test_a_long_answer_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, SLOW_MASK_SECONDS * 0.9)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    digit = tokenizer().encode("1")[0]
    constraint = compiled(AnswerFormat("regex", "[0-9]*", "f"))
    while next(clock) < 3 * PATIENCE_SECONDS:
        assert constraint.mask()[digit]
        constraint.accept(digit)


def test_an_answer_in_a_format_or_calls() -> None:
    tool = Tool(
        definition={"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    )
    grammar = answer_grammar([tool], FREE_CALLS, AnswerFormat("json_schema", SCHEMA, "f"))
    assert grammar is not None
    constraint = compiler().compile(grammar, param="f")
    first = {tokenizer().decode([int(i)]) for i in np.flatnonzero(constraint.mask())}
    assert {text[0] for text in first} == {"{", "<"}
