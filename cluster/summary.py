"""The start-up summary of `cantata serve`: the model, the addresses and who can reach them, and a
request to paste."""

from collections.abc import Sequence
from dataclasses import dataclass

from workers.rpc.convert import EngineInfo


@dataclass(frozen=True, slots=True)
class Reach:
    """The addresses of a service, and who can use them.

    Attributes:
        http, grpc: host and port.
        has_page: whether the page is at `/`.
        exposure: sentences on what other machines can reach.
    """

    http: tuple[str, int]
    grpc: tuple[str, int]
    needs_key: bool
    has_page: bool = True
    exposure: Sequence[str] = ()


def start_up_summary(
    info: EngineInfo,
    *,
    model_name: str,
    longest_context: int,
    fp8_cache: bool,
    num_replicas: int,
    reach: Reach,
    state: str,
) -> str:
    """Return the summary, several lines of text.

    Args:
        info: of the replica with the shortest context.
        longest_context: the context that it would have with enough memory.
        fp8_cache: whether the KV cache is in fp8.
        state: where responses and conversations are kept.
    """
    http_address = address(*reach.http)
    key = " -H 'Authorization: Bearer KEY'" if reach.needs_key else ""
    rows = [
        ("model", f"{model_name} (checkpoint {info.model_name}, fingerprint {info.model_fingerprint[:12]})"),
        (
            "engine",
            f"{info.device}, {info.dtype}, {_plural(info.num_ranks, 'rank')} per replica, "
            f"{_plural(num_replicas, 'replica')}",
        ),
        ("context", _context(info, longest_context, fp8_cache)),
        ("KV cache", f"{info.kv_capacity_tokens:,} tokens per replica, blocks of {info.block_size}"),
        (
            "HTTP",
            f"http://{http_address}/v1  (docs: http://{http_address}/docs, metrics: "
            f"http://{http_address}/metrics)",
        ),
        ("gRPC", f"{address(*reach.grpc)}  (cantata.inference.v1.Inference, health, reflection)"),
        *([("page", f"http://{http_address}/  (chat, and the cluster live)")] if reach.has_page else []),
        ("state", state),
        *(("note", sentence) for sentence in reach.exposure),
    ]
    lines = [f"  {name:<9} {text}" for name, text in rows]
    request = (
        f"curl http://{http_address}/v1/chat/completions{key} -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{model_name}", "messages": [{{"role": "user", "content": "Hello!"}}], '
        f'"max_tokens": 300}}\''
    )
    return "\n".join(["Cantata serves:", *lines, "", "Try it:", f"  {request}", "", "Press Ctrl-C to stop."])


def _context(info: EngineInfo, longest: int, fp8_cache: bool) -> str:
    if info.max_model_len == longest:
        return f"{longest:,} tokens"
    fp8 = "" if fp8_cache else ", --kv-cache-dtype fp8 where the device has it"
    return (
        f"{info.max_model_len:,} tokens of the model's {longest:,}, limited by the KV cache; to raise it: "
        f"--kv-cache-memory{fp8}, or a machine with more memory"
    )


def address(host: str, port: int) -> str:
    """Return host:port as URLs spell it; an address that stands for all interfaces is shown as
    loopback, which reaches it."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"[{shown}]:{port}" if ":" in shown else f"{shown}:{port}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
