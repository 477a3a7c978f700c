"""Conversations: a checkpoint's own chat template, rendered in a sandbox."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime.tokenizer import Tokenizer

Message = Mapping[str, str]

# What a template's expressions raise besides jinja2's own errors: "a" + 1, 1 / 0, a huge range.
_TEMPLATE_FAULTS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class Conversation:
    """The turns so far and the prompt that they make."""

    def __init__(self, system: str | None = None) -> None:
        self.messages: list[Message] = []
        if system is not None:
            self._add("system", system)

    def add_user(self, text: str) -> None:
        """Add what the user says."""
        self._add("user", text)

    def add_assistant(self, text: str) -> None:
        """Add what the model answered."""
        self._add("assistant", text)

    def prompt_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Ids of the conversation, ready for the model's next turn, with one begin-of-text.

        Most templates write begin-of-text themselves; encoding them with special tokens on, as one
        would a plain text, gives it twice.

        Raises:
            ValueError: the checkpoint has no template, or it cannot be rendered.
        """
        if tokenizer.chat_template is None:
            raise ValueError(
                "this checkpoint has no chat template, so --chat has nothing to go by; use --prompt"
            )
        text = render_chat(tokenizer.chat_template, self.messages, tokenizer.special_tokens)
        ids = tokenizer.encode(text, add_special_tokens=False)
        bos = tokenizer.bos_token_id
        if bos is not None and tokenizer.prepends_bos and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def _add(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})


def render_chat(
    template: str,
    messages: Sequence[Message],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
    **extra: object,
) -> str:
    """Render a chat template as transformers does.

    The environment is jinja2's immutable sandbox: a template reaches no attribute that could run
    code, and changes nothing that it is given.

    Args:
        template: jinja source.
        messages: objects with `role` and `content`.
        special_tokens: `bos_token` and the like.
        add_generation_prompt: end with the beginning of the model's turn.
        extra: more variables that the template knows, over the others where they are named alike.

    Raises:
        ValueError: the template has an error, refuses these messages, or leaves the sandbox.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    try:
        return environment.from_string(template).render(
            {
                **special_tokens,
                "messages": [dict(message) for message in messages],
                "add_generation_prompt": add_generation_prompt,
                **extra,
            }
        )
    except (TemplateError, *_TEMPLATE_FAULTS) as error:
        raise ValueError(f"the chat template cannot be rendered: {error}") from error


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(style: str) -> str:
    return datetime.datetime.now().astimezone().strftime(style)


def _to_json(value: object, indent: int | None = None, **options: Any) -> str:
    """jinja2's own filter escapes for HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
