"""The tables. Times are Unix seconds; JSON is stored as its bytes."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
)

metadata = MetaData()

responses = Table(
    "responses",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("status", String(16), nullable=False),
    Column("previous_response_id", String(128)),
    Column("conversation_id", String(128)),
    # The conversation's items before this place preceded the response's own.
    Column("conversation_position", Integer),
    # What the answer is a function of, beside its tokens.
    Column("request", LargeBinary, nullable=False),
    # The Response object; None until it is complete.
    Column("body", LargeBinary),
    Column("num_bytes", BigInteger, nullable=False),
    # Background: the copy of the gateway that runs it, and how often it has said that it does. A
    # copy that sees no new number for a while takes the response over.
    Column("lease_holder", String(64)),
    Column("lease_count", BigInteger, nullable=False, default=0),
    Column("num_attempts", Integer, nullable=False, default=0),
    Column("cancel_asked", Boolean, nullable=False, default=False),
    Index("responses_by_age", "created_at", "num_bytes"),
    Index("responses_by_parent", "previous_response_id"),
    Index("responses_by_status", "status"),
)

response_items = Table(
    "response_items",
    metadata,
    Column("response_id", String(128), primary_key=True),
    # 0: given to the model, 1: written by it
    Column("is_output", Boolean, primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("id", String(128), nullable=False),
    Column("body", LargeBinary, nullable=False),
    # Token ids as which the item was generated or rendered, as uint32, little-endian.
    Column("tokens", LargeBinary),
    Index("response_items_by_id", "id"),
)

response_tokens = Table(
    "response_tokens",
    metadata,
    Column("response_id", String(128), primary_key=True),
    # The number of tokens before this batch.
    Column("start", Integer, primary_key=True),
    Column("batch", LargeBinary, nullable=False),
)

conversations = Table(
    "conversations",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("used_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("metadata", LargeBinary, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    # The place of the next item; never goes back.
    Column("next_position", Integer, nullable=False),
    Index("conversations_by_age", "used_at", "num_bytes"),
)

conversation_items = Table(
    "conversation_items",
    metadata,
    Column("conversation_id", String(128), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("id", String(128), nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("tokens", LargeBinary),
    Index("conversation_items_by_id", "conversation_id", "id", unique=True),
)

continuity = Table(
    "continuity",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("call_id", String(128), primary_key=True),
    Column("created_at", Float, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Index("continuity_by_age", "created_at", "num_bytes"),
)

duties = Table(
    "duties",
    metadata,
    # Work that one copy of the gateway does for all, such as the sweep.
    Column("name", String(32), primary_key=True),
    # How often it was done. A copy that finds the number it saw a period ago does it.
    Column("count", BigInteger, nullable=False),
)
