"""`LLM` end to end on the micro checkpoint: text, stop strings, chat, many prompts, wrong input."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import random
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.engine.llm import LLM, _Answer
from stepflash.engine.request import Output, SamplingParams
from stepflash.errors import ConfigError, EngineError, PromptTooLong, RequestError
from stepflash.settings import KV_DTYPES, EngineSettings
from tests.engine.conftest import MICRO, request

SHORT = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 512, "kv_cache_bytes": 32 << 20}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(MICRO, dtype="float32", seed=0, **SHORT)


def test_token_ids_give_the_golden_continuation(llm: LLM, golden: tuple[list[int], list[int]]) -> None:
    prompt, expected = golden
    sampling = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, logprobs=0)
    (output,) = llm.generate(prompt, sampling)
    assert output.token_ids == expected[:20]
    assert output.prompt_token_ids == prompt
    assert output.finish_reason == "length"
    assert output.logprobs is not None
    assert len(output.logprobs) == 20
    assert llm.tokenizer is not None
    assert output.text == llm.tokenizer.decode(expected[:20])


def test_many_prompts_come_back_in_order(llm: LLM) -> None:
    prompts = [f"prompt number {i}" for i in range(11)]
    sampling = [
        SamplingParams(max_tokens=3 + i % 4, temperature=0.9, seed=i, ignore_eos=True) for i in range(11)
    ]
    together = llm.generate(prompts, sampling)
    assert [len(o.token_ids) for o in together] == [3 + i % 4 for i in range(11)]
    assert together[7].token_ids == llm.generate(prompts[7], sampling[7])[0].token_ids
    assert llm.tokenizer is not None
    assert together[2].prompt_token_ids[1:] == llm.tokenizer.encode(prompts[2])
    assert llm.stats().num_running == 0


def test_text_ends_before_the_stop_string(llm: LLM) -> None:
    free = llm.generate("tell me", SamplingParams(max_tokens=40, temperature=1.0, seed=5, ignore_eos=True))[0]
    at = len(free.text) // 2
    stop = free.text[at : at + 3]
    cut = llm.generate(
        "tell me", SamplingParams(max_tokens=40, temperature=1.0, seed=5, ignore_eos=True, stop=(stop,))
    )[0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < len(free.token_ids)
    assert not llm.core.has_work


@settings(max_examples=60)
@given(data=st.data())
def test_stop_strings_do_not_depend_on_how_tokens_arrive(llm: LLM, data: st.DataObject) -> None:
    assert llm.tokenizer is not None
    text = data.draw(st.text(alphabet="ab \u00e9\u4e16", min_size=1, max_size=20))
    stops = tuple(data.draw(st.lists(st.text(alphabet="ab \u00e9", min_size=1, max_size=3), max_size=2)))
    token_ids = llm.tokenizer.encode(text)
    answer = _Answer(request("a", [5], stop=stops), llm.tokenizer)
    while token_ids and not answer.is_finished():
        count = data.draw(st.integers(1, len(token_ids)))
        now, token_ids = token_ids[:count], token_ids[count:]
        reason = None if token_ids else "length"
        answer.push(Output(request_id="a", token_ids=tuple(now), finish_reason=reason))
    found = [text.index(stop) for stop in stops if stop in text]
    # The first stop string to be complete wins; with stops of different lengths an earlier start may lose.
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    if not found:
        assert answer.output.text == text
        assert answer.output.finish_reason == "length"
    else:
        assert answer.output.finish_reason == "stop"
        assert answer.output.text in {text[:start] for _, start in ends}
        assert answer.output.stop_reason not in answer.output.text


def test_a_stop_token_is_not_part_of_the_text(llm: LLM) -> None:
    (output,) = llm.generate("x", SamplingParams(temperature=0.0, logit_bias={2: 1e4}))
    assert (output.text, output.token_ids, output.finish_reason) == ("", [2], "stop")


@pytest.fixture
def obeys_ctrl_c() -> Iterator[None]:
    """A shell starts background jobs with Ctrl-C ignored, and the tests may be one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("obeys_ctrl_c")
def test_ctrl_c_ends_a_batch_between_two_steps_and_the_llm_goes_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps, during = llm.core.step, [0], []

    def interrupted() -> list[Output]:
        steps[0] += 1
        if steps[0] == 5:
            os.kill(os.getpid(), signal.SIGINT)
            during.append("alive")  # the signal came in the middle of a step and did not break it
        return step()

    monkeypatch.setattr(llm.core, "step", interrupted)
    sampling = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6, 7]] * 9, sampling)
    assert during == ["alive"]
    assert steps == [5]
    assert not llm.core.has_work
    llm.core.check_integrity()
    assert llm.stats().kv_used_bytes == llm.stats().kv_cached_bytes
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(llm.generate([5, 6, 7], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4

    def stuck() -> list[Output]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second Ctrl-C acts at once")

    monkeypatch.setattr(llm.core, "step", stuck)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6, 7]], sampling)
    assert not llm.core.has_work


def test_a_batch_shows_its_progress_on_a_terminal(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    llm.generate([[5, 6, 7]] * 3, SamplingParams(max_tokens=4, ignore_eos=True))
    assert "generating" in shown.getvalue()
    assert "3/3" in shown.getvalue()
    assert "tok/s" in shown.getvalue()
    quiet = Terminal()
    monkeypatch.setattr(sys, "stderr", quiet)
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True), progress=False)
    assert quiet.getvalue() == ""


def test_chat_renders_answers_and_parses(llm: LLM) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    first, second = llm.chat([messages, messages], sampling_params=SamplingParams(max_tokens=8, seed=3))
    assert first.token_ids == second.token_ids
    assert first.message is not None
    assert first.message.role == "assistant"
    assert llm.chat_template is not None
    assert llm.tokenizer is not None
    rendered = llm.chat_template.render(messages, add_generation_prompt=True)
    assert first.prompt_token_ids == llm.tokenizer.encode(rendered.text)


@pytest.mark.parametrize("name", KV_DTYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kv_dtype_that_can_be_named_computes(
    golden: tuple[list[int], list[int]], name: str, dtype: str
) -> None:
    """The first tokens at least: those are far apart in this model."""
    own = LLM(MICRO, dtype=dtype, kv_dtype=name, **SHORT)  # type: ignore[arg-type]
    assert own.core.cache.limits.dtype == getattr(torch, name)
    (output,) = own.generate([golden[0]], SamplingParams(max_tokens=4, temperature=0.0))
    assert output.token_ids == golden[1][:4]
    EngineSettings(kv_dtype=name)


def test_wrong_input_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(PromptTooLong):
        llm.generate([[5], [5] * 600])
    with pytest.raises(RequestError, match="between 0 and 511"):
        llm.generate([[5], [9999]])
    with pytest.raises(ValueError, match="2 prompts, but 1 sampling_params"):
        llm.generate(["a", "b"], [SamplingParams()])
    with pytest.raises(ConfigError, match="unknown option 'max_seqs'"):
        LLM(llm.model, max_seqs=3)
    with pytest.raises(ConfigError, match="kv_dtype is 'fp8'"):
        LLM(llm.model, kv_dtype="fp8")
    with pytest.raises(ConfigError, match="device is 'tpu'; it must be cpu, cuda or cuda:N"):
        LLM("nano", device="tpu")
    with pytest.raises(ConfigError, match="device is 'cuda:99', but this machine has"):
        LLM("nano", device="cuda:99")
    with pytest.raises(ConfigError, match="no tokenizer"):
        LLM(llm.model, **SHORT).generate("text")
    assert not llm.core.has_work


def test_whatever_yields_prompts_is_a_list_of_them(llm: LLM) -> None:
    sampling = SamplingParams(max_tokens=3, temperature=0.0)
    expected = [output.token_ids for output in llm.generate([[5, 6], [7, 8, 9]], sampling)]
    prompts: list[Any] = [
        (p for p in ([5, 6], [7, 8, 9])),
        [np.array([5, 6]), range(7, 10)],
        iter([(5, 6), [7, 8, 9]]),
    ]
    for some in prompts:
        found = llm.generate(some, (sampling for _ in range(2)))
        assert [output.token_ids for output in found] == expected
    assert llm.generate((i for i in (5, 6)), sampling)[0].token_ids == expected[0]
    assert llm.generate([]) == llm.generate(np.array([], dtype=int), []) == []  # type: ignore[arg-type]
    message = {"role": "user", "content": "Hi"}
    one = llm.chat([message], sampling_params=sampling)[0]
    for messages in (iter([message]), iter([[message]]), ([message],), [(message,)]):
        (answer,) = llm.chat(messages, sampling_params=iter([sampling]))  # type: ignore[arg-type]
        assert answer.token_ids == one.token_ids


def test_what_is_no_list_of_prompts_is_refused(llm: LLM) -> None:
    wrong: list[Any] = [
        {"prompt": "a"},
        [{"prompt_token_ids": [5]}],
        {5, 6},
        b"a",
        5,
        None,
        [None],
        [5, "a"],
        ["a", 5],
    ]
    for prompts in wrong:
        with pytest.raises(RequestError, match="a prompt is a text or a list of token ids"):
            llm.generate(prompts)
    for sampling in (5, {"max_tokens": 5}, [None]):
        with pytest.raises(RequestError, match="sampling_params must be SamplingParams"):
            llm.generate(["a"], sampling)  # type: ignore[arg-type]
    for messages in ({"role": "user", "content": "Hi"}, "Hi", 5):
        with pytest.raises(RequestError, match="messages must be a list of messages"):
            llm.chat(messages)  # type: ignore[arg-type]
    assert not llm.core.has_work


WRONG: list[dict[str, Any]] = [
    {"max_tokens": 0}, {"max_tokens": 2.5}, {"max_tokens": "3"}, {"max_tokens": True}, {"temperature": math.nan},
    {"temperature": math.inf}, {"temperature": "1"}, {"temperature": None}, {"top_k": -1}, {"top_k": 2.5},
    {"top_p": 0.0}, {"top_p": math.nan}, {"min_p": 1.0}, {"min_p": None}, {"seed": 1.5}, {"seed": "x"},
    {"stop": 5}, {"stop": [5]}, {"stop": ["a", ""]}, {"stop_token_ids": 5}, {"stop_token_ids": ["a"]},
    {"stop_token_ids": [1.5]}, {"presence_penalty": math.nan}, {"repetition_penalty": math.inf},
    {"repetition_penalty": 1e-300}, {"repetition_penalty": 1e300}, {"logit_bias": None},
    {"logit_bias": {5: math.nan}},
    {"logit_bias": {5: math.inf}}, {"logit_bias": {5: 1e300}}, {"logit_bias": {"5": 1.0}}, {"logit_bias": {-1: 1.0}},
    {"logit_bias": {5: "x"}}, {"logprobs": 21}, {"logprobs": 1.5}, {"logprobs": True}, {"draft_depth": 1.5},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_parameter_that_is_none_is_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(RequestError, match=f"^{name}") as refusal:
        SamplingParams(**wrong)
    assert refusal.value.param == name


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_num_seqs": 1.5}, {"max_model_len": 1}, {"kv_cache_bytes": 1e9}, {"snapshot_interval": 0},
        {"max_waiting": 0}, {"vocab_limit": 0}, {"prefix_cache_disk_bytes": 0}, {"max_draft_depth": True},
        {"seed": 1.5}, {"prefix_cache_path": ""}, {"kv_dtype": torch.int32}, {"kv_cache_bytes": 0},
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_that_is_none_is_refused_by_name(llm: LLM, wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"^{name}"):
        LLM(llm.model, **({"max_model_len": 64} | wrong))


def test_prompts_of_other_libraries_are_token_ids_too(llm: LLM) -> None:
    sampling = SamplingParams(max_tokens=4, temperature=np.float32(0), ignore_eos=True, top_k=np.int64(3))  # type: ignore[arg-type]
    (expected,) = llm.generate([5, 6, 7], sampling)
    ids: list[Any] = [
        np.array([5, 6, 7]),
        torch.tensor([5, 6, 7]),
        [np.int64(5), 6, 7],
        (5, 6, 7),
        range(5, 8),
    ]
    for prompt in ids:
        (found,) = llm.generate(prompt, sampling)
        assert found.token_ids == expected.token_ids
        assert len(llm.generate([prompt, prompt], sampling)) == 2
    assert llm.generate([], sampling) == []
    wrong: list[Any] = [
        None,
        5,
        1.5,
        [None],
        [1.5, 2],
        [[1.5, 2.0]],
        [[True]],
        [["5"]],
        b"abc",
        [b"abc"],
        [[]],
        [[-1]],
    ]
    for prompt in wrong:
        with pytest.raises(RequestError):
            llm.generate(prompt, sampling)
    parameters: list[Any] = [[None], {"max_tokens": 3}, ["x"]]
    for one in parameters:
        with pytest.raises(RequestError, match="must be SamplingParams"):
            llm.generate([[5]], one)


def test_prompts_and_answers_at_the_very_end_of_the_context(llm: LLM) -> None:
    for length, room in ((511, 1), (510, 2), (505, 7)):
        for max_tokens in (None, room, room + 1, 2**70):
            sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
            (found,) = llm.generate([[9] * length], sampling)
            assert len(found.token_ids) == room
            assert found.finish_reason == "length"
    with pytest.raises(PromptTooLong, match="512 tokens > 511 maximum"):
        llm.generate([[9] * 512], SamplingParams(max_tokens=1))


def test_more_prompts_than_may_wait(llm: LLM) -> None:
    small = LLM(llm.model, max_num_seqs=2, max_waiting=3, max_model_len=64)
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    assert len(small.generate([[5 + i] for i in range(20)], sampling)) == 20


def test_threads_take_turns(llm: LLM) -> None:
    prompts = [[5 + i] * 20 for i in range(6)]
    sampling = SamplingParams(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True)
    alone = [llm.generate([prompt], sampling)[0].token_ids for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda prompt: llm.generate([prompt, prompt], sampling), prompts))
    assert [[one.token_ids for one in pair] for pair in done] == [[ids, ids] for ids in alone]


def test_another_process_needs_an_llm_of_its_own(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for send in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be copied or sent to another process"):
            send(llm)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(EngineError, match="made in another process"):
        llm.generate([[5]])


@pytest.mark.usefixtures("obeys_ctrl_c")
def test_a_second_ctrl_c_anywhere_leaves_an_llm_that_works(llm: LLM) -> None:
    """It is raised at lines of the engine that chance chooses; what was held then is not held for ever."""
    own = LLM(llm.model, **(SHORT | {"max_num_seqs": 3}))  # type: ignore[arg-type]
    sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    prompts = [[7 + i] * (20 + i) for i in range(5)]
    expected = [one.token_ids for one in own.generate(prompts, sampling)]
    chance = random.Random(5)

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.endswith(
            ("core.py", "scheduler.py", "kv_cache.py", "blocks.py", "prefix.py")
        ):
            return None
        left[0] -= event == "line"
        if left[0] == 0:
            raise KeyboardInterrupt
        return trace

    for _ in range(40):
        left = [chance.randrange(1, 6000)]
        sys.settrace(trace)
        try:
            own.generate(prompts, sampling)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        own.core.check_integrity()
        assert not own.core.has_work
        assert own.stats().kv_used_bytes == own.stats().kv_cached_bytes
        assert own.core.cache.num_free_rows == 3
        assert [one.token_ids for one in own.generate(prompts, sampling)] == expected


def test_warming_up_leaves_nothing_behind() -> None:
    for length in (None, 40):
        llm = LLM(MICRO, max_model_len=length, max_num_seqs=2)
        llm.warm_up()
        assert not llm.core.has_work
        llm.core.check_integrity()
        assert llm.stats().num_finished == 8
    with pytest.raises(PromptTooLong):
        llm.generate([5] * 41)
