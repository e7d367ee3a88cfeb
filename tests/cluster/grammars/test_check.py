"""A grammar is tried within bounds before an engine sees it: what does not compile is refused with
its place and reason, and hostile ones cost others nothing."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.grammars import check, process
from cluster.grammars.check import GrammarChecker
from tests.support.waiting import until
from workers.errors import InvalidRequest, Overloaded
from workers.grammars.grammar import Grammar, json_object, json_schema, lark, regex

PARAM = "response_format.json_schema.schema"


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    checker = GrammarChecker()
    yield checker
    checker.close()


def of(schema: object) -> Grammar:
    return json_schema(schema, PARAM)


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


def patterns(number: int) -> Grammar:
    """Return a grammar that takes seconds with 20 patterns, and for ever with more."""
    every = [{"type": "string", "pattern": f"a{chr(97 + index % 26)}.*x{index}"} for index in range(number)]
    return of({"allOf": every})


CYCLE = {
    "a": {"items": {"$ref": "#/$defs/b"}},
    "b": {"title": "b", "not": {"const": 1}, "additionalProperties": {"$ref": "#/$defs/a"}},
}


@pytest.mark.parametrize(
    ("schema", "place", "reason"),
    [
        ({"properties": {"a": {"pattern": "(?=a)b"}}}, ".properties.a.pattern", "look-ahead"),
        ({"properties": {"x": {}, "a": {"type": "file"}}}, ".properties.a.type", "Invalid type: file"),
        ({"not": {"const": "secret"}}, ".not", "Unimplemented keys"),
        ({"items": {"anyOf": [{"type": "null"}, {"uniqueItems": 1}]}}, ".items.anyOf[1].uniqueItems", ""),
        ({"properties": {f"p{n}": {"not": n} if n == 7 else {} for n in range(9)}}, ".properties.p7.not", ""),
        ({"properties": {"x": {"$ref": "#/$defs/a"}}, "$defs": CYCLE}, ".$defs.b.not", "Unimplemented keys"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "", "greater than"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, ".properties.a.$ref", "does not exist"),
        ({"$ref": "https://example.com/a.json"}, ".$ref", "does not fetch"),
        ({"$ref": "#"}, ".$ref", "no text is allowed"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "", "nsatisfiable"),
        (False, "", "nsatisfiable"),
        (nested(100), "", "recursion limit"),
        ({"properties": [1]}, ".properties", "must be an object"),
        ({"enum": ["\x00"], "minimum": "\x00"}, "", ""),
    ],
)  # fmt: skip
async def test_the_error_names_the_place_and_the_reason(
    checker: GrammarChecker, schema: object, place: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await checker.check(of(schema), PARAM)
    assert caught.value.param is not None
    if place:
        assert caught.value.param == PARAM + place
    assert caught.value.message.startswith(f"{caught.value.param} cannot be enforced: ")
    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("start: a", "unknown name"),
        ("start: start", "no text is allowed"),
        ("start: a\na: b\nb: a", "no text is allowed"),
        ("start: A\nA: B\nB: A", "circular reference"),
        ('begin: "a"', "no start rule"),
        ("start: " + "(" * 20_000 + '"a"' + ")" * 20_000, "too deeply nested"),
    ],
)
async def test_a_lark_grammar_is_refused_with_its_reason(
    checker: GrammarChecker, text: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"^format cannot be enforced: .*{reason}") as caught:
        await checker.check(lark(text, "format"), "format")
    assert caught.value.param == "format"
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(
    "grammar",
    [
        of({"type": "string", "maxLength": 10**8}),
        of({"type": "array", "minItems": 10**5}),
        of({"type": "integer", "multipleOf": 97, "maximum": 10**12}),
        lark('start: %regex {"substring_chars": "' + "ab" * 500 + '"}', "g"),
        of({"enum": [f"value {number}" for number in range(20_000)]}),
        of({"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}),
        regex("(a|b)*a(a|b){200}", "r"),
        regex("(((a{1,1000}){1,1000}){1,1000}){1,1000}", "r"),
        lark('start: start "a" | "b"', "g"),
        lark('start: a{1000000}\na: b{1000000}\nb: "x" | "y"', "g"),
    ],
)
async def test_what_only_looks_large_is_allowed(checker: GrammarChecker, grammar: Grammar) -> None:
    await checker.check(grammar, "g")


async def test_hostile_grammars_delay_no_others(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that takes too long, beside 32 that do not."""
    monkeypatch.setattr(check, "MAX_CPU_S", 0.4)
    hostile = asyncio.create_task(checker.check(patterns(200), PARAM))
    others = [of({"properties": {f"p{number}": {"type": "string"}}}) for number in range(32)]
    await asyncio.gather(*(checker.check(grammar, PARAM) for grammar in others))
    with pytest.raises(InvalidRequest, match=r"it takes more than .* s to compile") as caught:
        await hostile
    assert caught.value.param == PARAM


async def test_what_takes_longer_is_tried_again_with_more_time(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "QUICK_CPU_S", 0.01)
    await checker.check(of({"enum": [f"text {number}" for number in range(10_000)]}), PARAM)


async def test_a_grammar_that_needs_much_memory_is_refused(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MAX_BYTES", 16 * 2**20)
    with pytest.raises(InvalidRequest, match="MiB to compile"):
        await checker.check(of({"enum": [f"value {number}" for number in range(19_999)]}), PARAM)
    await checker.check(of({"title": "small"}), PARAM)


async def test_verdicts_are_cached_and_one_trial_serves_all(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = []
    tried = process.WorkerProcess.tried

    def counted(self: process.WorkerProcess, job: object) -> object:
        jobs.append(job)
        return tried(self, job)  # type: ignore[arg-type]

    monkeypatch.setattr(process.WorkerProcess, "tried", counted)
    good, bad = of({"title": "good"}), of({"title": "bad", "not": {"const": 1}})
    first, *others = [asyncio.create_task(checker.check(good, PARAM)) for _ in range(8)]
    await asyncio.sleep(0)
    first.cancel()  # a client that leaves takes nothing from the others
    await asyncio.gather(*others)
    for param in ("a", "b"):
        with pytest.raises(InvalidRequest, match=f"^{param}.not cannot"):
            await checker.check(bad, param)
    await checker.check(good, PARAM)
    assert len(jobs) == 2


async def test_the_cache_and_the_queue_are_bounded(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MAX_CACHED_BYTES", 3 * check._VERDICT_BYTES)
    for number in range(6):
        await checker.check(of({"title": f"cached {number}"}), PARAM)
    assert len(checker._verdicts) <= 3
    monkeypatch.setattr(check, "MAX_WAITING", 2)
    results = await asyncio.gather(
        *(checker.check(of({"title": f"queued {number}"}), PARAM) for number in range(4)),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [type(None)] * 2 + [Overloaded] * 2
    monkeypatch.setattr(check, "MAX_WAIT_S", 0.0)
    with pytest.raises(Overloaded):
        await checker.check(of({"title": "too late"}), PARAM)


async def test_a_worker_that_was_killed_is_replaced(checker: GrammarChecker) -> None:
    await checker.check(of({"title": "before"}), PARAM)
    (pid, *_) = checker.worker_pids
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(Overloaded):
        await checker.check(of({"title": "during"}), PARAM)
    await checker.check(of({"title": "during"}), PARAM)
    assert pid not in checker.worker_pids


async def test_close_ends_the_workers_and_what_waits() -> None:
    checker = GrammarChecker()
    await checker.check(json_object(), PARAM)
    pids = checker.worker_pids
    waiting = [asyncio.create_task(checker.check(patterns(200 + number), PARAM)) for number in range(3)]
    await asyncio.sleep(0)
    checker.close()
    assert [type(result) for result in await asyncio.gather(*waiting, return_exceptions=True)] == [
        Overloaded
    ] * 3
    assert all(map(has_ended, pids))
    with pytest.raises(Overloaded):
        await checker.check(of({"title": "late"}), PARAM)


def test_workers_end_with_the_gateway_and_import_little() -> None:
    """A gateway that is killed leaves no worker, not even one that is busy."""
    program = """
        import asyncio, sys
        from cluster.grammars.check import GrammarChecker
        from workers.grammars.grammar import json_object, json_schema

        async def main():
            checker = GrammarChecker()
            await checker.check(json_object(), "p")
            asyncio.create_task(checker.check(json_schema({"allOf": [
                {"type": "string", "pattern": f"a{chr(97 + i % 26)}.*x{i}"} for i in range(200)]}, "p"), "p"))
            assert not {"torch", "ray", "llguidance", "fastapi"} & sys.modules.keys()
            print(*checker.worker_pids, flush=True)
            await asyncio.sleep(600)

        asyncio.run(main())
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    ) as gateway:
        assert gateway.stdout is not None
        (pid,) = map(int, gateway.stdout.readline().split())
        maps = Path(f"/proc/{pid}/maps").read_text()
        gateway.kill()
    assert "llguidance" in maps
    assert "libtorch" not in maps
    until(lambda: has_ended(pid), 60)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
