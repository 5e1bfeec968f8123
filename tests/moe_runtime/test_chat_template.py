"""Chat templates: the same text as transformers renders, and bounds on what a template can do."""

import re
from datetime import datetime

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from moe_runtime import chat_template
from moe_runtime.chat_template import ChatTemplate
from moe_runtime.tokenizer import Tokenizer
from tests.moe_runtime.text_helpers import (
    HARMONY_TEMPLATE,
    byte_level_json,
    harmony_tokenizer,
)

CHAT = [
    {"role": "system", "content": 'Be <brief> & "kind".\n'},
    {"role": "user", "content": " caf\u00e9? \u4f60\u597d"},
    {"role": "assistant", "content": "Yes.", "thinking": "they ask"},
    {"role": "user", "content": "And the weather?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "call the tool",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "K\u00f8benhavn"}}}],
    },
    {"role": "tool", "name": "weather", "content": '{"sky": "blue"}'},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The <weather>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]

TEMPLATES = {
    "harmony-like": HARMONY_TEMPLATE,
    "white space control": (
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n    U: {{ m.content }}\n"
        "  {% else %}\n    {{- m.role }}\n  {%- endif %}\n{% endfor %}\n"
    ),
    "break and continue": (
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
        "{% if loop.index > 3 %}{% break %}{% endif %}{{ loop.index0 }}{{ m.content }}{% endfor %}"
    ),
    "tojson": (
        "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}"
        "{{ m | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}{% endfor %}"
    ),
    "generation keeps its names to itself": (
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    ),
    "namespace, dict, slices": (
        "{% set ns = namespace(n=0, self='s') %}{% for m in messages[::-1] %}"
        "{% set ns.n = ns.n + (m.content or '') | length %}{% endfor %}{{ ns.n }}{{ ns.self }}"
        "{{ dict(a=1).a }}{{ dict.fromkeys(['k'], 3)['k'] }}{{ tools is defined }}"
    ),
    "loop attributes": (
        "{% for m in messages %}{{ loop.length }}{{ loop.last }}{{ loop.revindex }}"
        "{{ loop.previtem.role if loop.previtem }}{{ loop.nextitem.role if loop.nextitem }}"
        "{% else %}none{% endfor %}"
    ),
    "loops over pairs, with a condition, with changed, recursive": (
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}"
        "{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }} {% endfor %}"
        "{% for m in messages %}{% if loop.changed(m.role) %}{{ m.role }}{% endif %}{% endfor %}"
        "{% for x in [[1, [2]], 3] recursive %}{% if x is iterable %}<{{ loop(x) }}>"
        "{% else %}{{ x }}{% endif %}{% endfor %}"
    ),
    "string methods and arithmetic": (
        "{{ messages[1].content.strip().split(' ')[-1] }}{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ 7 // 2 }}"
        "{{ [1, 2] * 2 }}{{ 'a,b'.replace(',', '-') | upper }}{{ '%05.1f' | format(2.25) }}"
    ),
    "date": "{{ strftime_now('%Y') }}",
    "undefined is empty": "[{{ nothing }}]{% for x in nothing %}x{% endfor %}",
    "macro": "{% macro m(a, b='x') %}<{{ a }}{{ b }}>{% endmacro %}{{ m(1) }}{{ m(2, b=3) }}",
}  # fmt: skip


@pytest.mark.parametrize("with_prompt", [False, True], ids=["", "generation prompt"])
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_renders_as_transformers_does(source, with_prompt):
    options = {"today": "2026-01-01", "reasoning_effort": "high"}
    theirs, _ = render_jinja_template(
        [CHAT], tools=TOOLS, chat_template=source, add_generation_prompt=with_prompt, **options
    )
    ours = Tokenizer.from_json(byte_level_json(), chat_templates={"default": source})
    assert theirs[0] == ours.apply_chat_template(
        CHAT, tools=TOOLS, add_generation_prompt=with_prompt, tokenize=False,
        template_options=options,
    )  # fmt: skip


def test_ids_equal_those_of_a_transformers_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_level_json())
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        chat_template=HARMONY_TEMPLATE,
        eos_token="<|return|>",
    )
    expected = theirs.apply_chat_template(
        CHAT, tools=TOOLS, add_generation_prompt=True, today="2026-01-01", return_dict=False
    )
    ours = harmony_tokenizer()
    options = {"today": "2026-01-01"}
    assert ours.apply_chat_template(CHAT, tools=TOOLS, template_options=options) == expected


def test_the_harmony_like_template_says_what_it_should():
    """A test of the test's template: history without old analysis, header of the next turn."""
    text = harmony_tokenizer().apply_chat_template(
        CHAT, tokenize=False, template_options={"today": "2026-01-01"}
    )
    assert "they ask" not in text
    assert "<|channel|>analysis<|message|>call the tool<|end|>" in text
    assert "<|start|>assistant<|channel|>final<|message|>Yes.<|end|>" in text
    assert "to=functions.weather <|constrain|>json<|message|>" in text
    assert text.endswith("<|start|>assistant")


def test_strftime_now_is_the_local_date():
    before = datetime.now().strftime("%Y-%m-%d")
    text = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render({})
    assert text in (before, datetime.now().strftime("%Y-%m-%d"))


FAILURES = {
    "syntax": ("{% if %}", "line 1: Expected an expression"),
    "unknown tag": ("a\n{% nonsense %}", "line 2: Encountered unknown tag 'nonsense'"),
    "own error": ("{{ raise_exception('no\nsystem role') }}", "^chat template: no system role$"),
    "missing item": ("{{ messages[9].content }}", "no element 9"),
    "bad operands": ("{{ 1 + 'a' }}", "TypeError: unsupported operand"),
    "bad filter": ("{{ 1 | nonsense }}", "No filter named 'nonsense'"),
    "not JSON": ("{{ (1).real.__class__ | tojson }}", "unsafe|not JSON"),
    "endless macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "deep nesting": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
    "include": ("{% include 'x' %}", "chat template: "),
}


@pytest.mark.parametrize(("source", "reason"), FAILURES.values(), ids=FAILURES)
def test_failures_are_one_line(source, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        ChatTemplate(source).render({"messages": []})
    assert str(caught.value).startswith("chat template: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 320


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ dict.__class__.__init__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
    "{{ '%s'.format.__self__ }}{{ '{0.__class__}'.format(1) }}",
    "{{ lipsum(n=100000) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ (messages | map(attribute='__class__') | list)[0].x }}",
]


@pytest.mark.parametrize("source", ATTACKS)
def test_the_sandbox_holds(source):
    """Python's insides are either refused or, like anything undefined, empty."""
    try:
        assert ChatTemplate(source).render({"messages": [1]}) == ""
    except ValueError as error:
        assert str(error).startswith("chat template: ")


BOMBS = {
    "nested ranges": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "seconds",
    ),
    "one range, looped over again": (
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
        "seconds",
    ),
    "macro that doubles": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "seconds",
    ),
    "endless text": ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "characters"),
    "long text": ("{{ 'x' * 1000000000 }}", "too often"),
    "long list": ("{{ ([1] * 1000000000) | length }}", "too often"),
    "reversed operands": ("{{ 1000000000 * 'x' }}", "too often"),
    "long range": ("{{ range(1000000000) | list }}", "MAX_RANGE"),
    "tower of powers": ("{{ 9 ** 99999999 }}", "enormous power"),
}  # fmt: skip


@pytest.mark.parametrize(("source", "reason"), BOMBS.values(), ids=BOMBS)
def test_bombs_are_stopped(source, reason, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    with pytest.raises(ValueError, match=reason):
        ChatTemplate(source).render({"messages": []})


def test_a_template_can_be_used_again_after_it_was_stopped(monkeypatch):
    template = ChatTemplate(
        "{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}ok"
    )
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    with pytest.raises(ValueError, match=re.escape("over 0.2 seconds")):
        template.render({"n": 99_999})
    assert template.render({"n": 3}) == "ok"
