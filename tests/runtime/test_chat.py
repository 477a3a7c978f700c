"""Chat templates: what they render, what they may not do, and one begin-of-text."""

from __future__ import annotations

import datetime

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors

from runtime.chat import Conversation, render_chat
from runtime.tokenizer import Tokenizer

# Blocks in the manner of Llama 3: header, text, end.
TEMPLATE = """
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = 'Be brief.' %}
{%- endif %}
{{- bos_token + '<|system|>' + system + eos_token }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
HELLO = [{"role": "user", "content": " hello "}]


def tokenizer(template: str | None, *, prepend: bool = True, append: bool = False) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*SPECIAL, *alphabet])}
    library = Library(models.BPE(vocab, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(SPECIAL)
    around = [*(["<s>"] if prepend else []), "$A", *(["</s>"] if append else [])]
    library.post_processor = processors.TemplateProcessing(
        " ".join(around), None, [("<s>", 0), ("</s>", 1)]
    )
    return Tokenizer(library, TOKENS, template, {})


def spelled(made: Tokenizer, conversation: Conversation) -> str:
    return made.decode(conversation.prompt_ids(made), skip_special_tokens=False)


# --- rendering ---


def test_template_renders_blocks_and_the_beginning_of_the_answer() -> None:
    expected = "<s><|system|>Be brief.</s><|user|>hello</s>"
    assert render_chat(TEMPLATE, HELLO, TOKENS) == f"{expected}<|assistant|>"
    assert render_chat(TEMPLATE, HELLO, TOKENS, add_generation_prompt=False) == expected


def test_blocks_leave_no_line_breaks_or_indentation() -> None:
    template = "{% if true %}\n    {% set x = 1 %}\nyes\n{% endif %}\n"
    assert render_chat(template, [], {}) == "yes\n"


def test_break_and_continue_are_known() -> None:
    template = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
    template += "{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render_chat(template, [], {}) == "02"


def test_json_is_not_escaped_for_html() -> None:
    template = "{{ messages | tojson }}"
    messages = [{"role": "user", "content": "<é & 'ü'>"}]
    assert render_chat(template, messages, {}) == ('[{"role": "user", "content": "<é & \'ü\'>"}]')


def test_json_takes_an_indentation() -> None:
    assert render_chat("{{ {'a': 1} | tojson(indent=2) }}", [], {}) == '{\n  "a": 1\n}'


def test_template_can_ask_for_the_date() -> None:
    year = datetime.datetime.now().astimezone().year
    assert int(render_chat("{{ strftime_now('%Y') }}", [], {})) - year in {0, 1}


def test_further_variables_reach_the_template() -> None:
    template = "{% if date_string is defined %}{{ date_string }}{% else %}none{% endif %}"
    assert render_chat(template, [], {}) == "none"
    assert render_chat(template, [], {}, date_string="May") == "May"


def test_template_changes_no_message() -> None:
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(ValueError, match="template"):
        render_chat("{{ messages[0].update({'content': 'bye'}) }}", messages, {})
    assert messages == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for x in %}", "template"),
        ("{{ messages[0].nothing.at.all }}", "undefined|no attribute"),
        ("{{ nothing.at_all }}", "undefined"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 'a' + 1 }}", "template"),
        ("{{ 1 / 0 }}", "template"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "[Rr]ange"),
        ("{% include 'other' %}", "template"),
    ],
)
def test_fault_of_a_template_is_an_error_that_says_so(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        render_chat(template, HELLO, TOKENS)
    assert "chat template" in str(caught.value)


# --- conversations ---


def test_conversation_keeps_turns_in_order() -> None:
    conversation = Conversation(system="Rhyme.")
    conversation.add_user("hi")
    conversation.add_assistant("why")
    conversation.add_user("bye")
    assert spelled(tokenizer(TEMPLATE), conversation) == (
        "<s><|system|>Rhyme.</s><|user|>hi</s><|assistant|>why</s><|user|>bye</s><|assistant|>"
    )


def test_conversation_without_system_text_has_no_system_message() -> None:
    conversation = Conversation()
    conversation.add_user("hi")
    assert [message["role"] for message in conversation.messages] == ["user"]


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("bos_token + ", "")])
def test_prompt_begins_with_exactly_one_begin_of_text(template: str) -> None:
    conversation = Conversation()
    conversation.add_user("hi")
    made = tokenizer(template)
    ids = conversation.prompt_ids(made)
    assert ids[0] == made.bos_token_id
    assert ids.count(0) == 1


def test_begin_of_text_is_not_invented() -> None:
    conversation = Conversation()
    conversation.add_user("hi")
    made = tokenizer(TEMPLATE.replace("bos_token + ", ""), prepend=False)
    assert 0 not in conversation.prompt_ids(made)


def test_prompt_does_not_end_with_an_end_of_text_that_the_tokenizer_appends() -> None:
    conversation = Conversation()
    conversation.add_user("hi")
    for template in (TEMPLATE, TEMPLATE.replace("bos_token + ", "")):
        made = tokenizer(template, append=True)
        assert conversation.prompt_ids(made)[-1] == SPECIAL.index("<|assistant|>")


def test_checkpoint_without_template_is_an_error_that_names_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"no chat template.*--prompt"):
        Conversation().prompt_ids(tokenizer(None))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__.co_code }}",
        "{{ ''['__class__'].__mro__ }}",
        "{{ (messages | attr('__class__')).__name__ }}",
        "{% set x = messages.append(1) %}",
        "{% set x = messages[0].update(role='x') %}",
    ],
)
def test_way_out_of_the_sandbox_is_refused(template: str) -> None:
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(ValueError, match="the chat template cannot be rendered: "):
        render_chat(template, messages, {})
    assert messages == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    "template", ["{{ strftime_now.__code__ }}", "{{ '{0.__class__}'.format(messages) }}"]
)
def test_private_attribute_is_as_if_it_were_not_there(template: str) -> None:
    assert render_chat(template, [], {}) == ""
