"""The settings of a GenerationService: the model, the deployment's defaults and its capacity."""

from dataclasses import dataclass

from cluster.chat_options import HarmonyConstraint, ReasoningEffort, ToolArguments
from workers.errors import ModelNotFound
from workers.rpc.convert import EngineInfo


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The served model.

    Attributes:
        id: the name clients use.
        max_model_len: maximum number of prompt and output tokens together.
        fingerprint: the checkpoint's; `system_fingerprint` in answers.
        created_unix_s: `created` in the list of models.
        root: name of the checkpoint's folder.
        aliases: further names that clients may use. One that ends in `*` stands for all names that
            begin so; the others may be followed by `:` and a suffix, as in hub ids.
    """

    id: str
    max_model_len: int
    vocab_size: int
    fingerprint: str = ""
    created_unix_s: int = 0
    root: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names that are listed: the model's own, then the aliases that are whole names."""
        return tuple(dict.fromkeys((self.id, *(name for name in self.aliases if not name.endswith("*")))))

    def is_called(self, name: str) -> bool:
        """Return whether clients may use this name for the model."""
        if name in self.names or name.rpartition(":")[0] in self.aliases:
            return True
        return any(name.startswith(alias[:-1]) for alias in self.aliases if alias.endswith("*"))

    @classmethod
    def from_engine(
        cls,
        info: EngineInfo,
        id: str | None = None,
        created_unix_s: int = 0,
        aliases: tuple[str, ...] = (),
    ) -> "ModelInfo":
        """Return the model that an engine reports, under the name `id` or the checkpoint's own."""
        return cls(
            id or info.model_name,
            info.max_model_len,
            info.vocab_size,
            info.model_fingerprint,
            created_unix_s,
            info.model_name,
            aliases,
        )


class ServedModel:
    """The model served now; its context is the shortest among the current replicas.

    Attributes:
        info: may be replaced while requests run.
    """

    def __init__(self, info: ModelInfo) -> None:
        self.info = info

    def check(self, name: str | None) -> None:
        """Refuse another model's name.

        Raises:
            ModelNotFound: names the served model.
        """
        if name is not None and not self.info.is_called(name):
            raise ModelNotFound(f"The model {name[:100]!r} does not exist; this server has {self.info.id!r}.")


@dataclass(frozen=True, slots=True)
class ChatDefaults:
    """What the deployment decides for chats that do not set these values, and for all chats.

    Attributes:
        conversation_date: `auto` for the current day in UTC, `none`, or YYYY-MM-DD.
        tool_arguments: of constrained chats.
        wrap_up: end of reasoning that reaches a limit.
        reserves_answer: a share of `max_tokens` stays for the answer, see `turn_limits`.
    """

    conversation_date: str = "none"
    reasoning_effort: ReasoningEffort = "medium"
    harmony_constraint: HarmonyConstraint = "headers"
    tool_arguments: ToolArguments = "schema_types"
    wrap_up: str = ""
    reserves_answer: bool = True


@dataclass(frozen=True, slots=True)
class Capacity:
    """How much work one gateway takes on, and for how long.

    Attributes:
        max_in_flight_requests: maximum number of running choices; a request beyond it is refused
            with Overloaded.
        request_timeout_s: seconds from arrival to last token; None for no deadline.
    """

    max_in_flight_requests: int = 1024
    request_timeout_s: float | None = None
