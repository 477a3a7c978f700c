"""Conversations rendered by a template in the manner of Llama 3, and templates that must not run."""

from __future__ import annotations

import datetime
from collections.abc import Mapping

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from runtime.chat import Conversation, render_chat
from runtime.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}
TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('no such role: ' + message['role']) }}
    {%- endif %}
    {{- '<head>' + message['role'] + '</head>\\n\\n' + message['content'] | trim + '<eot>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<head>assistant</head>\\n\\n' }}
{%- endif %}
"""
HELLO = [{"role": "user", "content": " hello "}]
WORDS = ["<bos>", "<eos>", "<unk>", "hello", "bye", "<eot>"]


def chat_tokenizer(template: str | None, *, bos: bool = True) -> Tokenizer:
    vocab = {word: i for i, word in enumerate(WORDS)}
    library = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["<bos>", "<eos>", "<unk>", "<eot>"])
    if bos:
        library.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    return Tokenizer(library, SPECIAL, template, {})


def render(template: str, extra: Mapping[str, object] | None = None) -> str:
    return render_chat(template, HELLO, SPECIAL, **(extra or {}))


def test_conversation_becomes_the_templates_text() -> None:
    conversation = Conversation("be brief")
    conversation.add_user(" hello ")
    conversation.add_assistant("bye")
    conversation.add_user("hello?")
    assert render_chat(TEMPLATE, conversation.messages, SPECIAL) == (
        "<bos><head>system</head>\n\nbe brief<eot>"
        "<head>user</head>\n\nhello<eot>"
        "<head>assistant</head>\n\nbye<eot>"
        "<head>user</head>\n\nhello?<eot>"
        "<head>assistant</head>\n\n"
    )


def test_models_turn_is_begun_only_when_asked_for() -> None:
    text = render_chat(TEMPLATE, HELLO, SPECIAL, add_generation_prompt=False)
    assert text == "<bos><head>user</head>\n\nhello<eot>"


def test_conversation_without_a_system_message_begins_with_the_user() -> None:
    conversation = Conversation()
    conversation.add_user("hello")
    assert conversation.messages == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("bos", [True, False])
def test_bos_that_the_template_writes_stands_there_once(bos: bool) -> None:
    conversation = Conversation()
    conversation.add_user("hello")
    template = "{{ bos_token }} {{ messages[0].content }} <eot>"
    assert conversation.prompt_ids(chat_tokenizer(template, bos=bos)) == [0, 3, 5]


def test_bos_is_added_where_the_template_leaves_it_to_the_tokenizer() -> None:
    conversation = Conversation()
    conversation.add_user("hello")
    template = "{{ messages[0].content }} <eot>"
    assert conversation.prompt_ids(chat_tokenizer(template)) == [0, 3, 5]
    assert conversation.prompt_ids(chat_tokenizer(template, bos=False)) == [3, 5]


def test_checkpoint_without_a_template_is_an_error() -> None:
    with pytest.raises(ValueError, match="no chat template.*use --prompt"):
        Conversation().prompt_ids(chat_tokenizer(None))


# --- what templates may use ---


def test_blocks_leave_no_lines_behind() -> None:
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"


def test_loops_may_break_and_continue() -> None:
    template = (
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
        "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    )
    assert render(template) == "023"


def test_json_is_written_as_it_is_and_not_for_a_web_page() -> None:
    assert render("{{ x | tojson }}", {"x": {"a": "<é'&>"}}) == '{"a": "<é\'&>"}'
    assert render("{{ x | tojson(indent=2) }}", {"x": [1]}) == "[\n  1\n]"


def test_today_can_be_asked_for() -> None:
    years = {str(datetime.datetime.now().astimezone().year + i) for i in (-1, 0, 1)}
    assert render("{{ strftime_now('%Y') }}") in years


def test_extra_variables_go_before_the_others() -> None:
    assert render("{{ tools }} {{ bos_token }}", {"tools": "t", "bos_token": "b"}) == "t b"


# --- what templates may not do ---


def test_refusal_of_a_template_is_the_error() -> None:
    messages = [{"role": "pope", "content": "x"}]
    with pytest.raises(
        ValueError, match="^the chat template cannot be rendered: no such role: pope$"
    ):
        render_chat(TEMPLATE, messages, SPECIAL)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ ''['__class__'].__mro__ }}",
        "{{ '{0.__class__.__init__}'.format(messages) }}",
        "{{ (messages | attr('__class__')).__name__ }}",
    ],
)
def test_attributes_that_lead_out_of_the_sandbox_are_refused(template: str) -> None:
    with pytest.raises(ValueError, match="the chat template cannot be rendered: "):
        render(template)


def test_template_cannot_change_the_messages() -> None:
    with pytest.raises(ValueError, match="cannot be rendered"):
        render("{{ messages.append(1) }}")
    with pytest.raises(ValueError, match="cannot be rendered"):
        render("{{ messages[0].update(role='x') }}")
    assert HELLO == [{"role": "user", "content": " hello "}]


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ 'a' + 1 }}",
        "{{ 1 / 0 }}",
        "{{ nothing.at_all }}",
        "{{ range(10 ** 9) }}",
        "{{ messages | nosuchfilter }}",
        "{{ ('%d' | format('a')) }}",
    ],
)
def test_faulty_template_is_an_error_of_one_kind(template: str) -> None:
    with pytest.raises(ValueError, match="^the chat template cannot be rendered: "):
        render(template)
