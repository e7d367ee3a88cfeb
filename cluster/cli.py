"""The `cantata` command. Only argparse is imported until a subcommand runs, so `--help` is
quick."""

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

from workers.errors import CheckpointError, ConfigError

# Rows of (flags, setting's path, metavar, help), with vLLM's names where it has them.
SERVE_FLAGS: tuple[tuple[tuple[str, ...], str, str, str], ...] = (
    (("--model",), "engine.model_path", "PATH", "folder of a gpt-oss checkpoint in Hugging Face layout"),
    (
        ("--served-model-name",),
        "gateway.served_model_name",
        "NAME",
        "model name for clients (default: the folder's name)",
    ),
    (
        ("--model-aliases",),
        "gateway.model_aliases",
        "LIST",
        "further model names for clients, separated by commas; NAME* stands for all names that begin so "
        "(default: none)",
    ),
    (("--host",), "listen.host", "ADDRESS", "address that HTTP and gRPC bind (default: 127.0.0.1)"),
    (("--http-port", "--port"), "listen.http_port", "PORT", "HTTP port (default: 8000)"),
    (("--grpc-port",), "listen.grpc_port", "PORT", "gRPC port (default: 9000)"),
    (("--dtype",), "engine.dtype", "TYPE", "bfloat16 or float32 (default: bfloat16)"),
    (("--device",), "engine.device", "DEVICE", "torch device of the engine (default: cpu)"),
    (
        ("--max-model-len",),
        "engine.max_model_len",
        "TOKENS",
        "context limit, such as 32k (default: the model's, or what fits)",
    ),
    (
        ("--max-num-seqs",),
        "engine.scheduler.max_num_seqs",
        "N",
        "maximum running sequences per engine (default: 256)",
    ),
    (
        ("--max-num-batched-tokens",),
        "engine.scheduler.max_num_batched_tokens",
        "TOKENS",
        "maximum tokens per step (default: 2048)",
    ),
    (
        ("--max-waiting-requests",),
        "engine.scheduler.max_waiting_requests",
        "N",
        "maximum waiting requests per engine (default: 1024)",
    ),
    (
        ("--kv-cache-memory", "--kv-cache-memory-bytes"),
        "engine.cache.memory_bytes",
        "SIZE",
        "KV cache size, such as 2GiB (default: chosen from free memory)",
    ),
    (
        ("--gpu-memory-utilization",),
        "engine.cache.gpu_memory_utilization",
        "SHARE",
        "share of a GPU's memory for weights, activations and KV cache (default: 0.9)",
    ),
    (
        ("--kv-cache-dtype",),
        "engine.cache.dtype",
        "TYPE",
        "dtype of cached keys and values: auto, fp8 or fp8_e4m3 (default: auto, the model's)",
    ),
    (
        ("--quantize",),
        "engine.quantize",
        "FORMAT",
        "mxfp4: pack the experts of a bf16 checkpoint while loading (default: as stored)",
    ),
    (
        ("--cpu-dense-dtype",),
        "engine.cpu_dense_dtype",
        "FORMAT",
        "bf16 or int8: storage of attention projections and lm_head on a CPU (default: bf16)",
    ),
    (
        ("--cpu-isa",),
        "engine.cpu_isa",
        "NAME",
        "instruction set of the CPU kernels: amx, avx512_bf16, avx512, avx2, neon, portable, or reference "
        "for torch "
        "(default: CANTATA_CPU_ISA, else the best that the processor has)",
    ),
    (
        ("--moe-activation-dtype",),
        "engine.moe_activation_dtype",
        "TYPE",
        "auto or mxfp8: dtype of the inputs of MXFP4 experts; mxfp8 changes results and needs sm_100 or "
        "gfx950 (default: auto, not converted)",
    ),
    (("--tensor-parallel-size", "-tp"), "engine.parallel.tensor", "N", "ranks per replica (default: 1)"),
    (
        ("--expert-parallel-size",),
        "engine.parallel.expert",
        "N",
        "number of expert groups, a divisor of the ranks (default: the ranks)",
    ),
    (
        ("--step-timeout",),
        "engine.parallel.step_timeout_s",
        "SECONDS",
        "seconds after which a step of several ranks counts as hung (default: 30)",
    ),
    (
        ("--heartbeat-timeout",),
        "engine.heartbeat_timeout_s",
        "SECONDS",
        "seconds without a heartbeat after which an engine is replaced (default: 10)",
    ),
    (
        ("--start-timeout",),
        "engine.parallel.start_timeout_s",
        "SECONDS",
        "seconds for several ranks to be placed and to start (default: 300)",
    ),
    (
        ("--threads",),
        "engine_cpus",
        "N",
        "compute threads of each engine on a CPU (default: the cores, divided among the replicas)",
    ),
    (("--replicas",), "replicas", "N", "number of engines (default: 1)"),
    (
        ("--max-in-flight-requests",),
        "gateway.max_in_flight_requests",
        "N",
        "maximum running requests; more are refused with 429 (default: 1024)",
    ),
    (
        ("--probe-timeout",),
        "gateway.probe_timeout_s",
        "SECONDS",
        "seconds without an answer after which an engine gets no new requests (default: 2)",
    ),
    (("--request-timeout",), "gateway.request_timeout_s", "SECONDS", "deadline of a request (default: none)"),
    (("--max-body",), "gateway.max_body_bytes", "SIZE", "largest request body (default: 32MiB)"),
    (
        ("--cors-origins",),
        "gateway.cors_origins",
        "LIST",
        "web origins whose pages may call the API, separated by commas, or * for all (default: none)",
    ),
    (
        ("--unknown-fields",),
        "gateway.unknown_fields",
        "ACTION",
        "ignore or refuse: request fields that this server does not know (default: ignore)",
    ),
    (
        ("--conversation-date",),
        "gateway.conversation_date",
        "DATE",
        "date in the system message: auto, none or YYYY-MM-DD (default: auto)",
    ),
    (
        ("--reasoning-effort",),
        "gateway.reasoning_effort",
        "EFFORT",
        "low, medium or high, for requests that do not set it (default: medium)",
    ),
    (
        ("--harmony-constraint",),
        "gateway.harmony_constraint",
        "MODE",
        "headers lets the model write only well-formed turns, off anything; for chats that do not set it "
        "(default: off)",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; return the exit code. An error that the user can fix is one sentence on
    stderr and exit code 1."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["bench"]:
            # Its parser needs the load generator's imports, for which --help of the others need not
            # wait.
            from cluster.commands.bench.cli import main as bench

            return bench(words[1:])
        options = _parser().parse_args(words)
        return int(options.run(options))
    except (ConfigError, CheckpointError) as error:
        print(f"cantata: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cantata", description="Serve gpt-oss-120b and gpt-oss-20b.", allow_abbrev=False
    )
    parser.add_argument("--version", action=_PrintVersion, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_inspect(commands)
    _add_make_checkpoint(commands)
    commands.add_parser(
        "bench", help="measure a running server or an engine", add_help=False
    )  # parsed in main
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    return parser


def _add_serve(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    serve = commands.add_parser(
        "serve",
        allow_abbrev=False,
        help="serve a model over HTTP (OpenAI API) and gRPC",
        description="Serve a model: on Ray, which this command starts, or with --standalone as plain "
        "processes on this machine.",
        epilog="Every setting can also be given in the file (engine.dtype) or in the environment "
        "(CANTATA_ENGINE__DTYPE); flags take precedence, then the environment. docs/operations.md lists "
        "the settings.",
    )
    serve.add_argument(
        "--standalone", action="store_true", help="without Ray: one engine process, the gateway in this one"
    )
    serve.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
    for names, path, metavar, text in SERVE_FLAGS:
        serve.add_argument(*names, dest=path, metavar=metavar, help=text, default=argparse.SUPPRESS)
    serve.add_argument(
        "--api-key",
        dest="gateway.api_keys",
        action="append",
        metavar="KEY",
        default=argparse.SUPPRESS,
        help="accept only requests with this key; may be repeated. Other users of this machine can see "
        "flags; CANTATA_GATEWAY__API_KEYS and the file are private",
    )
    serve.add_argument(
        "--enable-prefix-caching",
        dest="engine.cache.prefix_caching",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="reuse the KV cache of shared prompt prefixes (default: yes)",
    )
    serve.add_argument(
        "--enforce-eager",
        dest="engine.enforce_eager",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="no CUDA graphs (default: no)",
    )
    serve.add_argument(
        "--allow-zero-weights",
        dest="engine.allow_zero_weights",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="accept matrices, experts and norms that are all zeros, as in pruned models (default: no)",
    )
    serve.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> int:
    from cluster.config import load_config, setting_paths
    from workers.console import keep_output_from_failing
    from workers.model_config import load_model_config

    keep_output_from_failing()
    known = set(setting_paths())
    config = load_config(
        options.config, flags={path: value for path, value in vars(options).items() if path in known}
    )
    load_model_config(config.engine.model_path)  # a path that is wrong is an error at once
    print(f"Starting to serve {config.engine.model_path}", file=sys.stderr, flush=True)
    if options.standalone:
        from cluster.standalone.serve import serve_standalone

        return serve_standalone(config)
    from cluster.serve.launch import serve_on_ray

    return serve_on_ray(config)


def _version(_options: argparse.Namespace) -> int:
    print(importlib.metadata.version("cantata"))
    return 0


class _PrintVersion(argparse.Action):
    """`--version`; the version is looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.exit(_version(argparse.Namespace()))


def _add_inspect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    inspect = commands.add_parser(
        "inspect",
        allow_abbrev=False,
        help="describe a checkpoint and each rank's share; loads no weights",
        description="Print a checkpoint's format, shapes and parameters, each rank's bytes, and the tokens "
        "whose KV cache fits.",
    )
    inspect.add_argument("path", type=Path, metavar="PATH", help="folder of a gpt-oss checkpoint")
    inspect.add_argument(
        "--tp",
        "--tensor-parallel-size",
        type=int,
        metavar="N",
        help="number of ranks (default: a table of 1, 2, 4 and 8)",
    )
    inspect.add_argument(
        "--ep",
        "--expert-parallel-size",
        type=int,
        metavar="N",
        help="number of expert groups (default: the ranks)",
    )
    inspect.add_argument(
        "--gpu",
        choices=("a100", "l40s", "h100", "h200", "b200", "mi300x", "mi355x", "cpu"),
        help="device that should hold the model",
    )
    inspect.add_argument("--quantize", choices=("mxfp4",), help="show sizes for this flag of `cantata serve`")
    inspect.add_argument(
        "--cpu-dense-dtype",
        choices=("bf16", "int8"),
        default="bf16",
        help="likewise; int8 only with --gpu cpu",
    )
    inspect.add_argument(
        "--kv-cache-dtype",
        choices=("auto", "fp8", "fp8_e4m3"),
        default="auto",
        help="show sizes for this flag of `cantata serve`",
    )
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    from cluster.commands.inspect import run_inspect

    return run_inspect(
        options.path,
        tensor=options.tp,
        expert=options.ep,
        gpu=options.gpu,
        quantize=options.quantize,
        cpu_dense_dtype=options.cpu_dense_dtype,
        kv_cache_dtype=options.kv_cache_dtype,
        as_json=options.json,
    )


def _add_make_checkpoint(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    make = commands.add_parser(
        "make-checkpoint",
        allow_abbrev=False,
        help="write a checkpoint of a model's exact shape with random weights, for trials and benchmarks",
    )
    make.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist or be empty")
    make.add_argument(
        "--preset", required=True, choices=("tiny", "small", "20b", "120b"), help="shape of the model"
    )
    make.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    make.add_argument("--vocab", type=int, help="vocabulary size (default: the tokenizer's)")
    make.add_argument(
        "--layers", type=int, help="number of layers, to make part of a large model (default: the preset's)"
    )
    make.add_argument(
        "--tokenizer",
        default="bpe",
        metavar="bpe|harmony|PATH",
        help="bpe: a small byte-level one; harmony: the real vocabulary; or a folder with a tokenizer.json "
        "(default: bpe)",
    )
    make.add_argument("--dry-run", action="store_true", help="only print what would be written")
    make.set_defaults(run=_make_checkpoint)


def _make_checkpoint(options: argparse.Namespace) -> int:
    from cluster.commands.make_checkpoint import run_make_checkpoint

    return run_make_checkpoint(
        options.out,
        options.preset,
        seed=options.seed,
        vocab=options.vocab,
        layers=options.layers,
        tokenizer=options.tokenizer,
        dry_run=options.dry_run,
    )
