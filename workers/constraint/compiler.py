"""Makes constraints ready to run: reads their automata and compiles their grammars, in threads of
its own, each once, and keeps the results within a bound in bytes."""

import hashlib
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from workers.config import GrammarConfig
from workers.constraint.codec import Constraint
from workers.constraint.tables import MAX_FORCED, HostTables
from workers.errors import CantataError, ConfigError, ConstraintNotReady, EngineDead, InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from workers.constraint.grammar import GrammarTokenizer

logger = logging.getLogger(__name__)

COMPILE_TIMEOUT_S = 10.0
"""Maximum seconds that a request waits for its constraint. A compilation cannot be interrupted, so
it may go on for others."""
TOO_SLOW = f"the grammar was not ready within {COMPILE_TIMEOUT_S:g} s; retry, or make it simpler"
NUM_THREADS = 2
MAX_QUEUED = 256
"""Maximum number of constraints that wait for a thread; a request beyond it is refused."""
MAX_RENEWAL_S = 0.25
"""Processor time to compile a grammar up to which the masks of all sequences may wait for it."""
_BYTES_PER_GRAMMAR = 1 << 20
_BYTES_PER_CHAR = 64
"""A compiled grammar's memory: at least a megabyte, with the lexer that its texts warm up."""
_BYTES_PER_BODY_BYTE = 4

T = TypeVar("T")
_Key = bytes


@dataclass(slots=True, eq=False)
class CompiledGrammar:
    """A grammar that is ready to run.

    Attributes:
        matcher: at the beginning of a text; never advanced, only copied, so that the copies share a
            warm lexer. Replaced once that is full.
        cpu_s: processor time that it took to compile.
        is_renewed: whether a thread of the compiler is to replace it.
    """

    text: str
    matcher: "LLMatcher"
    cpu_s: float
    is_renewed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class PreparedConstraint:
    """A constraint that is ready to run.

    Attributes:
        tables: its automaton.
        grammars: in the automaton's order.
        forced: by grammar, the tokens with which its texts begin.
    """

    tables: HostTables
    grammars: tuple[CompiledGrammar, ...] = ()
    forced: tuple[tuple[int, ...], ...] = ()


def forced_tokens(matcher: "LLMatcher") -> tuple[int, ...]:
    """Return the tokens that come next whatever the text is, as the tokenizer would write them; at
    most MAX_FORCED. Other tokens that spell the same are allowed too, so these are guesses."""
    return tuple(matcher.compute_ff_tokens()[:MAX_FORCED])


class _Refusal(NamedTuple):
    """What is kept of an InvalidRequest. The error itself would hold the frames of all callers to
    which it was raised, with their requests."""

    message: str
    param: str | None

    def error(self) -> InvalidRequest:
        return InvalidRequest(self.message, self.param)


class _Kept(Generic[T]):
    """Results, results to come, or refusals, by key; the least recently used goes first. Guarded by
    the compiler's lock."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[_Key, tuple[Future[T] | _Refusal, int]] = OrderedDict()
        self.num_bytes = 0

    def get(self, key: _Key) -> "Future[T] | _Refusal | None":
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        return found[0]

    def add(self, key: _Key, future: "Future[T]", num_bytes: int) -> None:
        self._kept[key] = future, 0
        self.charge(key, num_bytes)

    def charge(self, key: _Key, num_bytes: int) -> None:
        """Count further bytes of an entry, and drop others for them."""
        if key not in self._kept:
            return
        future, charged = self._kept[key]
        self._kept[key] = future, charged + num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self._max_bytes and len(self._kept) > 1:
            self.drop(next(iter(self._kept)))

    def refuse(self, key: _Key, error: InvalidRequest) -> None:
        """Keep the refusal instead of the result to come: it would be refused again."""
        if key in self._kept:
            self._kept[key] = _Refusal(error.message, error.param), self._kept[key][1]

    def drop(self, key: _Key) -> None:
        _, num_bytes = self._kept.pop(key, (None, 0))
        self.num_bytes -= num_bytes


def _stopped() -> EngineDead:
    return EngineDead("the engine is shutting down", under_request=False)


class GrammarCompiler:
    """The compiler of one engine. Any thread may call `prepare`.

    Args:
        folder: the checkpoint, with its tokenizer.json.
        vocab_size: the model's.
        observe: called with the seconds of each compilation, and whether it succeeded.
    Attributes:
        tokenizer: loaded with the first grammar, or by `load`.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        config: GrammarConfig,
        observe: Callable[[float, bool], object] = lambda seconds, succeeded: None,
    ) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._observe = observe
        self._lock = threading.Lock()
        self._prepared: _Kept[PreparedConstraint] = _Kept(config.cache_bytes)
        self._compiled: _Kept[CompiledGrammar] = _Kept(config.cache_bytes)
        self._loading = threading.Lock()
        self.tokenizer: GrammarTokenizer | None = None
        self._jobs: queue.Queue[Callable[[], object] | None] = queue.Queue(MAX_QUEUED)
        self._threads: list[threading.Thread] = []
        self._closed = False

    def load(self) -> "GrammarTokenizer":
        """Load the tokenizer, unless it is loaded.

        Raises:
            ConfigError: the checkpoint has none.
        """
        from workers.constraint.grammar import GrammarTokenizer

        with self._loading:
            if self.tokenizer is None:
                started = time.monotonic()
                self.tokenizer = GrammarTokenizer(self._folder, self._vocab_size)
                logger.info("loaded the tokenizer of grammars in %.1f s", time.monotonic() - started)
            return self.tokenizer

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Load the tokenizer in a thread during the block, whose end waits for it. A checkpoint
        without one, or whose tokenizer llguidance cannot read, is served without grammars."""

        def load() -> None:
            try:
                self.load()
            except ConfigError as error:
                logger.warning("%s", error)

        if not (self._folder / "tokenizer.json").is_file():
            yield
            return
        # Not a daemon's: the interpreter's end waits until it is out of llguidance.
        thread = threading.Thread(target=load, name="cantata-grammar-tokenizer")
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def prepare(self, constraint: Constraint) -> "Future[PreparedConstraint]":
        """Return the constraint ready to run; at once if it is known.

        Raises (the future):
            InvalidRequest: llguidance refuses a grammar.
            ConstraintNotReady: too many wait for compilation.
            EngineDead: the engine is shutting down.
        """
        with self._lock:
            found = self._prepared.get(constraint.id)
            if isinstance(found, Future):
                return found
            future: Future[PreparedConstraint] = Future()
            if found is not None:
                future.set_exception(found.error())
                return future
            if self._closed:
                future.set_exception(_stopped())
                return future
            try:
                self._jobs.put_nowait(lambda: self._prepare(constraint, future))
            except queue.Full:
                future.set_exception(
                    ConstraintNotReady(f"{MAX_QUEUED} constraints wait for compilation; retry after 1 s")
                )
                return future
            self._prepared.add(constraint.id, future, _BYTES_PER_BODY_BYTE * len(constraint.body))
            if len(self._threads) < NUM_THREADS:
                # Daemons: llguidance cannot be interrupted, and must not delay the end of the
                # process for longer than `close` waits.
                thread = threading.Thread(target=self._run, name="cantata-grammars", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def renew(self, grammar: CompiledGrammar) -> bool:
        """Replace the matcher of a grammar whose lexer is full: at once if that is quick, else by
        one of the compiler's threads, for later texts. Return whether it is replaced."""

        def compile_again() -> bool:
            if self._closed:
                return False
            try:
                grammar.matcher = self.load().compile(grammar.text)
            except Exception:
                # The edge of the thread: only the texts that need it fail.
                logger.exception("a grammar whose lexer is full could not be compiled again")
                return False
            finally:
                grammar.is_renewed = False
            logger.info("compiled a grammar again, as its lexer was full")
            return True

        if grammar.cpu_s <= MAX_RENEWAL_S:
            return compile_again()
        if not grammar.is_renewed:
            grammar.is_renewed = True
            try:
                self._jobs.put_nowait(compile_again)
            except queue.Full:  # a later text will ask again
                grammar.is_renewed = False
        return False

    def close(self) -> None:
        """Compile nothing further, and wait for what is being compiled, at most COMPILE_TIMEOUT_S:
        a process that ends while a thread is in llguidance crashes. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            threads = list(self._threads)
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job()  # ends at once
        for _ in threads:
            self._jobs.put(None)
        deadline_s = time.monotonic() + COMPILE_TIMEOUT_S
        for thread in threads:
            thread.join(max(deadline_s - time.monotonic(), 0.0))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # it holds its future, which may hold an error with the frames of callers

    def _prepare(self, constraint: Constraint, future: "Future[PreparedConstraint]") -> None:
        if self._closed:
            future.set_exception(_stopped())
            return
        try:
            tables = HostTables(constraint.body)
            grammars = tuple(self._grammar(grammar) for grammar in tables.grammars)
            if grammars:
                tables.set_texts(self.load().texts)
                # They stay with the constraint after they are dropped from the compiled ones.
                with self._lock:
                    self._prepared.charge(constraint.id, _BYTES_PER_GRAMMAR * len(grammars))
            # Of copies: a matcher that computes has its state changed.
            forced = tuple(forced_tokens(grammar.matcher.deep_copy()) for grammar in grammars)
            future.set_result(PreparedConstraint(tables, grammars, forced))
        except InvalidRequest as error:
            with self._lock:
                self._prepared.refuse(constraint.id, error)
            future.set_exception(error)
        except Exception as error:
            # The edge of the thread: what waits must get its end.
            if not isinstance(error, CantataError):
                logger.exception("a constraint could not be prepared")
            with self._lock:
                self._prepared.drop(constraint.id)
            future.set_exception(error)

    def _grammar(self, grammar: str) -> CompiledGrammar:
        tokenizer = self.load()
        key = hashlib.blake2b(grammar.encode(), digest_size=16).digest()
        with self._lock:
            found = self._compiled.get(key)
            if found is None:
                mine: Future[CompiledGrammar] = Future()
                self._compiled.add(key, mine, _BYTES_PER_GRAMMAR + _BYTES_PER_CHAR * len(grammar))
        if isinstance(found, Future):
            return found.result()
        if found is not None:
            raise found.error()
        started, started_cpu = time.perf_counter(), time.thread_time()
        try:
            matcher = tokenizer.compile(grammar)
        except BaseException as error:
            with self._lock:
                if isinstance(error, InvalidRequest):
                    self._compiled.refuse(key, error)
                else:  # as when memory runs out: it may go well later
                    self._compiled.drop(key)
            mine.set_exception(error)
            self._observe(time.perf_counter() - started, False)
            raise
        compiled = CompiledGrammar(grammar, matcher, time.thread_time() - started_cpu)
        mine.set_result(compiled)
        self._observe(time.perf_counter() - started, True)
        return compiled
