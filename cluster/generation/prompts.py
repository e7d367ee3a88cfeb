"""Conversion of prompts to token ids, and of token ids to text."""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import replace

from cluster.generation.bad_words import Tokens, bad_word_tokens
from cluster.generation.continuation import continued_message
from cluster.generation.limits import (
    check_date,
    check_prompt_chars,
    check_prompt_tokens,
    check_token_ids,
    check_tools,
    longest_prompt,
    truncated,
)
from cluster.generation.logprobs import token_text
from cluster.generation.requests import ChatRequest, CompletionRequest, Truncation
from cluster.generation.settings import ChatDefaults, ServedModel
from cluster.generation.threads import TextThreads
from cluster.generation.turns_left_out import fitting
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.message import Message
from cluster.harmony.render import DEFAULT_MODEL_IDENTITY, Conversation, render
from workers.errors import InvalidRequest

_BYTES_PER_ENTRY = 64
"""Cost of rendering a message or a tool besides its text, in bytes of text that take as long."""


def utc_today() -> datetime.date:
    """Return the current day in UTC."""
    return datetime.datetime.now(datetime.UTC).date()


class Prompts:
    """The maker of prompts from client requests; large ones are made in threads. Belongs to one
    event loop; the owner calls `close`.

    Args:
        today: the current day in UTC, for `conversation_date: auto`.

    Attributes:
        defaults: values of chats that do not set them; may be changed while requests run.
        threads: for work on large requests.
    """

    def __init__(
        self,
        encoding: HarmonyEncoding,
        served: ServedModel,
        defaults: ChatDefaults | None = None,
        today: Callable[[], datetime.date] = utc_today,
    ) -> None:
        self.encoding = encoding
        self.defaults = defaults or ChatDefaults()
        self._served = served
        self._today = today
        self.threads = TextThreads()

    async def chat(self, request: ChatRequest, *, begins_answer: bool = True) -> list[int]:
        """Return the prompt of a chat, up to and including the words after which the model
        continues, or the message that it continues.

        Args:
            begins_answer: False leaves these words out; no matter if there is such a message.
        Raises:
            InvalidRequest: the messages or tools are wrong.
            ContextLengthExceeded: the prompt fills the context.
        """
        ids = await self._rendered(request, begins_answer)
        model, param = self._served.info, request.names.messages
        prompt = list(truncated(ids, request.options.truncation, request.sampling.max_tokens, model))
        check_prompt_tokens(len(prompt), model, param)
        return prompt

    async def count(self, request: ChatRequest) -> int:
        """Return the number of tokens of a chat's prompt, which may be longer than the context.

        Raises:
            InvalidRequest: the messages or tools are wrong.
            ContextLengthExceeded: the prompt is longer than MAX_CUT_CONTEXTS contexts.
        """
        options = replace(request.options, truncation=Truncation(-1))
        return len(await self._rendered(replace(request, options=options), begins_answer=True))

    async def completion(self, request: CompletionRequest, index: int) -> tuple[int, ...]:
        """Return the token ids of one of a request's prompts, which is continued as it is.

        Raises:
            InvalidRequest: the prompt is empty, or has an id that the model does not have.
            ContextLengthExceeded: the prompt fills the context.
        """
        prompt, param = request.prompts[index], request.place(index)
        model, cut = self._served.info, request.options.truncation
        if isinstance(prompt, str):
            ids = tuple(await self.tokenize(prompt, param, limit=longest_prompt(cut, model)))
        else:
            ids = prompt
            check_token_ids(ids, model, param)
        ids = tuple(truncated(ids, cut, request.sampling.max_tokens, model))
        if not ids:
            raise InvalidRequest(f"{param} must have at least one token.", param)
        check_prompt_tokens(len(ids), model, param)
        return ids

    async def tokenize(self, text: str, param: str = "prompt", limit: int | None = None) -> list[int]:
        """Return the token ids of a text in which the names of special tokens mean these tokens.

        Args:
            param: name of the text's field in the client's API.
            limit: see HarmonyEncoding.encode; None: no limit but the context's for its characters.
        Raises:
            ContextLengthExceeded: the text cannot fit into `limit`, whatever its tokens are.
        """
        check_prompt_chars(len(text), self.encoding.max_token_bytes, self._served.info, param, limit)
        return await self.threads.run(len(text), lambda: self.encoding.encode_with_special(text, limit))

    async def bad_words(self, words: Sequence[str], *, writes_headers: bool) -> tuple[Tokens, ...]:
        """Return the tokens of a request's bad words; see `bad_word_tokens`."""
        if not words:
            return ()
        return await self.threads.run(
            2 * sum(map(len, words)),
            lambda: bad_word_tokens(words, self.encoding, writes_headers=writes_headers),
        )

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens by name.

        Raises:
            InvalidRequest: an id that the model does not have.
        """
        check_token_ids(token_ids, self._served.info, "tokens")
        return await self.threads.run(
            len(token_ids), lambda: self.encoding.decode(token_ids, skip_special_tokens=False)
        )

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return the displayed form of each token by itself."""
        return [token_text(self.encoding, token_id) for token_id in token_ids]

    def close(self) -> None:
        """Start no more work."""
        self.threads.close()

    async def _rendered(self, request: ChatRequest, begins_answer: bool) -> list[int]:
        continued_message(request)
        work = request.num_bytes + _BYTES_PER_ENTRY * (len(request.messages) + len(request.tools))
        try:
            return await self.threads.run(work, lambda: self._fitting(request, begins_answer))
        except InvalidRequest as error:
            if error.param == "messages":
                error.param = request.names.messages  # the renderer does not know the client's API
            raise

    def _fitting(self, request: ChatRequest, begins_answer: bool) -> list[int]:
        """Return the prompt; where the request allows it, without as many of its oldest turns as
        make it fit."""
        check_tools(request.tools)
        check_date(request.current_date)
        if not request.leaves_out_turns:
            limit = longest_prompt(request.options.truncation, self._served.info)
            return self._render(request, request.messages, begins_answer, limit)
        limit = self._served.info.max_model_len - (request.sampling.max_tokens or 1)
        return fitting(
            request.messages, lambda messages: self._render(request, messages, begins_answer, limit)
        )

    def _render(
        self, request: ChatRequest, messages: Sequence[Message], begins_answer: bool, limit: int
    ) -> list[int]:
        return render(
            Conversation(
                messages=tuple(messages),
                tools=request.tools,
                response_format=None if request.structure is None else request.structure.shown,
                reasoning_effort=request.reasoning_effort or self.defaults.reasoning_effort,
                current_date=request.current_date or self.date(),
                model_identity=request.model_identity or DEFAULT_MODEL_IDENTITY,
                merges_instructions=request.merges_instructions,
            ),
            self.encoding,
            limit,
            begins_answer=begins_answer,
            continues_last=request.continues_last,
        )

    def date(self) -> str | None:
        """Return the date that the model is told where a request names none."""
        date = self.defaults.conversation_date
        return self._today().isoformat() if date == "auto" else None if date == "none" else date
