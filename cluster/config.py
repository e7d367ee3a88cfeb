"""The operator's configuration: a YAML file, the environment and flags, read once and passed on as
frozen objects.

Precedence: flag, then environment, then file, then default. A setting is named by its path, as in
`engine.scheduler.max_num_seqs`:

- in the file: nested keys (`engine: {scheduler: {max_num_seqs: 64}}`);
- in the environment: `CANTATA_` and the path in capitals, parts joined by two underscores
  (`CANTATA_ENGINE__SCHEDULER__MAX_NUM_SEQS`). A name that is only the end of a setting's
  (`CANTATA_DTYPE`) is refused. Other names without two underscores are ignored: Kubernetes sets
  such names for a Service named cantata (`CANTATA_PORT`);
- as a flag: see `cluster/cli.py`.

Sizes (names that end in `_bytes`) are numbers or texts such as `2GiB`, `512MB`. Unknown names are
refused.
"""

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from cluster import setting_values as values
from cluster.chat_options import HarmonyConstraint, ReasoningEffort, ToolArguments
from cluster.numbers_as_text import texts_to_numbers
from cluster.settings_tree import leaves, merge, read_file, set_value
from cluster.state.settings import StateConfig
from workers.config import EngineConfig
from workers.errors import ConfigError

ENVIRONMENT_PREFIX = "CANTATA_"
_CPU_ISA_VARIABLE = "CANTATA_CPU_ISA"
"""The kernels' own variable (`kernels/cpu/native.py`), which is no setting."""
_KUBERNETES_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
"""Pattern of the value that Kubernetes gives `CANTATA_HTTP_PORT` for a Service named
cantata-http."""

MIN_SECRET_CHARS = 16
WRAP_UP = "\n\nThat is enough thinking. I will now act on what I have."


class _Settings(BaseModel):
    # validate_default stays off: the defaults are our own.
    model_config = ConfigDict(extra="forbid", frozen=True)


class ListenConfig(_Settings):
    """The addresses on which the gateway listens.

    Attributes:
        host: address of both servers; loopback by default.
        http_port, grpc_port: 0 selects a free port.
    """

    host: str = "127.0.0.1"
    http_port: int = Field(default=8000, ge=0, le=65535)
    grpc_port: int = Field(default=9000, ge=0, le=65535)


class GatewayConfig(_Settings):
    """Settings of a gateway: the model name, its limits and its time limits.

    Attributes:
        served_model_name: model name for clients; None for the name of the checkpoint's folder.
        model_aliases: further names that clients may use for the model. One that ends in `*` stands
            for all names that begin so; the others also for themselves with `:` and a suffix.
        api_keys: if not empty, a request needs one of them (`Authorization: Bearer …`).
        secret: text of 16 characters or more that all gateways of a deployment share, and that is
            unchanged when they restart: what clients keep for the server, such as encrypted
            reasoning, opens with it alone. None: a random one, which on a single host is kept
            beside the SQLite database of the state; else it lives as long as the process, or as
            Ray's head, whose gateways share it.
        cors_origins: web origins whose pages may call the API from a browser; `*` for all.
        page: serve the chat page at `/`.
        max_in_flight_requests: maximum number of running requests; more are refused with 429.
        request_timeout_s: a request's deadline, from its arrival to its last token; None for no
            deadline.
        probe_timeout_s: seconds after which a replica that has requests and does not answer gets no
            new ones while there are others.
        max_body_bytes: maximum size of a request body; a larger one is refused with 413.
        max_messages: maximum number of messages in a chat, including their parts and calls; more
            are refused with 400, as a prompt that is too long.
        max_json_values: maximum number of objects, arrays and their entries in a body, counted by
            its braces, brackets and commas, including those in strings; more are refused with 400,
            as a prompt that is too long. While a body is parsed, all other requests of the gateway
            wait: 0.7 s per million. Also the maximum number of fields in a gRPC request, at all
            depths: 2 s per million.
        unknown_fields: treatment of fields in an HTTP body that this server does not know: `ignore`
            them, with those of the top level named in the header `x-cantata-ignored-fields`, or
            `refuse` the request.
        body_timeout_s: seconds for a request's body to arrive, plus one for each 16 KiB of it; then
            408.
        max_header_bytes: maximum size of a request's line and headers; more is refused with 431.
            Standalone.
        header_timeout_s: seconds for a request's headers to arrive; then 408. Standalone.
        keep_alive_timeout_s: seconds for which an idle connection is kept. It must be longer than
            clients and load balancers keep theirs; otherwise they send requests into connections
            that are being closed. Standalone and `cantata serve`; in a Serve YAML it is
            `http_options.keep_alive_timeout_s`.
        send_timeout_s: seconds after which a client that reads nothing of its answer is
            disconnected and its request cancelled.
        stream_headers_s: seconds that a stream waits for its first token before it sends its HTTP
            headers (gRPC: its initial metadata). A request that is refused later gets an error
            event instead of a status.
        stream_keep_alive_s: seconds of silence after which a stream over HTTP sends a comment, so
            that clients and proxies keep the connection.
        conversation_date: the date in the system message: `auto` for today in UTC, `none` for no
            date, or a fixed YYYY-MM-DD.
        reasoning_effort: effort for requests that do not set it.
        harmony_constraint: for chats that do not set it: `headers` lets the model write only
            well-formed headers, recipients that are declared tools, and the end that belongs to
            each message; `off` lets it write anything.
        tool_arguments: in constrained chats, arguments of functions that are neither strict nor
            forced: `schema_types` for JSON with the types of the function's schema, `json` for any
            JSON object, `free` for any text.
        reasoning_wrap_up: text that ends reasoning which reaches a limit, in constrained chats.
        reserve_answer: in constrained chats a share of `max_tokens` stays for the answer: a
            quarter, 32 to 4096 tokens; below 128 half of it.
    """

    served_model_name: str | None = Field(default=None, min_length=1)
    model_aliases: Annotated[
        tuple[str, ...], BeforeValidator(values.split), AfterValidator(values.check_aliases)
    ] = ()
    api_keys: Annotated[tuple[str, ...], BeforeValidator(values.split), AfterValidator(values.check_keys)] = (
        Field(default=(), repr=False)
    )
    secret: str | None = Field(default=None, min_length=MIN_SECRET_CHARS, max_length=1024, repr=False)
    cors_origins: Annotated[
        tuple[str, ...], BeforeValidator(values.split), AfterValidator(values.check_origins)
    ] = ()
    page: bool = True
    max_in_flight_requests: int = Field(default=1024, ge=1)
    request_timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    probe_timeout_s: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    max_body_bytes: int = Field(default=32 * 2**20, ge=1024)
    max_messages: int = Field(default=10_000, ge=1)
    max_json_values: int = Field(default=500_000, ge=1)
    unknown_fields: Literal["ignore", "refuse"] = "ignore"
    body_timeout_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    max_header_bytes: int = Field(default=64 * 2**10, ge=1024)
    header_timeout_s: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    keep_alive_timeout_s: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    send_timeout_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    stream_headers_s: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    stream_keep_alive_s: float = Field(default=15.0, gt=0, allow_inf_nan=False)
    conversation_date: Annotated[str, BeforeValidator(values.conversation_date)] = "auto"
    reasoning_effort: ReasoningEffort = "medium"
    harmony_constraint: Annotated[HarmonyConstraint, BeforeValidator(values.off)] = "headers"
    tool_arguments: ToolArguments = "schema_types"
    reasoning_wrap_up: str = Field(default=WRAP_UP, max_length=1000)
    reserve_answer: bool = True


_NUM_REPLICAS_OF = {"replicas": "engine", "gateways": "gateway"}
"""The settings of `cantata serve` that a Serve YAML has as `num_replicas`, with the deployment of
each."""


class AppConfig(_Settings):
    """One served model: the engine of each replica and the gateways in front of them. These are the
    arguments of a Serve application.

    Attributes:
        engine_host: address that an engine's gRPC server binds under Ray Serve; `auto` is the
            node's own address, reachable from the other nodes.
        engine_cpus: CPUs of an engine: its compute threads on the device `cpu`, and what Ray
            reserves for it; a whole number, or a fraction where engines share CPUs. None: all CPUs,
            divided among the replicas, standalone and with `cantata serve`; 1 in a Serve YAML.
        engine_drain_timeout_s: seconds for running requests to end in an engine that Serve stops;
            the rest continue in another replica.
        gateway_drain_timeout_s: seconds for running requests to end in a gateway that stops; the
            rest are cut off. Standalone the default is 30.
    """

    engine: EngineConfig
    gateway: GatewayConfig = GatewayConfig()
    state: StateConfig = StateConfig()
    engine_host: str = "auto"
    engine_cpus: Annotated[float | None, AfterValidator(values.check_cpus)] = Field(default=None, gt=0)
    engine_drain_timeout_s: float = Field(default=300.0, ge=0, allow_inf_nan=False)
    gateway_drain_timeout_s: float = Field(default=1800.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        for name, deployment in _NUM_REPLICAS_OF.items():
            if isinstance(values, Mapping) and name in values and name not in cls.model_fields:
                raise ValueError(
                    f"{name} is not a setting of a Serve application's args, where a change would replace "
                    f"every engine and gateway; write it beside args as `deployments: "
                    f"[{{name: {deployment}, num_replicas: {values[name]}}}]`, where it can be changed "
                    f"without a restart"
                )
        if isinstance(values, Mapping) and "listen" in values and "listen" not in cls.model_fields:
            raise ValueError(
                "listen is not a setting of a Serve application's args: addresses are Serve's own options; "
                "beside applications write http_options (host, port) and grpc_options (port)"
            )
        return texts_to_numbers(values)

    @property
    def model_name(self) -> str:
        """The model name for clients."""
        return self.gateway.served_model_name or self.engine.model_path.resolve().name

    @model_validator(mode="after")
    def _check_model_path(self) -> Self:
        if str(self.engine.model_path) in ("", "."):
            raise ValueError("engine.model_path is empty; give the folder of a checkpoint")
        return self


class CantataConfig(AppConfig):
    """All settings of `cantata serve`.

    Attributes:
        replicas: number of engines.
        gateways: number of gateways (Ray Serve; standalone has one).
    """

    replicas: int = Field(default=1, ge=1, le=1024)
    gateways: int = Field(default=1, ge=1, le=1024)
    listen: ListenConfig = ListenConfig()


Config = TypeVar("Config", bound=AppConfig)


def load_config(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> CantataConfig:
    """Read the configuration of `cantata serve`.

    Args:
        file: YAML file, or None.
        environment: None for this process's environment.
        flags: value by path (`engine.dtype`); strings are converted.
    Raises:
        ConfigError: one sentence that names the setting and its source.
    """
    origins: dict[str, str] = {}
    values: dict[str, Any] = {}
    if file is not None:
        merge(values, read_file(file))
        origins |= dict.fromkeys(leaves(values), str(file))
    for path, (name, text) in _read_environment(os.environ if environment is None else environment).items():
        set_value(values, path, text, name)
        origins[path] = name
    for path, value in (flags or {}).items():
        set_value(values, path, value, "a flag")
        origins[path] = "the command line"
    if values.get("engine", values) is None:  # `engine:` with nothing under it
        del values["engine"]
    return parse_config(CantataConfig, values, origins)


def parse_config(kind: type[Config], values: Mapping[str, Any], origins: Mapping[str, str]) -> Config:
    """Validate decoded settings; `origins` maps each path to its source.

    Raises:
        ConfigError: as in `load_config`.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(sentence_of(kind, error, origins)) from None


PRIVATE_VARIABLES = {
    f"{ENVIRONMENT_PREFIX}GATEWAY__API_KEYS": ("gateway", "api_keys"),
    f"{ENVIRONMENT_PREFIX}GATEWAY__SECRET": ("gateway", "secret"),
    f"{ENVIRONMENT_PREFIX}STATE__URL": ("state", "url"),
}
"""Variables of the settings that a widely readable file does not hold, with their sections and
names."""


def with_private_settings(config: AppConfig, environment: Mapping[str, str] | None = None) -> AppConfig:
    """Add the private settings of the environment to a Serve application's settings, whose file may
    be widely readable.

    Args:
        environment: None for this process's environment.
    Returns:
        `config`, with the environment's values where it has none of its own.
    Raises:
        ConfigError: a value is invalid.
    """
    for variable, (section, name) in PRIVATE_VARIABLES.items():
        text = (os.environ if environment is None else environment).get(variable)
        settings = getattr(config, section)
        if not text or getattr(settings, name):
            continue
        try:
            changed = type(settings).model_validate(settings.model_dump(exclude={name}) | {name: text})
        except ValidationError as error:
            sentence = sentence_of(AppConfig, error, {})
            raise ConfigError(variable + sentence.removeprefix(name)) from None
        config = config.model_copy(update={section: changed})
    return config


def check_no_settings(environment: Mapping[str, str]) -> None:
    """Refuse settings in the environment of a Serve application's node: they would have no effect,
    since the application has its settings in the YAML.

    Raises:
        ConfigError: a setting other than PRIVATE_VARIABLES is present.
    """
    for _, (name, _text) in _read_environment(environment).items():
        if name not in PRIVATE_VARIABLES:
            raise ConfigError(
                f"{name} is set in the environment that Ray was started with, where it has no effect: "
                f"write it under args in the Serve YAML, and start Ray without it"
            )


def setting_paths(kind: type[AppConfig] = CantataConfig) -> list[str]:
    """Return every setting's path, in order; `docs/operations.md` lists them."""
    return [".".join(path) for path in _paths(kind)]


def _paths(kind: object) -> list[tuple[str, ...]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        members: dict[str, object] = {name: field.annotation for name, field in kind.model_fields.items()}
    elif is_dataclass(kind):
        members = {field.name: field.type for field in fields(kind)}
    else:
        return [()]
    return [(name, *rest) for name, member in members.items() for rest in _paths(member)]


def _read_environment(environment: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return path → (variable, text), sorted by name."""
    found = {}
    known = {path.upper().replace(".", "__"): path for path in setting_paths()}
    for name in sorted(environment):
        rest = name.removeprefix(ENVIRONMENT_PREFIX)
        if rest == name:
            continue
        if "__" not in rest and rest not in known:
            _refuse_ends(name, rest, environment[name], known)
            continue
        if rest not in known:
            raise ConfigError(
                f"{name} in the environment is not a known "
                f"setting{_suggestion(rest, known, ENVIRONMENT_PREFIX)}"
            )
        found[known[rest]] = (name, environment[name])
    return found


def _refuse_ends(name: str, rest: str, value: str, known: Iterable[str]) -> None:
    """Refuse a name that is only the end of known ones, as `CACHE_DTYPE`: it would change nothing.

    Raises:
        ConfigError: with the names that are right.
    """
    if name == _CPU_ISA_VARIABLE or _KUBERNETES_ADDRESS.match(value):
        return
    meant = [one for one in known if rest in _ends(one.split("__"))]
    if meant:
        names = " or ".join(f"{ENVIRONMENT_PREFIX}{one}" for one in meant)
        raise ConfigError(f"{name} in the environment is not a setting; the name is {names}")


def _ends(parts: Sequence[str]) -> set[str]:
    return {"_".join(parts[start:]) for start in range(len(parts))}


def sentence_of(kind: type[AppConfig], error: ValidationError, origins: Mapping[str, str]) -> str:
    """Return the sentence for the user of an error in settings of `kind`."""
    found = error.errors(include_url=False)
    # Report invalid entries before missing ones: a misspelt name explains a missing one.
    first = next((entry for entry in found if entry["type"] != "missing"), found[0])
    path = ".".join(str(part) for part in first["loc"])
    where = f"{origins[path]}: " if path in origins else ""
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = setting_paths(kind)
        groups = {name.rsplit(".", 1)[0] for name in known if "." in name}
        return f"{where}{path} is not a known setting{_suggestion(path, [*known, *sorted(groups)])}"
    if first["type"] == "missing" and kind is CantataConfig and path in ("engine", "engine.model_path"):
        return "no model is given; pass the folder of a checkpoint with --model, or set engine.model_path"
    if first["type"] == "missing":
        return f"{where}{path} is missing"
    if first["type"] in ("dataclass_type", "model_type"):
        return f"{where}{path or 'the configuration'} must be a mapping of settings"
    if first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
        return f"{where}{path}: {reason}" if path else f"{where}{reason}"
    if first["type"] == "string_too_short":
        least = first["ctx"]["min_length"]
        return f"{where}{path} must {'not be empty' if least == 1 else f'have {least} characters or more'}"
    message = first["msg"].removeprefix("Input should be ")
    is_private = path.endswith(("api_keys", "secret", "state.url")) or "api_keys." in path
    shown = "" if is_private else f", found {first['input']!r}"
    return f"{where}{path} must be {message.split(', unable')[0]}{shown}"


def _suggestion(name: str, known: Mapping[str, object] | list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {prefix}{close[0]}?" if close else ""
