"""`LLM` end to end on the micro checkpoint: text, stop strings, chat, many prompts, wrong input."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.engine.llm import LLM, _Answer
from stepflash.engine.request import Output, SamplingParams
from stepflash.errors import ConfigError, PromptTooLong, RequestError
from tests.engine.conftest import MICRO, request

SHORT = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 512, "kv_cache_bytes": 32 << 20}


@pytest.fixture(scope="module")
def llm() -> LLM:
    torch.set_num_threads(1)
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


@settings(max_examples=60, deadline=None)
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
    with pytest.raises(ConfigError, match="no tokenizer"):
        LLM(llm.model, **SHORT).generate("text")
    assert not llm.core.has_work
