"""Prompt to text: python runtime/generate.py BUNDLE --prompt TEXT."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.config import UnsupportedModelError
from runtime.backends import open_backend
from runtime.backends.base import BackendUnavailableError
from runtime.bundle import Bundle
from runtime.chat import Conversation
from runtime.command import (
    INTERRUPTED,
    SUCCESS,
    CommandParser,
    UsageError,
    print_json,
    run_command,
)
from runtime.options import (
    add_bundle_flags,
    end_of_text_ids,
    need_tokenizer,
    one_kind,
    open_tokenizer,
    parse_ids,
    threads_of,
)
from runtime.sampling import SamplingParams
from runtime.session import CONTEXT_POLICIES, GenerationEvent, GenerationSession, TokenLogprobs
from runtime.tokenizer import Tokenizer, read_generation_config

ERRORS = (BackendUnavailableError, OSError, UnsupportedModelError, ValueError)
_DEFAULTS = SamplingParams()


def make_parser() -> CommandParser:
    """The command's flags; those of sampling take their defaults from `SamplingParams`."""
    parser = CommandParser("generate", "Generate text from a bundle.")
    add_bundle_flags(parser)
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="repeatable; `-` reads stdin"
    )
    parser.add_argument(
        "--prompt-ids", action="append", type=parse_ids, metavar="1,2,3", help="repeatable"
    )
    parser.add_argument("--chat", action="store_true", help="a conversation, turns from stdin")
    parser.add_argument("--system", metavar="TEXT", help="system text of a conversation")
    parser.add_argument("--max-tokens", type=int, help=_help("max_tokens", "new tokens at most"))
    parser.add_argument("--min-tokens", type=int, help=_help("min_tokens", "no stop before"))
    parser.add_argument("--temperature", type=float, help=_help("temperature", "0 is greedy"))
    parser.add_argument("--top-k", type=int, help=_help("top_k", "0 keeps all"))
    parser.add_argument("--top-p", type=float, help=_help("top_p", "nucleus"))
    parser.add_argument("--min-p", type=float, help=_help("min_p", "share of the best"))
    parser.add_argument(
        "--repetition-penalty", type=float, help=_help("repetition_penalty", "1 is none")
    )
    parser.add_argument(
        "--presence-penalty", type=float, help=_help("presence_penalty", "0 is none")
    )
    parser.add_argument(
        "--frequency-penalty", type=float, help=_help("frequency_penalty", "0 is none")
    )
    parser.add_argument("--seed", type=int, help=_help("seed", "of the random numbers"))
    parser.add_argument("--stop", action="append", metavar="TEXT", help="repeatable")
    parser.add_argument("--stop-token-ids", type=parse_ids, metavar="1,2,3")
    parser.add_argument(
        "--logit-bias", action="append", type=_parse_bias, metavar="ID=V", help="repeatable"
    )
    parser.add_argument("--logprobs", type=int, metavar="N", help="log-probabilities, N best")
    parser.add_argument("--ignore-eos", action="store_true", default=None)
    parser.add_argument(
        "--generation-config",
        action="store_true",
        help="take sampling values that are not given from the checkpoint",
    )
    parser.add_argument(
        "--context-policy",
        choices=CONTEXT_POLICIES,
        default="stop",
        help="when prompt and max-tokens exceed the context: end there, or refuse",
    )
    parser.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, default=None, help="(one prompt: yes)"
    )
    return parser


def _help(name: str, meaning: str) -> str:
    return f"{meaning} ({getattr(_DEFAULTS, name)})"


def _parse_bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ID=VALUE, got {text!r}") from None


@dataclass(kw_only=True)
class _Output:
    """What has been generated from one prompt so far."""

    index: int
    prompt: str | None
    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "cancelled"
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, event: GenerationEvent) -> None:
        self.ids.append(event.token_id)
        self.text += event.text
        if event.logprobs is not None:
            self.logprobs.append(event.logprobs)
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason

    def as_dict(self, *, with_logprobs: bool) -> dict[str, Any]:
        result: dict[str, Any] = {
            "index": self.index,
            "prompt": self.prompt,
            "prompt_ids": self.prompt_ids,
            "ids": self.ids,
            "text": self.text,
            "finish_reason": self.finish_reason,
        }
        if with_logprobs:
            result["logprobs"] = [
                {"logprob": entry.logprob, "top": [list(pair) for pair in entry.top]}
                for entry in self.logprobs
            ]
        return result


def run(args: argparse.Namespace) -> int:
    """Generate and print; a conversation when `--chat`."""
    one_kind(prompt=args.prompt, prompt_ids=args.prompt_ids, chat=args.chat)
    if args.system is not None and not args.chat:
        raise UsageError("--system belongs to --chat")
    begin = time.perf_counter()
    bundle = Bundle.open(args.bundle)
    tokenizer = open_tokenizer(bundle)
    params = _sampling_params(args, bundle)
    prompts = [] if args.chat else list(_prompts(args, tokenizer))
    backend = open_backend(args.backend, bundle, variant=args.variant, threads=threads_of(args))
    session = GenerationSession(
        backend,
        tokenizer,
        eos_token_ids=end_of_text_ids(bundle, tokenizer),
        context_policy=args.context_policy,
    )
    load_s = time.perf_counter() - begin
    try:
        if args.chat:
            chat = Conversation(system=args.system)
            return _chat(session, need_tokenizer(tokenizer, "--chat"), chat, params, args)
        return _generate(session, prompts, params, load_s, args)
    finally:
        backend.close()


def _sampling_params(args: argparse.Namespace, bundle: Bundle) -> SamplingParams:
    """Flags first, then the checkpoint's values where asked for, then the defaults."""
    values: dict[str, Any] = {}
    if args.generation_config and bundle.tokenizer_folder is not None:
        values |= read_generation_config(bundle.tokenizer_folder)
    for parameter in dataclasses.fields(SamplingParams):
        given = getattr(args, parameter.name)
        if given is not None:
            values[parameter.name] = given
    for name in ("stop", "stop_token_ids"):
        values[name] = tuple(values.get(name, ()))
    values["logit_bias"] = dict(values.get("logit_bias", ()))
    return SamplingParams(**values)


def _prompts(args: argparse.Namespace, tokenizer: Tokenizer | None) -> Iterator[_Output]:
    if args.prompt_ids:
        for index, ids in enumerate(args.prompt_ids):
            yield _Output(index=index, prompt=None, prompt_ids=ids)
        return
    needed = need_tokenizer(tokenizer, "--prompt")
    for index, prompt in enumerate(args.prompt or ["-"]):
        text = sys.stdin.read() if prompt == "-" else prompt
        yield _Output(index=index, prompt=text, prompt_ids=needed.encode(text))


def _generate(
    session: GenerationSession,
    outputs: list[_Output],
    params: SamplingParams,
    load_s: float,
    args: argparse.Namespace,
) -> int:
    stream = len(outputs) == 1 if args.stream is None else args.stream
    stream = stream and not args.json
    if stream and len(outputs) > 1:
        raise UsageError("--stream shows one prompt as it grows; give one, or --no-stream")
    begin = time.perf_counter()
    first = None
    status = SUCCESS
    try:
        for event in session.generate([output.prompt_ids for output in outputs], params):
            first = time.perf_counter() if first is None else first
            outputs[event.index].add(event)
            if stream:
                _write(_shown(event, session))
    except KeyboardInterrupt:
        status = INTERRUPTED
    end = time.perf_counter()
    if stream:
        _write("\n")
    elif args.json:
        timings = _timings(outputs, load_s, begin, first or end, end)
        print_json(_result(session, outputs, timings, with_logprobs=params.logprobs is not None))
    else:
        for output in outputs:
            _write(f"{output.text if session.tokenizer else _ids_text(output.ids)}\n")
    return status


def _timings(
    outputs: list[_Output], load_s: float, begin: float, first: float, end: float
) -> dict[str, float | None]:
    """Seconds, and tokens after each prompt's first per second of decoding."""
    decoded = sum(len(output.ids) for output in outputs) - len(outputs)
    return {
        "load_s": round(load_s, 4),
        "ttft_s": round(first - begin, 4),
        "decode_s": round(end - first, 4),
        "tokens_per_s": round(decoded / (end - first), 1) if end > first and decoded > 0 else None,
    }


def _result(
    session: GenerationSession,
    outputs: list[_Output],
    timings: dict[str, float | None],
    *,
    with_logprobs: bool,
) -> dict[str, Any]:
    return {
        "backend": session.backend.name,
        "variant": session.backend.variant,
        "outputs": [output.as_dict(with_logprobs=with_logprobs) for output in outputs],
        "usage": {
            "prompt_tokens": sum(len(output.prompt_ids) for output in outputs),
            "completion_tokens": sum(len(output.ids) for output in outputs),
        },
        "timings": timings,
    }


def _shown(event: GenerationEvent, session: GenerationSession) -> str:
    """Text of an event as it is streamed; ids where there is no tokenizer."""
    return event.text if session.tokenizer else f"{event.token_id} "


def _ids_text(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _chat(
    session: GenerationSession,
    tokenizer: Tokenizer,
    conversation: Conversation,
    params: SamplingParams,
    args: argparse.Namespace,
) -> int:
    """A turn per line of stdin; Ctrl-C ends an answer, end of input the conversation.

    With `--json` every answer is one line of JSON.
    """
    if tokenizer.chat_template is None:
        conversation.prompt_ids(tokenizer)  # raises, saying what the checkpoint lacks
    asking = sys.stdin.isatty() and not args.quiet
    while True:
        if asking:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return SUCCESS
        if not line.strip():
            continue
        conversation.add_user(line.rstrip("\n"))
        ids = conversation.prompt_ids(tokenizer)
        output = _Output(index=0, prompt=line.rstrip("\n"), prompt_ids=ids)
        status = _generate(session, [output], params, 0.0, args)
        conversation.add_assistant(output.text)
        if status == INTERRUPTED and not asking:
            return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(make_parser(), run, argv, ERRORS)


if __name__ == "__main__":
    sys.exit(main())
