"""`echo` with `logprobs` in text completions: what evaluation harnesses read, against the model itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from stepflash.assistant.local import open_session
from stepflash.assistant.session import Session
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.settings import EngineSettings
from stepflash.weights.load import load_model
from tests.scripted_engine import END, scripted_session
from tests.server.in_process import client_of

MICRO = Path(__file__).parents[1] / "fixtures" / "micro"
URL = "/v1/completions"
TEXT = "The answer to 17 * 23 is 391, as everybody knows: \u00e9t\u00e9."


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    settings = EngineSettings(max_num_seqs=4, max_model_len=512, dtype="float32")
    with open_session(str(MICRO), settings) as local:
        yield local.session


@pytest.fixture(scope="module")
def model() -> Step3p5ForCausalLM:
    return load_model(MICRO, dtype="float32", progress=False)


def expected_logprobs(model: Step3p5ForCausalLM, token_ids: Sequence[int]) -> list[float]:
    rows = model.logits(torch.tensor(token_ids)).log_softmax(-1)
    return [float(row[token_id]) for row, token_id in zip(rows, token_ids[1:], strict=False)]


def harness_sum(reply: dict[str, Any], context_lengths: Sequence[int]) -> list[tuple[float, bool]]:
    """What lm-evaluation-harness makes of a reply (`LocalCompletionsAPI.parse_logprobs`)."""
    results = []
    for choice, length in zip(
        sorted(reply["choices"], key=itemgetter("index")), context_lengths, strict=True
    ):
        logprobs = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        is_greedy = all(value == max(top.values()) for value, top in zip(logprobs, tops, strict=True))
        results.append((sum(logprobs), is_greedy))
    return results


def test_a_harness_reads_the_likelihood_of_continuations(session: Session, model: Step3p5ForCausalLM) -> None:
    """As lm-evaluation-harness asks: contexts with continuations as token ids, and one token more."""
    encode = session.tokenizer.encode
    pairs = [(encode("The sky is"), encode(" blue and wide")), (encode("17 * 23 ="), encode(" 391"))]
    # And one whose continuation is greedy.
    greedy = encode("A wise man said")
    for _ in range(5):
        greedy.append(int(model.logits(torch.tensor(greedy))[-1, : session.tokenizer.vocab_size].argmax()))
    pairs.append((greedy[:-5], greedy[-5:]))
    body = {
        "model": "scripted",
        "prompt": [[*context, *continuation] for context, continuation in pairs],
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
        "temperature": 0,
    }
    reply = client_of(session).post(URL, json=body).json()
    found = harness_sum(reply, [len(context) for context, _ in pairs])
    for (value, _), (context, continuation) in zip(found, pairs, strict=True):
        each = expected_logprobs(model, [*context, *continuation])[-len(continuation) :]
        assert value == pytest.approx(sum(each), abs=1e-3)
    assert [is_greedy for _, is_greedy in found] == [False, False, True]


@pytest.mark.parametrize("max_tokens", [0, 1, 7])
@pytest.mark.parametrize("is_text", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_prompt_and_answer_stand_in_one_list(
    session: Session, model: Step3p5ForCausalLM, max_tokens: int, is_text: bool, n: int
) -> None:
    tokenizer = session.tokenizer
    given = tokenizer.encode(TEXT)
    # Text gets the bos token in front, which is not told: it is no part of the text.
    prompt_ids = [tokenizer.bos_token_id, *given] if is_text else given
    body = {
        "prompt": TEXT if is_text else given,
        "max_tokens": max_tokens,
        "n": n,
        "echo": True,
        "logprobs": 2,
    }
    body |= {"temperature": 0, "ignore_eos": True}
    client = client_of(session)
    reply = client.post(URL, json=body).json()
    assert reply["usage"]["completion_tokens"] == max_tokens * n
    assert reply["usage"]["prompt_tokens"] == len(prompt_ids)
    choices = reply["choices"]
    assert [choice["index"] for choice in choices] == list(range(n))
    for choice in choices:
        assert choice["text"].startswith(TEXT)
        assert choice["finish_reason"] == "length"
        if not max_tokens:
            assert choice["text"] == TEXT
        told = choice["logprobs"]
        assert {len(values) for values in told.values()} == {len(given) + max_tokens}
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        expected = expected_logprobs(model, prompt_ids)[1 - len(given) :]
        assert told["token_logprobs"][1 : len(given)] == pytest.approx(expected, abs=2e-4)
        assert all(
            value <= max(top.values())
            for value, top in zip(told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True)
        )
        assert told["tokens"][: len(given)] == [tokenizer.decode([i]) for i in given]
        # Every token stands where it says, as far as it is whole characters.
        assert told["text_offset"][0] == 0
        for token, begin in zip(told["tokens"], told["text_offset"], strict=True):
            if "\ufffd" not in token:
                assert choice["text"][begin : begin + len(token)] == token

    response = client.post(URL, json={**body, "stream": True})
    chunks = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
    for index, whole in enumerate(choices):
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert parts[0]["text"] == TEXT
        assert "".join(part["text"] for part in parts) == whole["text"]
        assert parts[-1]["finish_reason"] == "length"
        for name, values in whole["logprobs"].items():
            streamed = [value for part in parts if part["logprobs"] for value in part["logprobs"][name]]
            if name in ("tokens", "text_offset"):
                assert streamed == values
                continue
            # Batches of another size round otherwise.
            assert streamed[0] is values[0] is None
            for one, other in zip(streamed[1:], values[1:], strict=True):
                assert one == pytest.approx(other, abs=2e-4)


def test_a_prompt_of_one_token_and_no_prompt_logprobs(session: Session) -> None:
    client = client_of(session)
    body = {"prompt": [5], "echo": True, "temperature": 0, "max_tokens": 0}
    (choice,) = client.post(URL, json={**body, "logprobs": 0}).json()["choices"]
    assert choice["logprobs"] == {
        "tokens": [session.tokenizer.decode([5])],
        "token_logprobs": [None],
        "top_logprobs": [None],
        "text_offset": [0],
    }
    # Without `logprobs` nothing is told, but reading the prompt alone is possible.
    (choice,) = client.post(URL, json=body).json()["choices"]
    assert choice["logprobs"] is None
    assert choice["text"] == session.tokenizer.decode([5])
    refused = client.post(URL, json={**body, "echo": False})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "max_tokens"
    refused = client.post(URL, json={**body, "max_tokens": -1})
    assert refused.json()["error"]["param"] == "max_tokens"


@pytest.mark.parametrize("text", ["", "ab"])
def test_the_stop_token_is_told_with_an_echo(text: str) -> None:
    """A harness that asks for one token more than it wants leaves out one, also where that ends the answer."""
    client = client_of(scripted_session(text + END, bursts=[2]))
    body = {"prompt": [5, 6, 7], "echo": True, "logprobs": 1, "max_tokens": 16}
    (whole,) = client.post(URL, json=body).json()["choices"]
    assert whole["logprobs"]["tokens"][3:] == [*text, END]
    assert whole["logprobs"]["token_logprobs"] == [None, *[-0.25] * (3 + len(text))]
    assert whole["logprobs"]["text_offset"][-1] == len(whole["text"])
    response = client.post(URL, json={**body, "stream": True})
    chunks = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [token for part in told for token in part["tokens"]] == whole["logprobs"]["tokens"]
    (plain,) = client.post(URL, json={**body, "echo": False}).json()["choices"]
    assert (plain["logprobs"] or {"tokens": []})["tokens"] == [*text]


def test_of_tokens_with_the_same_text_the_best_is_told() -> None:
    """Parts of characters are all shown alike."""
    session = scripted_session("")
    decode = session.tokenizer.decode
    first = next(i for i in range(300) if all(decode([i + k]) == "\ufffd" for k in range(3)))
    body = {"prompt": [5, first], "echo": True, "logprobs": 3, "max_tokens": 0}
    (choice,) = client_of(session).post(URL, json=body).json()["choices"]
    assert choice["logprobs"]["top_logprobs"][1] == {"\ufffd": -0.25}
