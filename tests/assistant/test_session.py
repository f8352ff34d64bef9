"""The session over a scripted engine: any bursts give the same events, usage adds up, requests end."""

import asyncio
import itertools
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.assistant.reader import StopStrings
from stepflash.assistant.session import EMPTY_THOUGHT, Session, as_choice
from stepflash.assistant.stream import Answer, Fold, Progress, Usage, fold, merge, total_usage
from stepflash.chat.messages import Conversation, Finish, Message, Tool
from stepflash.engine.request import SamplingParams
from stepflash.errors import EngineError, PromptTooLong, RequestError
from tests.scripted_engine import END, ScriptedEngine, byte_tokenizer, engine_of, scripted_session

HELLO = Conversation(messages=(Message(role="user", content="hello"),))
WEATHER = Tool(
    definition={
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
)
CALL = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
UNLIMITED = SamplingParams(max_tokens=None)


def answer(
    session: Session, conversation: Conversation = HELLO, sampling: SamplingParams = UNLIMITED, **options
) -> Answer:
    prompt = session.prepare(conversation, sampling, **options)
    return asyncio.run(fold(session.answer(prompt)))


def test_thought_answer_and_usage() -> None:
    session = scripted_session("Let me think\n</think>\nHi there" + END)
    result = answer(session)
    assert (result.reasoning, result.content) == ("Let me think", "Hi there")
    assert result.finish_reason == "stop"
    # 12 letters, a newline, </think>; then a newline and 8 letters; the stop token counts as generated.
    assert result.usage.reasoning_tokens == 14
    assert result.usage.completion_tokens == 14 + 9 + 1
    assert len(result.token_ids) == 14 + 9
    assert result.usage.prompt_tokens == len(engine_of(session).requests[0].prompt_token_ids)


@pytest.mark.parametrize("bursts", [[1], [3], [100]])
def test_a_thought_that_is_opened_once_more_is_counted_up_to_its_end(bursts: list[int]) -> None:
    result = answer(scripted_session("uni<think>box\n</think>\nHi" + END, bursts=bursts))
    assert (result.reasoning, result.content) == ("box", "uniHi")
    assert result.usage.reasoning_tokens == len("uni") + 1 + len("box\n") + 1


def test_prompt_is_the_encoded_template() -> None:
    session = scripted_session("x" + END)
    answer(session)
    request = engine_of(session).requests[0]
    text = session.tokenizer.decode(request.prompt_token_ids)
    assert text.endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n")
    # One cut, after the user's turn: what lies behind it is the generation prompt.
    (cut,) = request.cut_points
    assert session.tokenizer.decode(request.prompt_token_ids[cut:]) == "<|im_start|>assistant\n<think>\n"


TEXTS = st.sampled_from(
    [
        "thought\n</think>\nanswer" + END,
        "no end of the thought" + END,
        "</think>" + END,
        "t</think>Gr\u00fc\u00dfe aus \u5317\u4eac \U0001f680" + END,
        "t\n</think>\nlook: " + CALL + END,
        "t\n</think>\n" + CALL + CALL + END,
        "t\n</think>\na STO b STOP c" + END,
        "cut off </thi",
    ]
)


@settings(max_examples=50)
@given(text=TEXTS, bursts=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_every_burst_gives_the_same_answer(text: str, bursts: list[int]) -> None:
    def run(sizes: list[int]) -> Answer:
        conversation = Conversation(messages=HELLO.messages, tools=(WEATHER,))
        session = scripted_session(text, bursts=sizes)
        return answer(session, conversation, SamplingParams(max_tokens=None, stop=("STOP",)))

    one_by_one, in_bursts = run([1]), run(bursts)
    assert in_bursts.reasoning == one_by_one.reasoning
    assert in_bursts.content == one_by_one.content
    assert [(c.name, c.arguments) for c in in_bursts.tool_calls] == [
        (c.name, c.arguments) for c in one_by_one.tool_calls
    ]
    assert in_bursts.finish_reason == one_by_one.finish_reason


def test_stop_string_ends_the_answer_and_the_request() -> None:
    session = scripted_session("STOP\n</think>\none STOP two" + END)
    result = answer(session, sampling=SamplingParams(stop=("STOP",)))
    # The thought may hold the stop string; the answer ends before it.
    assert (result.reasoning, result.content, result.finish_reason) == ("STOP", "one ", "stop")
    assert engine_of(session).aborted == [engine_of(session).requests[0].request_id]


@pytest.mark.parametrize("bursts", [[1], [3], [100]])
def test_what_a_burst_holds_behind_the_end_of_an_answer_does_not_count(bursts: list[int]) -> None:
    session = scripted_session("t\n</think>\none STOP two" + END, bursts=bursts)
    result = answer(session, sampling=SamplingParams(stop=("STOP",), logprobs=0))
    said = "t\n</think>\none STOP"
    assert session.tokenizer.decode(result.token_ids) == said
    assert result.usage.completion_tokens == len(session.tokenizer.encode(said))
    assert [token.token_id for token in result.logprobs] == list(result.token_ids)
    places = result.text_logprobs
    assert len(places.content) + len(places.other) == len(result.token_ids)

    session = scripted_session("t\n</think>\n" + CALL + "\n" + CALL + END, bursts=bursts)
    conversation = Conversation(messages=HELLO.messages, tools=(WEATHER,))
    result = answer(session, conversation, max_tool_calls=1)
    assert session.tokenizer.decode(result.token_ids) == "t\n</think>\n" + CALL
    assert result.usage.completion_tokens == len(result.token_ids)


@pytest.mark.parametrize("bursts", [[1], [3], [100]])
@pytest.mark.parametrize("limit", [None, 1, 2])
def test_a_call_that_is_cut_off_is_no_whole_one(bursts: list[int], limit: int | None) -> None:
    conversation = Conversation(messages=HELLO.messages, tools=(WEATHER,))

    def finish_reason(calls: str) -> str:
        session = scripted_session("t\n</think>\n" + calls, bursts=bursts)
        return answer(session, conversation, max_tool_calls=limit).finish_reason

    assert finish_reason(CALL[: CALL.index("lo\n</parameter>")]) == "length"
    second_is_cut = finish_reason(CALL + CALL[: CALL.index("lo\n</parameter>")])
    assert second_is_cut == ("tool_calls" if limit == 1 else "length")
    assert finish_reason(CALL + END) == "tool_calls"


def test_held_back_text_is_given_when_the_answer_ends() -> None:
    session = scripted_session("t\n</think>\nS ST" + END)
    assert answer(session, sampling=SamplingParams(stop=("STOP",))).content == "S ST"


@given(
    text=st.text(alphabet="ab", max_size=30),
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_stop_strings_against_brute_force(text: str, stop: list[str], cuts: list[int]) -> None:
    """However the text is cut, what passes is the text before the stop string that is complete first."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    bounds = sorted({0, len(text), *(c for c in cuts if c <= len(text))})
    matcher, shown, found = StopStrings(tuple(stop)), "", None
    for low, high in itertools.pairwise(bounds):
        piece, found = matcher.push(text[low:high])
        shown += piece
        if found:
            break
    if not found:
        shown += matcher.flush()
    assert (found is not None) == bool(ends)
    assert found is None or (shown + found in text and found in stop)
    assert shown == (text[: min(ends)[1]] if ends else text)


def test_tool_call_events_and_reason() -> None:
    session = scripted_session("t\n</think>\n" + CALL + END, bursts=[5])
    result = answer(session, Conversation(messages=HELLO.messages, tools=(WEATHER,)))
    (call,) = result.tool_calls
    assert (call.name, call.arguments) == ("weather", '{"city": "Oslo"}')
    assert result.finish_reason == "tool_calls"
    assert result.to_message().tool_calls[0].arguments == {"city": "Oslo"}


def test_without_tools_a_call_is_text() -> None:
    result = answer(scripted_session("t\n</think>\n" + CALL + END))
    assert (result.content, result.tool_calls, result.finish_reason) == (CALL, (), "stop")


def test_tool_call_limit_ends_the_request() -> None:
    session = scripted_session("t\n</think>\n" + CALL + CALL + END, bursts=[7])
    conversation = Conversation(messages=HELLO.messages, tools=(WEATHER,))
    result = answer(session, conversation, max_tool_calls=1)
    assert len(result.tool_calls) == 1
    assert result.finish_reason == "tool_calls"
    assert engine_of(session).aborted


def test_prefill_is_prompt_and_a_call_that_it_opens_is_told() -> None:
    session = scripted_session("<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>" + END)
    conversation = Conversation(messages=HELLO.messages, tools=(WEATHER,))
    prefill = "<tool_call>\n<function=weather>\n"
    result = answer(session, conversation, prefill=prefill)
    assert session.tokenizer.decode(engine_of(session).requests[0].prompt_token_ids).endswith(
        "<think>\n" + EMPTY_THOUGHT + prefill
    )
    assert [(call.name, call.arguments) for call in result.tool_calls] == [("weather", '{"city": "Oslo"}')]
    assert (result.reasoning, result.usage.reasoning_tokens) == (None, 0)


def test_max_tokens_is_clamped_to_the_room_left() -> None:
    session = scripted_session("long text without an end" * 10, max_context_tokens=100)
    result = answer(session, sampling=SamplingParams(max_tokens=32_000))
    request = engine_of(session).requests[0]
    assert request.sampling.max_tokens == 100 - len(request.prompt_token_ids)
    assert result.finish_reason == "length"


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers() -> None:
    session = scripted_session("x" + END, max_context_tokens=10)
    with pytest.raises(PromptTooLong) as caught:
        session.prepare(HELLO, SamplingParams())
    assert caught.value.max_tokens == 10
    assert caught.value.num_tokens > 10
    assert not engine_of(session).requests


def test_raw_text_gets_bos_and_is_not_parsed() -> None:
    session = scripted_session("a</think>b" + END)
    prompt = session.prepare_text("go on", SamplingParams())
    assert prompt.request.prompt_token_ids[0] == session.tokenizer.bos_token_id
    assert asyncio.run(fold(session.answer(prompt))).content == "a</think>b"
    assert session.prepare_text([5, 6], SamplingParams()).request.prompt_token_ids == (5, 6)


@pytest.mark.parametrize("prompt", [[], [10_000], [-1]])
def test_wrong_token_ids_are_refused(prompt: list[int]) -> None:
    with pytest.raises(RequestError) as caught:
        scripted_session("x").prepare_text(prompt, SamplingParams())
    assert caught.value.param == "prompt"


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(RequestError) as caught:
        scripted_session("x").prepare(HELLO, SamplingParams(logit_bias={100_000: 1.0}))
    assert caught.value.param == "logit_bias"


def test_an_engine_error_ends_the_stream() -> None:
    session = scripted_session("abc" + END, error="NaN logits", error_after=2)
    with pytest.raises(EngineError, match="NaN logits"):
        answer(session)


def test_closing_a_stream_aborts_its_request() -> None:
    session = scripted_session("many words\n</think>\nindeed" + END)

    async def read_three() -> None:
        async with aclosing(session.chat(HELLO, SamplingParams())) as stream:
            for _ in range(3):
                await anext(stream)

    asyncio.run(read_three())
    assert engine_of(session).aborted == [engine_of(session).requests[0].request_id]


def test_a_finished_request_is_not_aborted() -> None:
    session = scripted_session("t\n</think>\nx" + END)
    answer(session)
    assert engine_of(session).aborted == []


def test_finish_is_last_and_once() -> None:
    session = scripted_session("t\n</think>\nx" + END, bursts=[100])

    async def items() -> list:
        return [item async for item in session.chat(HELLO, SamplingParams())]

    stream = asyncio.run(items())
    assert isinstance(stream[0], Progress)
    assert [item for item in stream if isinstance(item, Finish)] == [stream[-1]]


def test_choices_differ_in_id_and_seed() -> None:
    session = scripted_session("x" + END)
    prompt = session.prepare(HELLO, SamplingParams(seed=5))
    choices = [as_choice(prompt, index) for index in range(3)]
    assert [choice.request.sampling.seed for choice in choices] == [5, 6, 7]
    assert len({choice.request.request_id for choice in choices}) == 3


@pytest.mark.parametrize("num_streams", [1, 3])
def test_merge_keeps_the_order_of_each_stream(num_streams: int) -> None:
    texts = [f"t{index}\n</think>\nanswer {index}" + END for index in range(num_streams)]
    session = scripted_session(*texts, bursts=[3])

    async def run() -> list[Answer]:
        prompt = session.prepare(HELLO, SamplingParams())
        folds = [Fold() for _ in texts]
        streams = [session.answer(as_choice(prompt, index)) for index in range(num_streams)]
        async with aclosing(merge(streams)) as items:
            async for index, item in items:
                folds[index].add(item)
        return [collected.answer() for collected in folds]

    contents = [result.content for result in asyncio.run(run())]
    assert sorted(contents) == sorted(f"answer {index}" for index in range(num_streams))


def test_a_failure_in_one_of_several_streams_ends_all() -> None:
    good, bad = scripted_session("good" * 100, pause=0.001), scripted_session("x", error="broken")

    async def run() -> None:
        streams = [session.chat(HELLO, UNLIMITED) for session in (good, bad)]
        async for _ in merge(streams):
            pass

    with pytest.raises(EngineError, match="broken"):
        asyncio.run(run())
    assert len(engine_of(good).aborted) == 1


def test_total_usage_counts_a_shared_prompt_once() -> None:
    usages = [Usage(prompt_tokens=10, completion_tokens=n, cached_tokens=4) for n in (1, 2, 3, 4)]
    assert total_usage(usages, 2) == Usage(prompt_tokens=20, completion_tokens=10, cached_tokens=8)
    assert total_usage(usages, 4).prompt_tokens == 10


def test_the_double_itself_round_trips_text() -> None:
    tokenizer = byte_tokenizer()
    text = "Gr\u00fc\u00dfe <think> \U0001f680"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert isinstance(scripted_session("x").engine, ScriptedEngine)
