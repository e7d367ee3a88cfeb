"""What precedes a request: the stored items that it continues or refers to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from cluster.frontend.errors import PreviousResponseNotFound
from cluster.frontend.responses.request import refuse_state
from cluster.frontend.responses.schema import ConversationParam, PriorFields
from cluster.frontend.responses.schema_items import Item, ItemReference
from cluster.frontend.responses.stored import stored_input
from cluster.generation.limits import check_num_messages
from cluster.generation.threads import TextThreads
from cluster.state.conversations import MAX_HISTORY_BYTES, StoredTurns
from cluster.state.errors import NotStored
from cluster.state.responses import FoundItems
from cluster.state.rows import StoredItem
from cluster.state.state import State
from workers.errors import CantataError, InvalidRequest

Fields = TypeVar("Fields", bound=PriorFields)
_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])


@dataclass(frozen=True, slots=True)
class Prior:
    """A request with what precedes it.

    Attributes:
        inputs: its own items, as they are stored.
        num_before: number of items before its own in the body's input.
        num_bytes: size of these, and of the items that it refers to.
        conversation_position: see `StoredTurns`.
    """

    inputs: tuple[StoredItem, ...]
    num_before: int = 0
    num_bytes: int = 0
    previous_response_id: str | None = None
    conversation_id: str | None = None
    conversation_position: int | None = None


NOTHING_BEFORE = Prior(())
"""Nothing precedes the request, and its own items are not to be stored."""


async def with_prior(
    body: Fields, num_bytes: int, owner: str, state: State | None, threads: TextThreads, max_items: int
) -> tuple[Fields, Prior]:
    """Return the body with the items that it continues before its own, and stored items in place of
    references to them.

    Args:
        num_bytes: size of the body.
        threads: join what is large.
        max_items: maximum number of items of all.
    Raises:
        InvalidRequest: it contradicts itself, or continues or refers to what is not there; or there
            is no state.
        ContextLengthExceeded: what it continues or refers to is too large for any context.
        Overloaded: see `TextThreads.run`.
        StateUnavailable: the database does not answer.
    """
    conversation_id = _conversation_id(body)
    if state is None:
        refuse_state(body)
        return body, NOTHING_BEFORE
    if body.previous_response_id is not None and conversation_id is not None:
        raise InvalidRequest(
            "previous_response_id and conversation exclude each other: both name what precedes the input.",
            "previous_response_id",
        )
    if getattr(body, "background", None) and getattr(body, "store", None) is False:
        raise InvalidRequest("background needs store: the response is read from there.", "store")
    turns = await _turns(state, owner, body.previous_response_id, conversation_id)
    num_own = len(body.input) if isinstance(body.input, list) else 1
    check_num_messages(len(turns.items) + num_own, max_items, "input")
    referred = await _referred(body.input, owner, state, turns)
    before_bytes = turns.num_bytes + referred.num_bytes
    whole, inputs = await threads.run(
        num_bytes + before_bytes, lambda: _joined(body, turns, referred, conversation_id)
    )
    return whole, Prior(
        inputs,
        len(turns.items),
        before_bytes,
        body.previous_response_id,
        conversation_id,
        turns.conversation_position,
    )


def _joined(
    body: Fields, turns: StoredTurns, referred: FoundItems, conversation_id: str | None
) -> tuple[Fields, tuple[StoredItem, ...]]:
    """Return the body with all items, and its own ones as they are stored."""
    own: str | Sequence[Item] | None = body.input
    if own is not None and not isinstance(own, str):
        own = _without_references(own, referred.items, turns.items)
    inputs = stored_input(own)
    _check_new(inputs, turns, conversation_id)
    if turns.items or own is not body.input:
        before = _ITEMS.validate_python([item.body for item in turns.items])
        after = _ITEMS.validate_python([item.body for item in inputs]) if isinstance(own, str) else own or ()
        body = body.model_copy(update={"input": [*before, *after]})
    return body, inputs


def repeated(prior: Prior, *, store: bool, background: bool) -> dict[str, Any]:
    """Return the fields of the Response object that say what it continues and where it is kept."""
    conversation = prior.conversation_id
    return {
        "previous_response_id": prior.previous_response_id,
        "conversation": None if conversation is None else {"id": conversation},
        "store": store,
        "background": background,
    }


def _conversation_id(body: PriorFields) -> str | None:
    given = body.conversation
    return given.id if isinstance(given, ConversationParam) else given


async def _turns(
    state: State, owner: str, response_id: str | None, conversation_id: str | None
) -> StoredTurns:
    if response_id is not None:
        try:
            return await state.responses.history(response_id, owner)
        except NotStored as error:
            raise PreviousResponseNotFound(
                f"Previous response with id '{response_id[:100]}' cannot be continued: {error.message}",
                "previous_response_id",
            ) from None
    if conversation_id is not None:
        try:
            return await state.conversations.history(conversation_id, owner)
        except NotStored as error:
            error.param = "conversation"
            raise
    return StoredTurns(())


async def _referred(
    items: str | Sequence[Item] | None, owner: str, state: State, turns: StoredTurns
) -> FoundItems:
    """Return the stored items that are referred to, without those that precede anyway."""
    places: dict[str, int] = {}
    for index, item in enumerate(() if items is None or isinstance(items, str) else items):
        if not isinstance(item, ItemReference):
            continue
        if item.id in places:
            raise InvalidRequest(
                f"input[{index}] refers to the item '{item.id[:100]}', as input[{places[item.id]}] does; "
                f"remove one of them.",
                f"input[{index}]",
            )
        places[item.id] = index
    known = {item.id for item in turns.items} if places else set()
    wanted = [id for id in places if id not in known]
    if not wanted:
        return FoundItems({})
    return await state.responses.items_by_id(owner, wanted, MAX_HISTORY_BYTES - turns.num_bytes)


def _without_references(
    items: Sequence[Item], found: Mapping[str, StoredItem], before: Sequence[StoredItem]
) -> Sequence[Item]:
    """Return the items with stored ones in place of references; leave out references to items that
    precede anyway."""
    if not any(isinstance(item, ItemReference) for item in items):
        return items
    known = {item.id for item in before}
    result: list[Item] = []
    for index, item in enumerate(items):
        if not isinstance(item, ItemReference):
            result.append(item)
        elif item.id not in known:
            result.append(_item(found, item.id, f"input[{index}]"))
    return result


def _item(found: Mapping[str, StoredItem], id: str, place: str) -> Item:
    if id not in found:
        raise InvalidRequest(
            f"{place}: item with id '{id[:100]}' not found; items are kept with responses of which store is "
            f"true.",
            place,
        )
    try:
        return _ITEMS.validate_python([found[id].body])[0]
    except ValidationError:  # it was checked when it was stored
        raise CantataError("A stored item cannot be read.") from None


def _check_new(inputs: Sequence[StoredItem], turns: StoredTurns, conversation_id: str | None) -> None:
    """Refuse items that the conversation has already."""
    if conversation_id is None:
        return
    seen = {item.id for item in turns.items}
    for index, item in enumerate(inputs):
        if item.id in seen:
            raise InvalidRequest(
                f"input[{index}]: the conversation already has an item with the id '{item.id}'; remove it "
                f"from the input.",
                f"input[{index}].id",
            )
        seen.add(item.id)
