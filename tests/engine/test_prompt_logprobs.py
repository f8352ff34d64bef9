"""Log-probabilities of the prompt, against one forward pass of the model over all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from stepflash.engine import network, runner
from stepflash.engine.core import EngineCore
from stepflash.engine.llm import LLM
from stepflash.engine.network import NativeNetwork
from stepflash.engine.request import SamplingParams, TokenLogprob
from stepflash.errors import RequestError
from stepflash.kernels import build
from stepflash.model.transformer import Step3p5ForCausalLM
from tests.engine.conftest import MICRO, Finished, drive, request

NewCore = Callable[..., EngineCore]
Golden = tuple[list[int], list[int]]


def told(finished: Finished) -> list[TokenLogprob]:
    assert not any(output.prompt_logprobs for output in finished.outputs[1:])
    return list(finished.outputs[0].prompt_logprobs)


def check(
    model: Step3p5ForCausalLM, prompt: Sequence[int], found: Sequence[TokenLogprob], num_top: int
) -> None:
    expected = model.logits(torch.tensor(prompt)).log_softmax(-1)
    assert [entry.token_id for entry in found] == list(prompt[1:])
    for entry, row in zip(found, expected[:-1], strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=2e-4)
        values = row.sort(descending=True).values[:num_top].tolist()
        assert [value for _, value in entry.top] == pytest.approx(values, abs=2e-4)
        assert [float(row[token_id]) for token_id, _ in entry.top] == pytest.approx(values, abs=2e-4)


@pytest.mark.parametrize("batched", [1, 7, 64, 512])
@pytest.mark.parametrize("max_tokens", [0, 1, 20])
def test_they_are_those_of_one_pass_over_the_prompt(
    new_core: NewCore, model: Step3p5ForCausalLM, golden: Golden, batched: int, max_tokens: int
) -> None:
    """In chunks, beside others, and with and without drafts and tokens of the answer."""
    core = new_core(max_num_batched_tokens=batched)
    prompts = {
        "a": golden[0],
        "b": golden[0][3:70],
        "c": golden[0][:2],
        "d": golden[0][:1],
        "e": golden[0][:64],
    }
    asked = [
        request(name, prompt, max_tokens=max_tokens, prompt_logprobs=3, logprobs=1, draft_depth=3)
        for name, prompt in prompts.items()
    ]
    plain = request("plain", golden[0], max_tokens=20)
    done = drive(core, *asked, plain)
    for name, prompt in prompts.items():
        check(model, prompt, told(done[name]), 3)
        assert len(done[name].token_ids) == max_tokens
        assert done[name].last.finish_reason == "length"
        assert all(len(entry.top) == 3 for entry in told(done[name]))
    assert told(done["plain"]) == []
    assert done["plain"].token_ids == golden[1][:20]
    assert done["a"].token_ids == golden[1][:max_tokens]


def test_the_prefix_cache_hides_nothing_and_gains_by_it(
    new_core: NewCore, model: Step3p5ForCausalLM, golden: Golden
) -> None:
    core = new_core()
    prompt = golden[0]
    drive(core, request("warm", prompt, max_tokens=2))
    for name, max_tokens in (("none", 0), ("some", 5)):
        asked = request(name, prompt, max_tokens=max_tokens, prompt_logprobs=0)
        guess = core.lookup(asked)
        assert guess is not None
        assert guess.num_cached_tokens == 0
        done = drive(core, asked)[name]
        check(model, prompt, told(done), 0)
        assert done.stats.num_cached_tokens == 0
        assert done.stats.num_prefill_tokens == len(prompt)
        assert done.stats.cache_miss == "prompt_logprobs need all of it"
    # And what such a request leaves is as good as what any other does.
    core.prefix.clear()  # type: ignore[union-attr]
    drive(core, request("none", prompt, max_tokens=0, prompt_logprobs=0))
    after = drive(core, request("after", prompt, max_tokens=30, draft_depth=3))["after"]
    assert after.stats.num_cached_tokens == 152
    assert after.token_ids == golden[1][:30]


def test_a_preempted_request_tells_each_once(
    new_core: NewCore, model: Step3p5ForCausalLM, golden: Golden
) -> None:
    """In the middle of its prompt, when the cache knows the prompt of another one, and later."""
    prompt = golden[0]
    for num_steps in range(1, 8):
        core = new_core(max_num_batched_tokens=32)
        drive(core, request("warm", prompt, max_tokens=2))
        core.add(request("a", prompt, max_tokens=8, prompt_logprobs=2))
        outputs = [output for _ in range(num_steps) for output in core.step()]
        (seq,) = core.scheduler.running
        core.scheduler.preempt(seq)
        while core.has_work:
            outputs += core.step()
        core.check_integrity()
        found = [entry for output in outputs for entry in output.prompt_logprobs]
        check(model, prompt, found, 2)
        assert [i for output in outputs for i in output.token_ids] == golden[1][:8]


@pytest.mark.skipif(not build.load(), reason="no native kernels here")
def test_the_native_network_says_of_a_prompt_what_it_said_when_it_wrote_it(golden: Golden) -> None:
    """In bfloat16, where a pass in one piece differs by rounding: but a token gets the same result in every batch."""
    options = {"max_num_batched_tokens": 64, "max_model_len": 512, "kv_cache_bytes": 32 << 20}
    llm = LLM(MICRO, **options)  # type: ignore[arg-type]
    assert isinstance(llm.core.runner.network, NativeNetwork)
    sampling = SamplingParams(
        max_tokens=60, temperature=1.0, seed=3, logprobs=4, ignore_eos=True, draft_depth=2
    )
    (first,) = llm.generate(golden[0], sampling, progress=False)
    whole = [*golden[0], *first.token_ids]
    (again,) = llm.generate(whole, SamplingParams(max_tokens=0, prompt_logprobs=4), progress=False)
    assert again.token_ids == []
    assert again.text == ""
    assert again.finish_reason == "length"
    assert again.prompt_logprobs is not None
    assert first.logprobs is not None
    for entry, expected in zip(again.prompt_logprobs[len(golden[0]) - 1 :], first.logprobs, strict=True):
        assert entry.token_id == expected.token_id
        assert entry.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert dict(entry.top) == pytest.approx(dict(expected.top), abs=1e-4)
    assert first.prompt_logprobs is None


@pytest.mark.skipif(not build.load(), reason="no native kernels here")
def test_they_come_with_the_first_of_several_steps_in_a_call(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that leaves one token of the prompt: modules have read all of it, and several steps follow at once."""
    monkeypatch.setattr(network, "AHEAD_SECONDS", 10.0)
    prompt = golden[0][:65]
    llm = LLM(MICRO, max_num_batched_tokens=64, max_model_len=512, kv_cache_bytes=32 << 20)
    asked = {
        depth: request(f"depth {depth}", prompt, max_tokens=20, prompt_logprobs=1, draft_depth=depth)
        for depth in (0, 3)
    }
    done = {depth: drive(llm.core, asked[depth])[f"depth {depth}"] for depth in asked}
    assert len(done[3].outputs[0].token_ids) > 4  # more than one step gives
    assert told(done[3]) == told(done[0])
    assert [entry.token_id for entry in told(done[3])] == prompt[1:]
    assert done[3].stats.num_prefill_tokens == len(prompt)
    assert llm.stats().num_computed_prompt_tokens == 2 * len(prompt)


def test_logits_are_computed_a_few_rows_at_a_time(
    new_core: NewCore, model: Step3p5ForCausalLM, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    compute = model.compute_logits

    def counted(hidden_states: torch.Tensor) -> torch.Tensor:
        rows.append(hidden_states.shape[0])
        return compute(hidden_states)

    monkeypatch.setattr(model, "compute_logits", counted)
    core = new_core(max_num_batched_tokens=512)
    drive(core, request("plain", golden[0], max_tokens=1))
    assert rows == [1]
    drive(core, request("a", golden[0], max_tokens=1, prompt_logprobs=0))
    assert max(rows) == runner.PROMPT_ROWS
    assert sum(rows) == 1 + len(golden[0])


def test_what_cannot_be_asked_for_is_refused() -> None:
    for value in (-1, 21, 1.5, True, "1"):
        with pytest.raises(RequestError, match="prompt_logprobs must be") as caught:
            SamplingParams(prompt_logprobs=value)  # type: ignore[arg-type]
        assert caught.value.param == "prompt_logprobs"
    with pytest.raises(RequestError, match="max_tokens must be at least 1, got 0"):
        SamplingParams(max_tokens=0)
    with pytest.raises(RequestError, match="max_tokens must be at least 0, got -1"):
        SamplingParams(max_tokens=-1, prompt_logprobs=0)
    assert SamplingParams(max_tokens=0, prompt_logprobs=0).max_tokens == 0
