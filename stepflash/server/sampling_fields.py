"""Fields that say how to sample; the same for every API. Those of OpenAI and Anthropic have their names, the others
those of vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from stepflash.engine.request import SamplingParams
from stepflash.errors import RequestError
from stepflash.server.body import Items, Refusal
from stepflash.server.scheduling_fields import SchedulingBody

MAX_CHOICES = 16
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1 - MAX_CHOICES
MAX_STOP_STRINGS = 64

# What vLLM, SGLang and llama.cpp take besides, would change the answer, and is not there; with the values that switch
# it off, which frontends send with every request.
_NO_SAMPLER: Mapping[str, tuple[float, ...]] = {
    "min_tokens": (0,),
    "min_new_tokens": (0,),
    "length_penalty": (1,),
    "use_beam_search": (),
    "typical_p": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "top_n_sigma": (0, -1),
    "mirostat": (0,),
    "dynatemp_range": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "samplers": (),
    "logits_processors": (),
    "custom_logit_processor": (),
}
_NO_TOKEN_LIST = Refusal("not supported; logit_bias can favour tokens and rule them out")
_OF_OTHER_SERVERS: Mapping[str, Refusal] = {
    **{name: Refusal("this server has no such sampling parameter", off) for name, off in _NO_SAMPLER.items()},
    **dict.fromkeys(("bad_words", "allowed_token_ids"), _NO_TOKEN_LIST),
    **dict.fromkeys(
        ("grammar", "json_schema", "regex", "ebnf"),
        Refusal("use structured_outputs, with one of json, regex, choice, grammar"),
    ),
    "repeat_penalty": Refusal("use repetition_penalty", harmless=(1,)),
    "n_predict": Refusal("use the limit of tokens of this API"),
    "include_stop_str_in_output": Refusal("the string that ended the answer is never part of it"),
    "no_stop_trim": Refusal("the string that ended the answer is never part of it"),
    "skip_special_tokens": Refusal("not supported", harmless=(True,)),
    "truncate_prompt_tokens": Refusal("prompts are not cut; send a shorter one"),
    "prompt_logprobs": Refusal("only generated tokens have log-probabilities"),
    "return_tokens_as_token_ids": Refusal("not supported; the bytes of each token are in logprobs"),
    "lora_path": Refusal("there are no adapters"),
}


class SamplingBody(SchedulingBody):
    """How to sample; what is left out is as the server has it."""

    refused: ClassVar[Mapping[str, Refusal]] = _OF_OTHER_SERVERS
    ignored: ClassVar[frozenset[str]] = frozenset({"cache_prompt", "id_slot"})

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    seed: int | None = None
    stop_token_ids: Items[int] | None = None
    ignore_eos: bool | None = None
    draft_depth: int | None = None


_SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "ignore_eos",
    "draft_depth",
)


def sampling_params(body: SamplingBody, defaults: SamplingParams, **named: tuple[str, Any]) -> SamplingParams:
    """The sampling parameters of a body over those of the server. `named` are parameters that the APIs call
    differently: what this API calls it, and its value.

    Raises:
        RequestError: a value is out of range; names the field as the client knows it.
    """
    given: dict[str, Any] = {
        **{name: getattr(body, name) for name in _SAME_NAME},
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "logit_bias": _logit_bias(body.logit_bias or {}),
        **{name: value for name, (_, value) in named.items()},
    }
    if given["top_k"] == -1:  # how vLLM's clients say "off"
        given["top_k"] = 0
    if body.seed is not None and not MIN_SEED <= body.seed <= MAX_SEED:
        raise RequestError(f"seed must fit in 63 bits and a sign, got {body.seed}", param="seed")
    if (wrong := next((token_id for token_id in given["stop_token_ids"] if token_id < 0), None)) is not None:
        raise RequestError(f"stop_token_ids: {wrong} is not a token id", param="stop_token_ids")
    try:
        return replace(defaults, **{name: value for name, value in given.items() if value is not None})
    except RequestError as error:
        param = error.param or ""
        name = named[param][0] if param in named else param
        raise RequestError(str(error).replace(param, name, 1), param=name) from None


def stop_strings(param: str, stop: str | list[str] | None) -> tuple[str, tuple[str, ...]]:
    """A field of stop strings, for `sampling_params`.

    Raises:
        RequestError: too many, or an empty one.
    """
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(strings) > MAX_STOP_STRINGS or not all(strings):
        raise RequestError(
            f"{param}: at most {MAX_STOP_STRINGS} strings are allowed, none of them empty", param=param
        )
    return param, strings


def _logit_bias(bias: Mapping[str, Any]) -> dict[int, float]:
    result = {}
    for token, value in bias.items():
        if not token.isascii() or not token.isdigit() or len(token) > 9:
            raise RequestError(f"logit_bias: {token[:40]!r} is not a token id", param="logit_bias")
        if isinstance(value, bool) or not isinstance(value, int | float):
            name = f"logit_bias.{token}"
            raise RequestError(f"{name}: input should be a valid number", param=name)
        if not -100.0 <= value <= 100.0:
            raise RequestError(f"logit_bias: {value} is not between -100 and 100", param="logit_bias")
        result[int(token)] = value
    return result
