"""What a GenerationService is built with: the model, the deployment's defaults and its limits."""

from dataclasses import dataclass

from cluster.harmony.render import ReasoningEffort
from workers.errors import ModelNotFound
from workers.rpc.convert import EngineInfo


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The one model that is served.

    Attributes:
        id: the name clients use.
        max_model_len: prompt and output tokens at most.
        fingerprint: of the checkpoint; `system_fingerprint` in answers.
        created_unix_s: `created` in the list of models.
    """

    id: str
    max_model_len: int
    vocab_size: int
    fingerprint: str = ""
    created_unix_s: int = 0

    @classmethod
    def from_engine(cls, info: EngineInfo, id: str | None = None, created_unix_s: int = 0) -> "ModelInfo":
        """What an engine says it serves, under the name `id`, or the checkpoint's own."""
        return cls(
            id or info.model_name, info.max_model_len, info.vocab_size, info.model_fingerprint, created_unix_s
        )


class ServedModel:
    """What is served now; its context is the shortest among the replicas, which come and go.

    Attributes:
        info: may be replaced while requests run.
    """

    def __init__(self, info: ModelInfo) -> None:
        self.info = info

    def check(self, name: str | None) -> None:
        """Refuse another model's name.

        Raises:
            ModelNotFound: and says which one is served.
        """
        if name is not None and name != self.info.id:
            raise ModelNotFound(f"The model {name[:100]!r} does not exist; this server has {self.info.id!r}.")


@dataclass(frozen=True, slots=True)
class ChatDefaults:
    """What a chat is told that does not say it itself.

    Attributes:
        conversation_date: `auto` for the current day in UTC, `none`, or YYYY-MM-DD.
    """

    conversation_date: str = "none"
    reasoning_effort: ReasoningEffort = "medium"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one gateway takes on.

    Attributes:
        max_in_flight_requests: beyond it a request is refused with Overloaded; each choice of a
            request counts.
        request_timeout_s: from arrival to last token; None: no deadline.
    """

    max_in_flight_requests: int = 1024
    request_timeout_s: float | None = None
