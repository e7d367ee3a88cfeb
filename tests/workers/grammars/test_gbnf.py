"""GBNF as Lark: the example grammars of llama.cpp, its characters, and what is refused."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.grammar_texts import Texts
from workers.errors import InvalidRequest
from workers.grammars import gbnf_terminals
from workers.grammars.gbnf import MAX_CHARS, gbnf_to_lark
from workers.grammars.gbnf_terminals import _Alphabet
from workers.grammars.grammar import is_gbnf, lark_or_gbnf

EXAMPLES = Path(__file__).parents[2] / "golden" / "gbnf"
TEXTS = {
    "arithmetic": (["a=1\n", "(x1 +2)*y = 3\nb=c\n"], ["a=1", "=1\n", "a==1\n", "1a=2\n"]),
    "c": (
        ["int f(){return 1;}", "int f(int x){while(x<1){y = 2;}}//c\n".replace("}//c\n", "}"), ""],
        ["int f(){", "double f(){}", "int 1f(){}"],
    ),
    "chess": (
        ["1. e4 e5\n2. Nf3 Nc6\n", "1. O-O d8=Q+\n10. exd5 O-O-O#\n"],
        ["1. e4 e5\n", "1. e9 e5\n2. a1 a2\n"],
    ),
    "english": (["Hello, world!\nYes [1] \\ ^ _.", "a"], ["", "a  b", "é"]),
    "japanese": (["こんにちは 世界", "カタカナ、"], ["hello", ""]),
    "json": (
        ['{"a": [1, -2.5e+3, "\\u00e9é\\n"], "b": {}}', "{}"],
        ["[1]", '{"a" 1}', '{"a": 01}', '{"a": "\\x"}'],
    ),
    "json_arr": (["[\n1,\n{}]", "[\n]"], ["{}", "[1]"]),
    "list": (["- a\n- b: ö\n"], ["- a", "- a\x85b\n", "- \u2028\n", "-a\n"]),
}


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_llama_cpps_examples(name: str) -> None:
    texts = Texts(lark_or_gbnf((EXAMPLES / f"{name}.gbnf").read_text(encoding="utf-8"), "grammar"))
    allowed, others = TEXTS[name]
    assert [text for text in allowed if text not in texts] == []
    assert [text for text in others if text in texts] == []


@pytest.mark.parametrize(
    ("gbnf", "allowed", "others"),
    [
        (r'root ::= "\u00e9\U0001F389\x41\"\\/\t" "\x7f"', ['é🎉A"\\/\t\x7f'], ["é"]),
        (r"root ::= [\]\[\\/&&~~a\x2dc^-]+", ["][\\/&~a-c^"], ["b"]),
        ("root ::= [^^]", ["a", "\n", "é"], ["^", "ab"]),
        ("root ::= . [^]", ["a\n", "\n🎉"], ["a", "abc"]),
        ('root ::= "a"{2} "b"{1,} "c"{0,2} "d"?', ["aab", "aabbccd"], ["ab", "aabccc"]),
        (
            'a-B ::= "x"\na_b ::= "y"\nroot ::= a-B a_b aB # end\naB ::=\n  | "z"',
            ["xy", "xyz"],
            ["x", "z"],
        ),
        # Characters that could belong to two parts, in rules that are recursive and that are not.
        ("root ::= word word\nword ::= [a-z]+", ["ab", "abc"], ["a"]),
        ('root ::= "(" root ")" | word word\nword ::= [a-z]+', ["ab", "((abc))"], ["(a)"]),
        (
            'root ::= root "+" num ws "\\n" | num\nnum ::= [0-9]+ ws\nws ::= [ \\n]*',
            ["1+2 \n", "1 +2\n\n+3\n"],
            ["1+2"],
        ),
        ('root ::= "<" root ">" | [a-z]* "a" "b"?', ["<a>", "<xab>", "aaa"], ["<b>", "x"]),
        ('root ::= "<" root ">" | ("a" | "ab") "b"', ["<ab>", "abb"], ["<a>"]),
        ('root ::= "(" root ")" | 1a\n1a ::= ("b"\n | "c")', ["((c))", "b"], ["()", "(b"]),
    ],
)  # fmt: skip
def test_characters_and_names(gbnf: str, allowed: list[str], others: list[str]) -> None:
    texts = Texts(lark_or_gbnf(gbnf, "grammar"))
    assert [text for text in allowed if text not in texts] == []
    assert [text for text in others if text in texts] == []


@pytest.mark.parametrize(
    ("gbnf", "words"),
    [
        ("root ::= <[1000]>", "is no valid GBNF: Expected name"),
        ('root ::= "a', "is no valid GBNF: Unexpected end of input"),
        ("root ::= [a", "is no valid GBNF: Unexpected end of input"),
        ("root ::= []", "is no valid GBNF: No character is in this class"),
        ("root ::= [z-a]", "is no valid GBNF: A range ends before it begins"),
        (r'root ::= "\q"', "is no valid GBNF: Invalid escape sequence"),
        (r'root ::= "\ud800"', "is no valid GBNF: This is no character"),
        ('root ::= "a"{', "is no valid GBNF: Expected integer"),
        ('root ::= "a"{²}', "is no valid GBNF: Expected integer"),
        ('root ::= "a"{1,' + "1" * 5000 + "}", "is no valid GBNF: A number has more than 9 digits"),
        ("root ::= other", "has no rule called other"),
        ('other ::= "a"', "has no rule called root"),
        ("root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "is nested too deeply"),
        ("root ::= " + '"a"' * MAX_CHARS, "has .* characters; at most"),
    ],
)
def test_what_is_no_gbnf_is_refused(gbnf: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^guided_grammar {words}") as caught:
        lark_or_gbnf(gbnf, "guided_grammar")
    assert caught.value.param == "guided_grammar"


def test_lark_stays_lark() -> None:
    assert not is_gbnf('start: "root" "::=" | /a::=/')
    assert "a" in Texts(lark_or_gbnf('start: "a"', "grammar"))


def test_many_rules_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [f"a{index} ::= [{chr(300 + index)}] a{index + 1}\n" for index in range(100)]
    text = f'root ::= "(" root ")" | a0\n{"".join(rules)}a{len(rules)} ::= "x"'
    monkeypatch.setattr(gbnf_terminals, "MAX_STEPS", 20 * len(rules))
    assert gbnf_to_lark(text).count("\nT") == len(rules) + 1
    monkeypatch.setattr(gbnf_terminals, "MAX_STEPS", len(rules))
    with pytest.raises(ValueError, match="has too many rules"):
        gbnf_to_lark(text)


def test_characters_in_nested_parts_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    num_calls = 0
    bits = _Alphabet.bits

    def counting(self: _Alphabet, spans: Sequence[tuple[int, int]]) -> int:
        nonlocal num_calls
        num_calls += 1
        return bits(self, spans)

    monkeypatch.setattr(_Alphabet, "bits", counting)
    for start in ("root ::= ", 'root ::= "x" root | '):
        for inside in ('"' + "a" * 3000 + '"', '"b" ' * 1000, "[a-b] " * 1000):
            text = start + "(" * 100 + inside + ' "a")' * 100
            num_calls = 0
            monkeypatch.setattr(gbnf_terminals, "MAX_STEPS", 2 * len(text))
            gbnf_to_lark(text)
            assert num_calls <= len(text)


def test_long_literals_count_as_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gbnf_terminals, "MAX_STEPS", 1000)
    gbnf_to_lark('root ::= "' + "a" * 900 + '"')
    with pytest.raises(ValueError, match="has too many rules"):
        gbnf_to_lark('root ::= "' + "a" * 1001 + '"')


@pytest.mark.parametrize("name", ["json", "c", "list"])
def test_long_texts_are_terminals(name: str) -> None:
    """A mask of rules over single characters would be too large for the parser."""
    lark = gbnf_to_lark((EXAMPLES / f"{name}.gbnf").read_text(encoding="utf-8"))
    rules = re.findall(r"^(?:start|r\d+): .*", lark, re.MULTILINE)
    assert rules
    assert [rule for rule in rules if "[^" in rule or r"\u{10FFFF}" in rule] == []
