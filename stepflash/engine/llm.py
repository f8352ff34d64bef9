"""`LLM`: the engine for scripts. Text or token ids in, finished answers out, on the calling thread.

It loads the model, tokenizer and chat template and drives an `EngineCore` itself; `Engine(llm.core)` serves the
same core from a thread. Text is the business of this file alone: stop strings and half characters are handled
here, the core sees token ids.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import reprlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from stepflash.engine.config import KV_DTYPES
from stepflash.engine.core import EngineConfig, EngineCore, EngineStats
from stepflash.engine.request import FinishReason, Output, Request, RequestStats, SamplingParams, TokenLogprob
from stepflash.errors import ConfigError, EngineError, RequestError
from stepflash.model.transformer import Step3p5ForCausalLM

if TYPE_CHECKING:
    from stepflash.chat.messages import Message, Tool
    from stepflash.chat.template import ChatTemplate
    from stepflash.chat.tokenizer import Detokenizer, Tokenizer

logger = logging.getLogger(__name__)
# Prompts given to the core at once: enough to fill any batch, few enough to stay cheap to order.
FEED_AHEAD = 256
# Prompts that make kernels work on few tokens, on some and on many.
WARM_UP_LENGTHS, WARM_UP_TOKENS = (4, 24, 100, 700), 8


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """A finished answer. `text` ends before the stop string or stop token; `token_ids` has them all.

    `message` is the parsed answer of `chat`, None after `generate`. `prompt_logprobs`, if asked for, are of every
    token of the prompt but the first.
    """

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    stats: RequestStats = field(default_factory=RequestStats)
    error: str | None = None
    message: Message | None = None


class LLM:
    """A model ready to generate.

    Args:
        model: "nano", a folder, a .gguf file, a hub id, or a network that is already there.
        dtype: of the weights; "bfloat16" or "float32". Ignored for a network.
        quantization: a weight format to pack the weights in for the native kernels: "bf16", "fp8", "int8",
            "int4" and others, "stored" or "plain", see `load_model`. None is "stored" for bfloat16 where the
            native kernels run, with the prediction modules' floats in int8: they only propose.
        tokenizer, chat_template: instead of the checkpoint's own.
        kv_dtype: of the KV cache, "int8" for instance; None is the weights'.
        others: see `EngineConfig`.
    Raises:
        WeightsError, ConfigError: the checkpoint or a setting cannot be used.
    """

    def __init__(
        self,
        model: str | Path | Step3p5ForCausalLM = "nano",
        *,
        dtype: str | torch.dtype = "bfloat16",
        quantization: str | None = None,
        device: str = "cpu",
        tokenizer: Tokenizer | None = None,
        chat_template: ChatTemplate | None = None,
        kv_dtype: str | torch.dtype | None = None,
        seed: int | None = None,
        **engine_options: Any,
    ) -> None:
        if not isinstance(model, Step3p5ForCausalLM):
            path, model = _load(model, dtype, quantization, device)
            if tokenizer is None:
                tokenizer = _load_tokenizer(path)
            if chat_template is None and tokenizer is not None:
                from stepflash.chat.template import ChatTemplate

                chat_template = ChatTemplate.from_pretrained(path)
        elif quantization is not None:
            raise ConfigError("quantization happens while loading; it cannot be applied to a network object")
        unknown = sorted(set(engine_options) - set(EngineConfig.__dataclass_fields__))
        if unknown:
            known = ", ".join(EngineConfig.__dataclass_fields__)
            raise ConfigError(f"unknown option {unknown[0]!r} of LLM; there are {known}")
        if tokenizer is not None:
            engine_options.setdefault("vocab_limit", tokenizer.vocab_size)
            engine_options.setdefault("eos_token_ids", tuple(sorted(tokenizer.eos_token_ids)))
        if isinstance(kv_dtype, str):
            if kv_dtype not in KV_DTYPES:
                raise ConfigError(f"kv_dtype is {kv_dtype!r}; it must be one of {', '.join(KV_DTYPES)}")
            kv_dtype = KV_DTYPES[kv_dtype]
        self.model = model
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.core = EngineCore(model, EngineConfig(kv_dtype=kv_dtype, seed=seed, **engine_options))
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def generate(
        self,
        prompts: str | Iterable[int] | Iterable[str | Sequence[int]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Continue each prompt; results in the order of the prompts.

        Args:
            prompts: texts or lists of token ids, or a single one. Text gets the bos token in front.
            sampling_params: one for all, or one per prompt; the defaults otherwise.
            progress: show a progress bar if stderr is a terminal.
        Raises:
            RequestError: a prompt can never run; raised before anything does.
            KeyboardInterrupt: after Ctrl-C; what ran is aborted and the LLM can be used again.
        """
        token_lists = [self._encode(prompt) for prompt in _as_list(prompts)]
        return self._run([(ids, ()) for ids in token_lists], sampling_params, progress)

    def warm_up(self) -> None:
        """Run prompts of a few lengths and some drafts, so that no request waits for kernels to be compiled.

        That takes half a minute on a GPU, and as good as nothing elsewhere.
        """
        room = self.core.max_model_len - WARM_UP_TOKENS
        vocab = self.core.sampler.vocab_limit
        for length in WARM_UP_LENGTHS:
            # Begins with another token each time: nothing is read from the prefix cache.
            prompt = [(length + i) % vocab for i in range(min(length, room))]
            for depth in (0, 3) if prompt else ():
                sampling = SamplingParams(
                    max_tokens=WARM_UP_TOKENS, temperature=0.0, ignore_eos=True, draft_depth=depth
                )
                self.generate(prompt, sampling, progress=False)

    def chat(
        self,
        messages: Iterable[Message | Mapping[str, Any]] | Iterable[Sequence[Message | Mapping[str, Any]]],
        tools: Sequence[Tool | Mapping[str, Any]] | None = None,
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several; `message` of each result is the parsed answer.

        Messages and tools are those of the OpenAI chat format, or `stepflash.chat` values.

        Raises:
            RequestError: a conversation is wrong, the template refuses it, or it does not fit.
        """
        from stepflash.chat.messages import fold_events
        from stepflash.chat.openai_messages import messages_from_openai, tools_from_openai
        from stepflash.chat.parser import OutputParser

        template = self.chat_template
        if template is None:
            raise ConfigError("this LLM has no chat template; pass chat_template=")
        known = tools_from_openai(tools or ())
        given: Any = messages
        if isinstance(given, Iterable) and not isinstance(given, str | Mapping):
            given = list(given)
        first = given[0] if isinstance(given, list) and given else None
        is_one = isinstance(first, str | Mapping) or not isinstance(first, Iterable)
        conversations: list[Any] = [given] if is_one else given
        prompts, opens_thought = [], []
        for conversation in conversations:
            rendered = template.render(messages_from_openai(conversation), tools=known)
            prompts.append(self._tokenizer().encode_with_cuts(rendered.text, rendered.cut_points))
            opens_thought.append(rendered.opens_thought)
        outputs = self._run(prompts, sampling_params, progress)
        for output, in_reasoning in zip(outputs, opens_thought, strict=True):
            parser = OutputParser(known, in_reasoning=in_reasoning)
            events = parser.push(output.text) + parser.finish(output.finish_reason or "stop")
            output.message = fold_events(events).as_message()
        return outputs

    def close(self) -> None:
        """Save the prefix cache if `prefix_cache_path` was given; the LLM stays usable. May be called twice."""
        with self._lock:
            self.core.close()

    def stats(self) -> EngineStats:
        return self.core.stats()

    def __reduce__(self) -> Any:
        raise TypeError("an LLM cannot be copied or sent to another process; make one there")

    def _run(
        self,
        prompts: Sequence[tuple[list[int], tuple[int, ...]]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None,
        progress: bool,
    ) -> list[RequestOutput]:
        given: Any = sampling_params
        if given is None or isinstance(given, SamplingParams):
            given = [given or SamplingParams()] * len(prompts)
        samplings = list(given) if isinstance(given, Iterable) else [given]
        if not all(isinstance(one, SamplingParams) for one in samplings):
            raise RequestError("sampling_params must be SamplingParams, one for all or one for each prompt")
        if len(samplings) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(samplings)} sampling_params")
        requests = [
            Request(
                request_id=f"llm-{next(self._ids)}",
                prompt_token_ids=tuple(token_ids),
                sampling=sampling,
                cut_points=cuts,
            )
            for (token_ids, cuts), sampling in zip(prompts, samplings, strict=True)
        ]
        for request in requests:
            self.core.check(request)
        answers = {request.request_id: _Answer(request, self.tokenizer) for request in requests}
        if os.getpid() != self._pid:
            raise EngineError("this LLM was made in another process; make one in each process that needs one")
        with self._lock, _interrupts_noted() as was_interrupted, _progress_bar(progress) as bar:
            task = bar.add_task("generating", total=len(requests), rate="")

            def show(done: int, rate: str) -> None:
                bar.update(task, completed=done, rate=rate)

            self._drive(requests, answers, show, was_interrupted)
        return [answers[request.request_id].output for request in requests]

    def _drive(
        self,
        requests: Sequence[Request],
        answers: Mapping[str, _Answer],
        show: Callable[[int, str], None],
        was_interrupted: Callable[[], bool],
    ) -> None:
        waiting = list(reversed(requests))
        ahead = min(FEED_AHEAD, self.core.config.max_waiting)
        num_done = num_tokens = 0
        start = time.perf_counter()
        try:
            while num_done < len(requests):
                if was_interrupted():
                    raise KeyboardInterrupt
                while waiting and len(self.core.scheduler.waiting) < ahead:
                    self.core.add(waiting.pop())
                for output in self.core.step():
                    answer = answers.get(output.request_id)
                    if answer is None or answer.is_finished():
                        continue
                    num_tokens += len(output.token_ids)
                    answer.push(output)
                    if answer.is_finished():
                        num_done += 1
                        if output.finish_reason is None:
                            self.core.abort(output.request_id)
                show(num_done, f"{num_tokens / (time.perf_counter() - start):.1f} tok/s")
        except BaseException:
            self._recover(requests)
            raise

    def _recover(self, requests: Sequence[Request]) -> None:
        """Leave nothing of these requests. An exception in the middle of a step, a second Ctrl-C for one, can leave a
        core that is not sound; then another one takes over."""
        try:
            for request in requests:
                self.core.abort(request.request_id)
            self.core.check_integrity()
        except Exception:
            logger.warning("the engine was interrupted in the middle of a step; its cache starts anew")
            self.core = self.core.rebuilt()

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            token_ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
            is_list = isinstance(token_ids, Sequence) and not isinstance(token_ids, bytes)
            if not is_list or not all(isinstance(i, Integral) and not isinstance(i, bool) for i in token_ids):
                raise RequestError(
                    f"a prompt is a text or a list of token ids, got {reprlib.repr(prompt)}", param="prompt"
                )
            return [int(i) for i in token_ids]
        tokenizer = self._tokenizer()
        token_ids = tokenizer.encode(prompt)
        bos = tokenizer.bos_token_id
        return token_ids if bos is None or token_ids[:1] == [bos] else [bos, *token_ids]

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ConfigError("this LLM has no tokenizer; pass tokenizer= or give token ids")
        return self.tokenizer


class _Answer:
    """One answer while it grows: its text, and where a stop string cuts it."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        sampling = request.sampling
        self.output = RequestOutput(prompt_token_ids=list(request.prompt_token_ids))
        if sampling.logprobs is not None:
            self.output.logprobs = []
        if sampling.prompt_logprobs is not None:
            self.output.prompt_logprobs = []
        if sampling.stop and tokenizer is None:
            raise ConfigError("stop strings need a tokenizer; pass tokenizer= or use stop_token_ids")
        self._stop = sampling.stop
        self._stop_ids = set(sampling.stop_token_ids)
        if tokenizer is not None and not sampling.ignore_eos:
            self._stop_ids |= tokenizer.eos_token_ids
        self._detokenizer: Detokenizer | None = tokenizer.detokenizer() if tokenizer else None

    def is_finished(self) -> bool:
        return self.output.finish_reason is not None

    def push(self, output: Output) -> None:
        """Take the news of one step; token by token where nothing behind a stop string must be kept."""
        answer = self.output
        if output.stats is not None:
            answer.stats = output.stats
        if answer.prompt_logprobs is not None:
            answer.prompt_logprobs += output.prompt_logprobs
        token_ids = output.token_ids
        size = 1 if self._stop else max(1, len(token_ids))
        for i in range(0, len(token_ids), size):
            answer.token_ids += token_ids[i : i + size]
            if answer.logprobs is not None:
                answer.logprobs += output.logprobs[i : i + size]
            if self._detokenizer is not None:
                is_last = i + size >= len(token_ids) and output.finish_reason == "stop"
                is_hidden = is_last and token_ids[-1] in self._stop_ids
                self._add_text(self._detokenizer.push(token_ids[i : i + size - is_hidden]))
            if self.is_finished():
                return
        if output.finish_reason is not None:
            if self._detokenizer is not None:
                self._add_text(self._detokenizer.flush())
            if not self.is_finished():
                answer.finish_reason = output.finish_reason
                answer.stop_reason = output.stop_reason
            answer.error = output.error

    def _add_text(self, text: str) -> None:
        answer = self.output
        before = len(answer.text)
        answer.text += text
        found = []
        for stop in self._stop:
            at = answer.text.find(stop, max(0, before - len(stop) + 1))
            if at >= 0:
                found.append((at, stop))
        if found:
            at, stop = min(found)
            answer.text = answer.text[:at]
            answer.finish_reason, answer.stop_reason = "stop", stop


def _load(
    model: str | Path, dtype: str | torch.dtype, quantization: str | None, device: str
) -> tuple[Path, Step3p5ForCausalLM]:
    from stepflash.kernels.build import load as load_kernels
    from stepflash.kernels.ops import wants_tiles
    from stepflash.weights.hub import resolve_model
    from stepflash.weights.load import load_model
    from stepflash.weights.packed import STORED

    target = _checked_device(device)
    path = resolve_model(model)
    # float32 asks for precision, and without native kernels packed weights are slower than decoded ones.
    has_kernels = load_kernels() if target.type == "cpu" else wants_tiles(target)
    if quantization is None and str(dtype).endswith("bfloat16") and has_kernels:
        # Prediction modules only propose: in fewer bits they are quicker, and no answer can change.
        return path, load_model(path, dtype=dtype, device=device, quantization=STORED, draft_format="int8")
    return path, load_model(path, dtype=dtype, device=device, quantization=quantization)


def _checked_device(name: str) -> torch.device:
    """Raises ConfigError for a device that is unknown or not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; it must be cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = (
            f"has {torch.cuda.device_count()}"
            if torch.cuda.is_available()
            else "has none that PyTorch can use"
        )
        raise ConfigError(
            f"device is {name!r}, but this machine {found}; a CUDA build of PyTorch and a driver are needed"
        )
    return device


def _load_tokenizer(path: Path) -> Tokenizer | None:
    """The checkpoint's tokenizer; a folder of bare weights has none, and token ids still work."""
    from stepflash.chat.tokenizer import Tokenizer

    if path.is_dir() and not (path / "tokenizer.json").is_file():
        return None
    return Tokenizer.from_pretrained(path)


def _as_list(prompts: str | Iterable[Any]) -> list[Any]:
    """One prompt, as text or as token ids, is a list of one; so is what is no list, to be refused as a whole."""
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if isinstance(prompts, str | bytes | Mapping | Set) or not isinstance(prompts, Iterable):
        return [prompts]
    prompts = list(prompts)
    return [prompts] if prompts and isinstance(prompts[0], (Real, type(None))) else prompts


@contextlib.contextmanager
def _interrupts_noted() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is only noted, and acted upon between two steps, where every block is accounted for; a second one
    acts at once. Where Python's own handler is not in charge nothing changes."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if is_ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _progress_bar(wanted: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[rate]}"),
        console=Console(stderr=True),
        transient=True,
        disable=not (wanted and sys.stderr.isatty()),
    )
