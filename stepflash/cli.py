"""The `stepflash` command.

One function per subcommand, with its imports inside, so that `--help` answers at once. Whatever a user can
cause ends in one line, `stepflash: error: ...`, and exit status 2; `--debug` or STEPFLASH_DEBUG=1 shows the
traceback as well.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from stepflash.errors import StepflashError
from stepflash.settings import (
    DEFAULT_MODEL,
    DTYPES,
    KV_DTYPES,
    LOG_FORMATS,
    REASONING_FIELDS,
    SCHEDULING_POLICIES,
    EngineSettings,
    ServerSettings,
    did_you_mean,
    is_debug,
)

if TYPE_CHECKING:
    from stepflash.assistant.local import LocalModel

USER_ERROR, BUG, INTERRUPTED = 2, 1, 130
MODEL_HELP = f"a folder, a .gguf file, a hub id or {DEFAULT_MODEL!r} (the default)"


class UsageError(StepflashError):
    """The command line is wrong."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with errors as exceptions instead of two lines and an exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    wants_traceback = is_debug() or "--debug" in arguments
    try:
        _check_command(arguments)
        args = build_parser().parse_args(arguments)
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader has gone, as `| head` does; nothing must be written to it when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except (StepflashError, OSError) as error:
        if wants_traceback:
            traceback.print_exc()
        print(f"stepflash: error: {error}", file=sys.stderr)
        return USER_ERROR
    except Exception as error:  # a bug: one line for the user, the rest on demand
        if wants_traceback:
            raise
        text = " ".join(str(error).split())
        print(
            f"stepflash: internal error: {type(error).__name__}: {text} (--debug shows the traceback)",
            file=sys.stderr,
        )
        return BUG


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = ArgumentParser(
        prog="stepflash",
        description="Everything around Step-3.5-Flash: load it, talk to it, serve it.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=VersionAction, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (summary, add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        command.set_defaults(run=run)
    return parser


class VersionAction(argparse.Action):
    """Prints the version; importing it only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import stepflash

        print(f"stepflash {stepflash.__version__}")
        parser.exit()


def _check_command(arguments: Sequence[str]) -> None:
    """Name the nearest command when the given one does not exist."""
    known = ", ".join(COMMANDS)
    if not arguments:
        raise UsageError(f"a command is needed: {known} (see stepflash --help)")
    first = arguments[0]
    if not first.startswith("-") and first not in COMMANDS:
        hint = did_you_mean(first, COMMANDS) or f"; there are {known}"
        raise UsageError(f"there is no command {first!r}{hint}")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help=MODEL_HELP)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--prompt", metavar="TEXT", help="what to answer or continue; default: standard input"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without chat template"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    _add_sampling(parser, default_max_tokens=1024)
    _add_engine(parser)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    _add_sampling(parser, default_max_tokens=None)
    _add_engine(parser)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    server = ServerSettings()
    parser.add_argument("--host", default=server.host, help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=server.port, help="port, 0 for any (%(default)s)")
    parser.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="accept only requests with this key; may be given several times",
    )
    parser.add_argument("--served-model-name", metavar="NAME", help="the name that clients use")
    parser.add_argument(
        "--upstream",
        metavar="URL",
        help="compute on this vLLM or SGLang server; MODEL gives tokenizer and template (docs/scale.md)",
    )
    parser.add_argument(
        "--upstream-api-key",
        metavar="KEY",
        help="the key of that server; also from STEPFLASH_UPSTREAM_API_KEY",
    )
    _add_access(parser)
    _add_limits(parser, server)
    _add_engine(parser)


def _add_access(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("access and logs")
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="accept the keys in this file: one a line, a name may follow; also from STEPFLASH_API_KEY",
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages from there use the API, as in https://chat.example; may be given several times",
    )
    group.add_argument(
        "--log-format", default="auto", metavar="FORMAT", help=f"{', '.join(LOG_FORMATS)} (%(default)s)"
    )
    group.add_argument("--log-prompts", action="store_true", help="put the prompts into the log")
    group.add_argument(
        "--keep-client-noise",
        action="store_true",
        help="render prompts as they come; what clients change for no reason then costs cached prefixes",
    )
    group.add_argument(
        "--reasoning-field", default="reasoning_content", metavar="NAME",
        help=f"where chat completions tell the thought: {', '.join(REASONING_FIELDS)} (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--otlp-endpoint", metavar="URL", help="send OpenTelemetry traces there (needs stepflash[otel])"
    )


def _add_limits(parser: argparse.ArgumentParser, server: ServerSettings) -> None:
    group = parser.add_argument_group("limits", "a client is an API key, or an address if there are no keys")
    group.add_argument("--requests-per-minute", type=int, metavar="N", help="of one client")
    group.add_argument("--tokens-per-minute", type=int, metavar="N", help="of one client, prompts included")
    group.add_argument("--max-requests-per-client", type=int, metavar="N", help="that run and wait at once")
    group.add_argument(
        "--max-open-answers",
        type=int,
        default=server.max_open_answers,
        metavar="N",
        help="that run and wait for all clients; more are refused with 429 or 529 (%(default)s)",
    )
    group.add_argument(
        "--scheduling-policy",
        default=server.scheduling_policy,
        metavar="POLICY",
        help=f"{' or '.join(SCHEDULING_POLICIES)}: priority lets requests say theirs, lower runs first (%(default)s)",
    )
    group.add_argument(
        "--request-timeout",
        type=float,
        metavar="SECONDS",
        help="an answer that takes longer is cut there; one that has not begun is refused with 429 or 529",
    )
    group.add_argument("--max-output-tokens", type=int, metavar="N", help="longest answer, thought included")
    group.add_argument(
        "--max-thinking-tokens", type=int, metavar="N", help="longest thought, where a request does not say"
    )
    group.add_argument(
        "--max-task-thinking-tokens",
        type=int,
        metavar="N",
        help="of all thoughts since the last message of the user, where a request does not say",
    )
    group.add_argument(
        "--no-loop-guard", action="store_true", help="let thoughts go on that repeat themselves over and over"
    )
    group.add_argument(
        "--max-body-mb",
        type=float,
        default=server.max_body_bytes / 2**20,
        metavar="MB",
        help="largest request (%(default)g)",
    )
    group.add_argument(
        "--drain-seconds",
        type=int,
        default=server.drain_seconds,
        metavar="N",
        help="how long running answers may go on after SIGTERM (%(default)s)",
    )


def _server_settings(args: argparse.Namespace) -> ServerSettings:
    if not 0 < args.max_body_mb < math.inf:
        raise UsageError(f"--max-body-mb must be above 0, got {args.max_body_mb:g}")
    keys = (*args.api_key, *filter(None, [os.environ.get("STEPFLASH_API_KEY")]))
    if args.api_key_file is not None:
        from stepflash.server.keys import read_key_file

        keys += read_key_file(args.api_key_file)
    return ServerSettings(
        host=args.host,
        port=args.port,
        api_keys=keys,
        cors_origins=tuple(args.cors_origin),
        max_body_bytes=int(args.max_body_mb * 2**20),
        max_output_tokens=args.max_output_tokens,
        max_thinking_tokens=args.max_thinking_tokens,
        max_task_thinking_tokens=args.max_task_thinking_tokens,
        stops_thinking_loops=not args.no_loop_guard,
        max_open_answers=args.max_open_answers,
        scheduling_policy=args.scheduling_policy,
        request_timeout=args.request_timeout,
        max_requests_per_client=args.max_requests_per_client,
        requests_per_minute=args.requests_per_minute,
        tokens_per_minute=args.tokens_per_minute,
        drain_seconds=args.drain_seconds,
        log_format=args.log_format,
        log_prompts=args.log_prompts,
        is_canonical=not args.keep_client_noise,
        reasoning_field=args.reasoning_field,
        otlp_endpoint=args.otlp_endpoint,
    )


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--verify", action="store_true", help="read every tensor and check its values")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_sampling(parser: argparse.ArgumentParser, default_max_tokens: int | None) -> None:
    group = parser.add_argument_group("sampling", "what is not given is taken from the model's own settings")
    limit = "up to the end of the context" if default_max_tokens is None else str(default_max_tokens)
    group.add_argument(
        "--max-tokens", type=int, default=default_max_tokens, metavar="N", help=f"longest answer ({limit})"
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--seed", type=int)
    group.add_argument(
        "--draft-depth", type=int, metavar="0..3", help="drafted tokens a step; adapts if not given"
    )
    group.add_argument("--no-thinking", action="store_true", help="answer without a thought")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu (the default), cuda or cuda:N")
    group.add_argument(
        "--threads", type=int, metavar="N", help="that compute on the CPU (one a core, or OMP_NUM_THREADS)"
    )
    group.add_argument(
        "--dtype", metavar="TYPE", help=f"of weights, and of keys and values: {', '.join(DTYPES)}"
    )
    group.add_argument(
        "--quantization", metavar="FORMAT", help="pack the weights while loading: int4, int8, fp8, bf16, ..."
    )
    group.add_argument(
        "--allow-known-bad",
        action="store_true",
        help="load a quantised model that its receipt or recipe condemns",
    )
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="requests that run together")
    group.add_argument("--kv-cache-gb", type=float, metavar="GB", help="memory for keys and values")
    group.add_argument("--kv-dtype", metavar="TYPE", help=f"of keys and values alone: {', '.join(KV_DTYPES)}")
    group.add_argument("--max-model-len", type=int, metavar="N", help="longest prompt and answer, in tokens")
    group.add_argument(
        "--prefix-cache", metavar="FILE", help="keep what was cached there across restarts; made if missing"
    )


def _engine_settings(args: argparse.Namespace) -> EngineSettings:
    if args.allow_known_bad:
        os.environ["STEPFLASH_ALLOW_KNOWN_BAD"] = "1"
    return EngineSettings(
        device=args.device,
        threads=args.threads,
        dtype=args.dtype,
        quantization=args.quantization,
        max_num_seqs=args.max_num_seqs,
        kv_cache_gb=args.kv_cache_gb,
        kv_dtype=args.kv_dtype,
        max_model_len=args.max_model_len,
        prefix_cache=args.prefix_cache,
    )


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters of the command line, checked before a model is loaded."""
    from stepflash.engine.request import SamplingParams

    names = ("temperature", "top_p", "top_k", "seed", "draft_depth")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    given["max_tokens"] = args.max_tokens
    SamplingParams(**given)
    return given


def _generate(args: argparse.Namespace) -> int:
    prompt = args.prompt
    if prompt is None:
        if sys.stdin.isatty():
            raise UsageError("--prompt TEXT is needed, or text on standard input")
        prompt = sys.stdin.read()
    if args.raw and (args.system or args.no_thinking):
        raise UsageError("--raw has no chat template, so --system and --no-thinking do not apply")
    engine_settings, sampling = _engine_settings(args), _sampling(args)

    from stepflash.assistant.local import open_session
    from stepflash.terminal.generate import run_generate

    with open_session(args.model, engine_settings) as local:
        run_generate(
            local.session,
            prompt,
            replace(local.sampling, **sampling),
            model_name=local.name,
            system=args.system,
            is_raw=args.raw,
            is_thinking=not args.no_thinking,
            as_json=args.json,
        )
    return 0


def _chat(args: argparse.Namespace) -> int:
    engine_settings, sampling = _engine_settings(args), _sampling(args)

    from stepflash.assistant.local import open_session
    from stepflash.terminal.chat import run_chat

    with open_session(args.model, engine_settings) as local:
        run_chat(
            local.session,
            replace(local.sampling, **sampling),
            model_name=local.name,
            system=args.system,
            is_thinking=not args.no_thinking,
        )
    return 0


def _serve(args: argparse.Namespace) -> int:
    engine_settings = _engine_settings(args)
    settings = _server_settings(args)

    from stepflash.server import logs, tracing
    from stepflash.server.app import create_app
    from stepflash.server.run import listen, run_server

    logs.configure(settings)
    exporter = tracing.span_exporter(settings.otlp_endpoint) if settings.otlp_endpoint else None
    with listen(settings) as listener, _open_engine(args, engine_settings) as local:
        name = args.served_model_name or local.name
        on_closed = () if exporter is None else (exporter,)
        app = create_app(local.session, name, settings=settings, defaults=local.sampling, on_closed=on_closed)
        return run_server(app, listener, settings, name)


def _open_engine(
    args: argparse.Namespace, settings: EngineSettings
) -> contextlib.AbstractContextManager[LocalModel]:
    """The model on this machine, or one that another server computes."""
    if args.upstream is None:
        from stepflash.assistant.local import open_session

        return open_session(args.model, settings)
    from stepflash.assistant.remote import open_remote_session

    key = args.upstream_api_key or os.environ.get("STEPFLASH_UPSTREAM_API_KEY") or None
    return contextlib.nullcontext(open_remote_session(args.model, args.upstream, settings, api_key=key))


def _inspect(args: argparse.Namespace) -> int:
    from stepflash.terminal.inspect import run_inspect

    return run_inspect(args.model, should_verify=args.verify, as_json=args.json)


AddArguments = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int]


def _tool(module: str) -> tuple[AddArguments, Run]:
    """A command that is a module of `stepflash.tools` with `add_arguments(parser)` and `run(options)`."""

    def load() -> Any:
        return import_module(f"stepflash.tools.{module}")

    return (lambda parser: load().add_arguments(parser)), (lambda options: int(load().run(options)))


def _quantize(args: argparse.Namespace) -> int:
    from stepflash.nano.evaluate import accuracy_by_tier
    from stepflash.tools.quantize_command import run

    return run(args, accuracy_by_tier)


# What the command line has: a summary, what to add to the parser, and what to run.
COMMANDS: dict[str, tuple[str, AddArguments, Run]] = {
    "generate": ("one completion", _add_generate, _generate),
    "chat": ("chat in the terminal", _add_chat, _chat),
    "serve": ("serve the OpenAI and Anthropic APIs and a chat page", _add_serve, _serve),
    "clients": ("the configuration of a coding agent for the server", *_tool("clients_command")),
    "inspect": ("configuration, layers, parameters, memory, tensors", _add_inspect, _inspect),
    "convert": ("a model as GGUF or safetensors", *_tool("convert")),
    "quantize": ("a model in fewer bits, with a receipt", _tool("quantize_command")[0], _quantize),
    "plan": ("what fits on a machine, how fast it can be, how to run it", *_tool("plan_command")),
    "cost": ("decoding cost of models, after the model card's table", *_tool("cost_command")),
    "doctor": ("check the installation and measure this machine", *_tool("doctor")),
    "bench": ("measure decode, prefill, speculation or a server", *_tool("bench")),
}

if __name__ == "__main__":
    sys.exit(main())
