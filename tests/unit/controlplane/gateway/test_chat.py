"""Chat templates in the sandbox."""

from __future__ import annotations

import pytest

from controlplane.api.errors import ApiError
from controlplane.api.openai import Message
from controlplane.gateway.chat import ChatTemplate
from controlplane.gateway.modelcard import CardError, ModelCard

HI = [Message(role="user", content="hi <b>")]


def card(template: str) -> ModelCard:
    return ModelCard("", "llama", b"{}", template, 128, 8, 0, (1,), (), "<s>", "</s>")


def render(template: str, messages: list[Message] = HI, max_chars: int = 10_000, seconds: float = 2) -> str:
    return ChatTemplate(card(template), seconds=seconds).render(messages, max_chars=max_chars)


def test_what_templates_expect_is_there() -> None:
    assert render("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}") == (
        "<s>hi <b></s>"
    )
    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "hi <b>"}]'
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{% if add_generation_prompt %}go{% endif %}") == "go"
    assert render("x\n    {% if true %}\ny\n    {% endif %}\nz") == "x\ny\nz", "trim_blocks, lstrip_blocks"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[5].content.nothing }}",
        "{{ 1 + 'a' }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 'x' * 100000000 }}",
        "{{ 9 ** 9999999 }}",
        "{% for i in range(99999999) %}{% endfor %}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_a_template_must_not_do_is_a_400(template: str) -> None:
    with pytest.raises(ApiError) as caught:
        render(template)
    assert caught.value.status == 400 and caught.value.param == "messages"


def test_size_and_time_are_bounded() -> None:
    endless = "{% for i in range(90000) %}{% for j in range(90000) %}ab{% endfor %}{% endfor %}"
    with pytest.raises(ApiError) as size:
        render(endless)
    assert size.value.code == "context_length_exceeded"
    with pytest.raises(ApiError) as late:
        render(endless, max_chars=10**12, seconds=0.05)
    assert late.value.status == 504


def test_a_template_that_does_not_compile_is_no_card() -> None:
    with pytest.raises(CardError):
        render("{% for %}")


def test_messages_are_given_as_templates_know_them() -> None:
    messages = [
        Message(role="developer", content="rules"),
        Message(role="assistant", content=None),
        Message.model_validate({"role": "user", "content": [{"type": "text", "text": "a"}], "name": "bob"}),
    ]
    assert render("{{ messages | tojson }}", messages) == (
        '[{"role": "system", "content": "rules"}, {"role": "assistant", "content": ""}, '
        '{"role": "user", "content": "a", "name": "bob"}]'
    )


CHATML = """{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{% for m in messages %}
{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>' }}
{% for call in m.tool_calls %}{{ call | tojson }}{% endfor %}{% endfor %}"""


@pytest.mark.parametrize(
    ("template", "plain"),
    [
        (CHATML, True),
        (
            "{% set ns = namespace(seen=false) %}{% for m in messages %}{% set ns.seen = true %}{% endfor %}",
            True,
        ),
        ("{% for m in messages %}{% set text = 'a' + m.content %}{{ text }}{% endfor %}", True),
        ("{% for i in range(9) %}{% endfor %}", False),
        ("{% for a in messages %}{% for b in messages %}{% endfor %}{% endfor %}", False),
        ("{% for a in messages %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", False),
        ("{% for a in messages %}{% set b = c + c %}{% set c = b + b %}{% endfor %}", False),
        ("{{ 'a' * 9 }}", False),
        ("{{ 2 ** 9 }}", False),
        ("{{ '%9999d' % 1 }}", False),
        ("{{ 'a' | center(9999) }}", False),
        ("{{ 'a'.ljust(9999) }}", False),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", False),
        ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", False),
    ],
)
def test_what_cannot_be_slow_is_told_from_its_syntax(template: str, plain: bool) -> None:
    assert ChatTemplate(card(template), seconds=2).plain is plain
