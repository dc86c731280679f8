"""Chat templates of strangers that loop, grow, or reach for what is not theirs."""

import threading
import time

import pytest
from peaks import forget_peak, peak_bytes

from interviewmate_mlx.formats.jinja_file import (
    MAX_TEXT_CHARS,
    Rendering,
    TemplateFault,
    read_template,
)

MESSAGES = [{"role": "user", "content": "What is a loss?"}]
ASKS = "{% set s = messages[0].content %}"

GROWS = {
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "a long loop": "{% for a in range(10 ** 9) %}{% endfor %}",
    "writing in a loop": "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "text in a loop": "{% for a in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "many characters": "{{ 'x' * 10 ** 10 }}",
    "many numbers": "{{ 9 ** 9 ** 9 ** 9 }}",
    "many items": "{{ [1] * 10 ** 9 }}",
    "a width": "{{ 'x'.ljust(10 ** 10) }}",
    "a width in a format": "{{ '%1000000000d' % 1 }}",
    "a width in a filter": "{{ '%1000000000d' | format(1) }}",
    "a width in a method": "{{ '{:1000000000}'.format(1) }}",
    "a centre": "{{ 'x' | center(1000000000) }}",
    "an indent": "{{ s | indent(1000000000) }}",
    "an indent of JSON": "{{ messages | tojson(indent=1000000000) }}",
    "lorem ipsum": "{{ lipsum(n=1000000) }}",
    "doubling": ASKS + "{% set ns = namespace(x=s) %}"
    "{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by joining": ASKS + "{% set ns = namespace(x=s) %}"
    "{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by a filter": ASKS + "{% set ns = namespace(x=s) %}"
    "{% for a in range(60) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "doubling by replacing": ASKS + "{% set ns = namespace(x=s) %}"
    "{% for a in range(60) %}{% set ns.x = ns.x.replace('s', ns.x) %}{% endfor %}",
    "doubling by a filter that replaces": ASKS + "{% set ns = namespace(x=s) %}"
    "{% for a in range(60) %}{% set ns.x = ns.x | replace('s', ns.x) %}{% endfor %}",
    "doubling by a method that joins": ASKS + "{% set ns = namespace(x=s) %}"
    "{% for a in range(60) %}{% set ns.x = ns.x.join(['s', 's', 's']) %}{% endfor %}",
    "doubling by a block": ASKS + "{% set ns = namespace(x=s) %}"
    "{% for a in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = y %}{% endfor %}",
    "doubling of lists": "{% set ns = namespace(x=[1]) %}"
    "{% for a in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "doubling of sums": "{% set ns = namespace(x=[1]) %}"
    "{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling of dictionaries": "{% set ns = namespace(x={}) %}"
    "{% for a in range(60) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}"
    "{{ ns.x == ns.x }}",
    "squaring": "{% set ns = namespace(x=9) %}"
    "{% for a in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "a macro that calls itself": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}"
    "{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a loop that calls itself": "{% for a in [[1]] recursive %}{{ loop([a, a]) }}{% endfor %}",
    "a call block": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 17 + "{{ 'x' * 999 }}" + "{% endcall %}" * 17,
    "many filters": "{{ s" + " | upper" * 5000 + " }}",
    "deep nesting": "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
    "deep lists": "{{ " + "[" * 9000 + "]" * 9000 + " }}",
    "deep blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "deep loops": "{% for a in [1] %}" * 300 + "{% endfor %}" * 300,
    "a long sum": "{{ 1" + " + 1" * 20000 + " }}",
    "a long number": "{{ " + "9" * 90000 + " }}",
    "size": "x" * (MAX_TEXT_CHARS + 1),
}  # fmt: skip
REACHES = {
    "a class": "{{ ''.__class__ }}",
    "a class of a list": "{{ ().__class__.__base__.__subclasses__() }}",
    "a class by a filter": "{{ '' | attr('__class__') }}",
    "a class by a key": "{{ ''['__class__'] }}",
    "a class by mapping": "{{ [''] | map(attribute='__class__') | list }}",
    "a class in a format": "{{ '{0.__class__}'.format('') }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "globals of a macro": "{% macro f() %}{% endmacro %}{{ f.__globals__ }}{{ f._func }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.system('id') }}",
    "globals of joiner": "{{ joiner.__init__.__globals__ }}",
    "globals of namespace": "{{ namespace.__init__ }}",
    "attributes of namespace": "{% set ns = namespace(__class__=1) %}{{ ns }}",
    "the template itself": "{{ self.__init__ }}",
    "the template's parts": "{{ self._TemplateReference__context }}",
    "the loop's environment": "{% for a in [1] %}{{ loop._iterable }}{% endfor %}",
    "another file": "{% include '/etc/passwd' %}",
    "another template": "{% extends 'x' %}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "code of a function": "{{ messages.append.__self__ }}",
    "a change of the messages": "{{ messages.append(1) }}",
    "a change of a message": "{{ messages[0].update(a=1) }}",
    "writing a message": "{{ messages[0] }}",
    "writing a function": "{{ range }}",
    "an encoding": "{{ 'x'.encode('utf-16') }}",
    "bytes of a number": "{{ (1).to_bytes(1000000000) }}",
    "a translation": "{{ 'x'.translate('y') }}",
    "printing": "{{ messages | pprint }}",
    "debugging": "{% debug %}",
    "a line of Python": "{% do 1 %}",
    "an exception": "{{ raise_exception('no') }}",
    "what is not there": "{{ nothing.at.all }}",
    "a wrong type": "{{ 1 + 'a' }}",
    "half of a tag": "{{ 1",
    "no such tag": "{% system 'id' %}",
    "an odd date": "{{ strftime_now(messages) }}",
}


@pytest.mark.parametrize("text", [*GROWS.values(), *REACHES.values()], ids=[*GROWS, *REACHES])
def test_template_is_stopped_with_a_reason(text):
    forget_peak()
    before, start = peak_bytes(), time.monotonic()
    with pytest.raises(TemplateFault) as caught:
        Rendering(text).render(MESSAGES, eos_token="</s>")
    assert 0 < len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 20
    assert peak_bytes() - before < 600 << 20


def test_what_a_template_may_do_is_enough_for_long_conversations():
    text = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim }}"
        "{{ '<|im_end|>' ~ '\n' }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "word " * 2000}] * 1000
    assert len(read_template(text).render(messages)) > 9_000_000


def test_what_one_thread_spends_is_not_anothers():
    text = "{% for a in range(60000) %}{% endfor %}{{ messages[0].content }}"
    texts: list[str] = []

    def render() -> None:
        texts.append(read_template(text).render(MESSAGES))

    threads = [threading.Thread(target=render) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["What is a loss?"] * 4
