"""Opening a model by name: its sampling settings, and answers equal to the network's own arithmetic."""

import asyncio
import itertools
import json
from pathlib import Path

import pytest
import torch

from stepflash.assistant.local import default_sampling, open_session
from stepflash.assistant.stream import fold
from stepflash.chat.messages import Conversation, Message
from stepflash.engine.engine import Engine
from stepflash.engine.request import SamplingParams
from stepflash.errors import ConfigError, WeightsError
from stepflash.settings import EngineSettings
from stepflash.weights.load import load_model

MICRO = Path(__file__).parents[1] / "fixtures" / "micro"


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (None, SamplingParams(max_tokens=None)),
        ({"do_sample": False, "temperature": 0.7}, SamplingParams(max_tokens=None, temperature=0.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 40, "eos_token_id": 1},
            SamplingParams(max_tokens=None, temperature=0.6, top_p=0.95, top_k=40),
        ),
        ({"temperature": None}, SamplingParams(max_tokens=None)),
    ],
)
def test_sampling_as_the_model_says(file: dict | None, expected: SamplingParams, tmp_path: Path) -> None:
    if file is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(file))
    assert default_sampling(tmp_path) == expected


@pytest.mark.parametrize("text", ["{", '{"temperature": -3}', '{"temperature": "hot"}'])
def test_sampling_that_cannot_be_used(text: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        default_sampling(tmp_path)


def test_as_many_threads_compute_as_were_asked_for() -> None:
    for number in (1, 3):
        with open_session(str(MICRO), EngineSettings(threads=number)) as local:
            engine = local.session.engine
            assert isinstance(engine, Engine)
            assert engine.call(lambda core: torch.get_num_threads()).result() == number


def test_a_greedy_answer_is_the_argmax_of_the_network() -> None:
    """Brute force: the whole sequence through the network again for every token."""
    with open_session(str(MICRO), EngineSettings(max_num_seqs=2, dtype="float32")) as local:
        assert local.name == "micro"
        conversation = Conversation(messages=(Message(role="user", content="hello"),))
        prompt = local.session.prepare(conversation, SamplingParams(max_tokens=10, temperature=0.0))
        answer = asyncio.run(fold(local.session.answer(prompt)))
    model = load_model(MICRO, dtype="float32", progress=False)
    token_ids = list(prompt.request.prompt_token_ids)
    with torch.inference_mode():
        for _ in range(10):
            token_ids.append(int(model.logits(torch.tensor(token_ids))[-1].argmax()))
    assert list(answer.token_ids) == token_ids[-10:]


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_a_conversation_goes_on_after_a_restart(tmp_path: Path, kv_dtype: str | None) -> None:
    """What the engine cached when it ended is there when it starts again with the same file."""
    settings = EngineSettings(
        max_num_seqs=2, max_model_len=512, prefix_cache=str(tmp_path / "cache"), kv_dtype=kv_dtype
    )
    history: list[Message] = []
    cached = []
    for turn in range(3):
        with open_session(str(MICRO), settings) as local:
            history.append(
                Message(role="user", content=f"turn {turn}, and some words to fill a block or two")
            )
            sampling = SamplingParams(max_tokens=20, temperature=0.0)
            prompt = local.session.prepare(Conversation(messages=tuple(history)), sampling)
            assert prompt.request.sampling.max_tokens == 20
            answer = asyncio.run(fold(local.session.answer(prompt)))
            history.append(answer.to_message())
            cached.append((answer.usage.cached_tokens, answer.usage.prompt_tokens))
    assert cached[0][0] == 0
    for (_, before), (hit, _) in itertools.pairwise(cached):
        assert hit > before - 16  # all of the prompt before, down to a block boundary


def test_a_model_that_does_not_exist() -> None:
    with pytest.raises(WeightsError), open_session("no such model", EngineSettings()):
        pass
