"""A program that ends without having shut its LLM down."""

import subprocess
import sys
from pathlib import Path

from tests.support.grammars import write_checkpoint_with_tokenizer

ROOT = Path(__file__).parents[3]
_EXIT = """
import threading
from pathlib import Path

from tests.support.grammars import schema_grammar, text_automaton
from workers.constraint.codec import Constraint
from workers.constraint.grammar import GrammarTokenizer
from workers.engine.llm import LLM

entered = threading.Event()
compile_ = GrammarTokenizer.compile

def compiling(self, grammar):
    entered.set()
    return compile_(self, grammar)

GrammarTokenizer.compile = compiling
llm = LLM({path!r}, dtype="float32", max_model_len=64, kv_cache_bytes=4 << 20, threads=1)
grammar = schema_grammar({{"enum": [f"{{index * 7919}}" for index in range(60_000)]}})
llm.engine.prepare(Constraint.of(text_automaton(Path({path!r}), grammar)))
assert entered.wait(60)
print("ends")
"""


def test_a_program_may_end_while_a_grammar_compiles(tmp_path: Path) -> None:
    """Its thread is in native code for half a second, at whose end there must be an interpreter."""
    path = str(write_checkpoint_with_tokenizer(tmp_path))
    ran = subprocess.run(
        [sys.executable, "-c", _EXIT.format(path=path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "ends\n"), ran.stderr
