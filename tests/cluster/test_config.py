"""Configuration: precedence, conversion and the sentences of its errors."""

import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster.config import (
    AppConfig,
    CantataConfig,
    check_no_settings,
    load_config,
    parse_config,
    setting_paths,
    with_private_settings,
)
from cluster.numbers_as_text import parse_count, parse_size
from workers.errors import ConfigError

MODEL = {"engine.model_path": "somewhere/tiny"}


def refused(
    sentence: str, environment: dict[str, str] | None = None, file: Path | None = None, **flags: object
) -> None:
    given = MODEL | {name.replace("__", "."): value for name, value in flags.items()}
    with pytest.raises(ConfigError, match=re.escape(sentence)) as caught:
        load_config(file, environment or {}, given)
    assert "\n" not in str(caught.value)


def test_defaults_are_loopback_and_the_dataclasses_own() -> None:
    config = load_config(None, {}, MODEL)
    assert (config.listen.host, config.listen.http_port, config.listen.grpc_port) == ("127.0.0.1", 8000, 9000)
    assert config.engine.model_path == Path("somewhere/tiny")
    assert config.engine.scheduler.max_num_seqs == 256
    assert config.engine.cache.memory_bytes is None
    assert config.gateway.api_keys == ()


def test_flag_beats_environment_beats_file(tmp_path: Path) -> None:
    file = tmp_path / "cantata.yaml"
    file.write_text(
        "engine: {model_path: from-file, dtype: float32, scheduler: {max_num_seqs: 1, "
        "max_num_batched_tokens: 7}}\nreplicas: 3\n"
    )
    environment = {
        "CANTATA_ENGINE__SCHEDULER__MAX_NUM_SEQS": "2",
        "CANTATA_ENGINE__MODEL_PATH": "from-environment",
        "CANTATA_REPLICAS": "5",
    }
    config = load_config(file, environment, {"engine.model_path": "from-flag"})
    assert config.engine.model_path == Path("from-flag")
    assert config.engine.scheduler.max_num_seqs == 2
    assert config.engine.scheduler.max_num_batched_tokens == 7
    assert config.engine.dtype == "float32"
    assert config.replicas == 5


def test_every_setting_can_come_from_the_environment() -> None:
    texts = {
        "engine.dtype": "float32",
        "engine.device": "cuda:1",
        "engine.quantize": "mxfp4",
        "engine.cpu_dense_dtype": "bf16",
        "engine.moe_activation_dtype": "auto",
        "engine.cpu_isa": "portable",
        "engine.cache.prefix_caching": "false",
        "engine.cache.memory_bytes": "1.5GiB",
        "engine.cache.dtype": "fp8",
        "engine.grammars.load": "start",
        "engine.heartbeat_timeout_s": "7.5",
        "engine.allow_zero_weights": "true",
        "engine.max_model_len": "32k",
        "engine.scheduler.max_num_batched_tokens": "4K",
        "gateway.api_keys": "one, two",
        "gateway.secret": "0123456789abcdef",
        "gateway.cors_origins": "https://a.example, http://localhost:3000",
        "gateway.served_model_name": "name",
        "gateway.model_aliases": "openai/gpt-oss-20b, claude-*",
        "gateway.unknown_fields": "refuse",
        "gateway.request_timeout_s": "1.5",
        "gateway.max_header_bytes": "32KiB",
        "gateway.conversation_date": "2026-02-03",
        "gateway.reasoning_effort": "high",
        "gateway.harmony_constraint": "off",
        "gateway.tool_arguments": "json",
        "listen.host": "::1",
        "engine_host": "127.0.0.1",
        "state.url": "sqlite:///state",
    }
    environment = {
        f"CANTATA_{path.upper().replace('.', '__')}": texts.get(path, "1") for path in setting_paths()
    }
    config = load_config(None, environment | {"CANTATA_GATEWAY__MAX_BODY_BYTES": "64KiB"})
    assert config.engine.model_path == Path("1")
    assert config.engine.cache.memory_bytes == 1536 * 2**20
    assert not config.engine.cache.prefix_caching
    assert config.engine.kv_dtype == "fp8_e4m3"
    assert config.engine.cpu_isa == "portable"
    assert config.gateway.api_keys == ("one", "two")
    assert config.gateway.cors_origins == ("https://a.example", "http://localhost:3000")
    assert config.gateway.model_aliases == ("openai/gpt-oss-20b", "claude-*")
    assert config.gateway.unknown_fields == "refuse"
    assert config.gateway.request_timeout_s == 1.5
    assert config.gateway.max_body_bytes == 65536
    assert config.gateway.conversation_date == "2026-02-03"
    assert config.engine.max_model_len == 32_000
    assert config.engine.scheduler.max_num_batched_tokens == 4096
    assert config.replicas == config.listen.grpc_port == 1


def test_kubernetes_service_variables_are_left_alone() -> None:
    environment = {
        "CANTATA_PORT": "tcp://10.0.0.1:8000",
        "CANTATA_SERVICE_HOST": "10.0.0.1",
        "CANTATA_ENGINE_PORT_9000_TCP": "x",
        "CANTATA_SERVICE_PORT_HTTP": "8000",
        "CANTATA_HTTP_PORT": "tcp://10.0.0.1:8000",
        "CANTATA_CPU_ISA": "avx2",
        "PATH": "x",
    }
    assert load_config(None, environment, MODEL) == load_config(None, {}, MODEL)


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("API_KEYS", "CANTATA_GATEWAY__API_KEYS"),
        ("GATEWAY_API_KEYS", "CANTATA_GATEWAY__API_KEYS"),
        ("DTYPE", "CANTATA_ENGINE__DTYPE or CANTATA_ENGINE__CACHE__DTYPE"),
        ("CACHE_DTYPE", "CANTATA_ENGINE__CACHE__DTYPE"),
        ("HTTP_PORT", "CANTATA_LISTEN__HTTP_PORT"),
        ("MAX_NUM_SEQS", "CANTATA_ENGINE__SCHEDULER__MAX_NUM_SEQS"),
    ],
)
def test_the_end_of_a_settings_name_is_refused_with_the_whole_one(name: str, right: str) -> None:
    sentence = f"CANTATA_{name} in the environment is not a setting; the name is {right}"
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        load_config(None, {f"CANTATA_{name}": "secret"}, MODEL)
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        check_no_settings({f"CANTATA_{name}": "secret"})


@pytest.mark.parametrize(
    ("text", "count"),
    [("4096", 4096), ("32k", 32_000), ("32K", 32_768), ("25.6k", 25_600), ("1m", 10**6), ("2M", 2**21)],
)
def test_numbers_of_tokens_are_written_as_vllm_takes_them(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "k", "1.5", "1.5K", "-1", "32kb", "nan", "1e3"])
def test_texts_that_are_no_numbers_of_tokens(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number of tokens"):
        parse_count(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("2GiB", 2**31),
        ("2 gib", 2**31),
        ("1k", 1024),
        ("1.5MB", 1_500_000),
        ("0", 0),
        ("3TiB", 3 * 2**40),
        ("7b", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2XB", "-1", "1e3", "2 G i B", "nan", "0x10"])
def test_texts_that_are_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_unknown_names_are_refused_and_named(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("engine: {scheduler: {max_num_seq: 3}}")
    refused(
        "c.yaml: engine.scheduler.max_num_seq is not a known setting; did you mean "
        "engine.scheduler.max_num_seqs?",
        file=file,
    )
    refused(
        "CANTATA_ENGINE__DTYP in the environment is not a known setting; did you mean CANTATA_ENGINE__DTYPE?",
        {"CANTATA_ENGINE__DTYP": "float32"},
    )
    file.write_text("engnie: {}")
    refused("engnie is not a known setting; did you mean engine?", file=file)
    file.write_text("listen: {prot: 1}")
    refused("listen.prot is not a known setting", file=file)


def test_wrong_values_are_named_with_where_they_were_set(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("listen: {http_port: 99999}")
    refused(f"{file}: listen.http_port must be less than or equal to 65535, found 99999", file=file)
    refused(
        "CANTATA_ENGINE__DTYPE: engine.dtype must be 'bfloat16' or 'float32', found 'int8'",
        {"CANTATA_ENGINE__DTYPE": "int8"},
    )
    refused(
        "engine.max_model_len: 'long' is not a number of tokens; write it in digits or as 32k",
        engine__max_model_len="long",
    )
    refused("engine.max_model_len must be at least 2, got 0", engine__max_model_len="0")
    refused("engine.cache.memory_bytes must be above 0, got -5", engine__cache__memory_bytes=-5)
    for device in ("gpu", "mps", "meta", "cuda:", "cuda:x", "cpu:0"):
        refused(f"engine.device must be cpu, cuda or cuda:N, got {device!r}", engine__device=device)
    refused("engine.scheduler.max_num_seqs must be at least 1, got 0", engine__scheduler__max_num_seqs="0")
    refused("engine.cache.memory_bytes: '2Gi' is not a size", engine__cache__memory_bytes="2Gi")
    refused(
        "gateway.conversation_date: 'today' is not a date; write auto, none or YYYY-MM-DD",
        gateway__conversation_date="today",
    )
    refused("gateway.request_timeout_s must be a finite number", gateway__request_timeout_s="nan")
    refused("gateway.request_timeout_s must be greater than 0", gateway__request_timeout_s="0")
    refused("engine.parallel.tensor must be 1 to 16, got 17", engine__parallel__tensor="17")
    refused(
        "engine.parallel.expert must divide engine.parallel.tensor, which is 6: 1, 2, 3, 6; got 4",
        engine__parallel__tensor="6",
        engine__parallel__expert="4",
    )
    refused("engine.model_path is empty", engine__model_path="")
    refused("gateway.served_model_name must not be empty", gateway__served_model_name="")
    for alias in ("a b", "a*b", "**", "x" * 257, "ä"):
        refused(f"gateway.model_aliases: {alias[:100]!r} is not a model name", gateway__model_aliases=[alias])
    refused("gateway.model_aliases: there are 65 names", gateway__model_aliases=["a"] * 65)


def test_broken_files(tmp_path: Path) -> None:
    refused("nowhere.yaml cannot be read: No such file or directory", file=tmp_path / "nowhere.yaml")
    file = tmp_path / "c.yaml"
    file.write_text("engine: [unclosed")
    refused("c.yaml is not YAML (line 1)", file=file)
    file.write_bytes(b"\xff\xfe\xff")
    refused("c.yaml is not YAML", file=file)
    file.write_text("- a list")
    refused("c.yaml must be a mapping of settings, found a list", file=file)
    file.write_text("engine: 3")
    refused("engine must be a mapping of settings", file=file)
    file.write_text("listen: [1]")
    refused("listen must be a mapping of settings", file=file)


def test_an_empty_file_and_an_empty_section_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("")
    assert load_config(file, {}, MODEL) == load_config(None, {}, MODEL)
    file.write_text("engine:\n")
    assert load_config(file, {}, MODEL).engine.model_path == Path("somewhere/tiny")


def test_no_model_says_how_to_give_one() -> None:
    with pytest.raises(ConfigError, match="--model"):
        load_config(None, {}, {})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("engine: {}", "no model is given"),
        ("engine:", "no model is given"),
        ("replicas: 2", "no model is given"),
        ("engine: 3", "engine must be a mapping of settings"),
        ("engine: model_path", "engine must be a mapping of settings"),
        (
            "engine: {modle_path: m}",
            "engine.modle_path is not a known setting; did you mean engine.model_path?",
        ),
        ("engnie: {model_path: m}", "engnie is not a known setting; did you mean engine?"),
        ("engine: {dtype: int8}", "engine.dtype must be 'bfloat16' or 'float32', found 'int8'"),
    ],
)
def test_a_file_that_gives_no_model(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, {}, {})
    assert sentence in str(caught.value)


def test_keys_are_never_shown() -> None:
    config = load_config(None, {}, MODEL | {"gateway.api_keys": ["secret-key"]})
    assert "secret-key" not in repr(config)
    for wrong in (["good", "secret key"], ["sécret"], [""], "a,,b", [{"secret": "key"}]):
        with pytest.raises(ConfigError, match=r"gateway\.api_keys") as caught:
            load_config(None, {}, MODEL | {"gateway.api_keys": wrong})
        assert "cret" not in str(caught.value)


def test_a_config_cannot_be_changed() -> None:
    config = load_config(None, {}, MODEL)
    with pytest.raises(ValidationError, match="frozen"):
        config.replicas = 2  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        config.engine.dtype = "float32"  # type: ignore[misc]


def test_the_model_name_is_the_folders() -> None:
    assert load_config(None, {}, MODEL).model_name == "tiny"
    assert (
        load_config(None, {}, MODEL | {"gateway.served_model_name": "gpt-oss-20b"}).model_name
        == "gpt-oss-20b"
    )


def test_serve_arguments_take_sizes_and_know_no_listen() -> None:
    args = AppConfig.model_validate({"engine": {"model_path": "m", "cache": {"memory_bytes": "64MiB"}}})
    assert args.engine.cache.memory_bytes == 64 * 2**20
    with pytest.raises(ValidationError, match=r"http_options \(host, port\) and grpc_options"):
        AppConfig.model_validate({"engine": {"model_path": "m"}, "listen": {"http_port": 1}})
    assert issubclass(CantataConfig, AppConfig)


def test_keys_of_a_serve_application_may_come_from_the_environment() -> None:
    config = parse_config(AppConfig, {"engine": {"model_path": "x"}}, {})
    assert with_private_settings(config, {}) is config
    assert with_private_settings(config, {"CANTATA_GATEWAY__API_KEYS": ""}) is config
    keyed = with_private_settings(config, {"CANTATA_GATEWAY__API_KEYS": "one, two"})
    assert keyed.gateway.api_keys == ("one", "two")
    assert keyed.engine == config.engine
    assert with_private_settings(keyed, {"CANTATA_GATEWAY__API_KEYS": "three"}) is keyed
    with pytest.raises(ConfigError, match=r"^CANTATA_GATEWAY__API_KEYS: a key is empty") as refusal:
        with_private_settings(config, {"CANTATA_GATEWAY__API_KEYS": "secret,,"})
    assert "secret" not in str(refusal.value)
    secret = "0123456789abcdef"
    both = with_private_settings(
        config, {"CANTATA_GATEWAY__API_KEYS": "one", "CANTATA_GATEWAY__SECRET": secret}
    )
    assert (both.gateway.api_keys, both.gateway.secret) == (("one",), secret)
    assert secret not in repr(both), "it never reaches a log"
    with pytest.raises(ConfigError, match=r"^CANTATA_GATEWAY__SECRET must have 16 characters or more$"):
        with_private_settings(config, {"CANTATA_GATEWAY__SECRET": "too short"})
    for wrong in ("too short", 12):
        with pytest.raises(ConfigError, match=r"gateway\.secret must") as refusal:
            load_config(None, {}, MODEL | {"gateway.secret": wrong})
        assert str(wrong) not in str(refusal.value).replace("16", "")


def test_settings_in_the_environment_of_a_serve_application_are_refused() -> None:
    check_no_settings(
        {
            "CANTATA_GATEWAY__API_KEYS": "key",
            "CANTATA_GATEWAY__SECRET": "0123456789abcdef",
            "CANTATA_PORT": "tcp://10.0.0.1",
            "CANTATA_CPU_ISA": "avx2",
            "HOME": "/",
        }
    )
    for name in ("CANTATA_ENGINE__DTYPE", "CANTATA_REPLICAS", "CANTATA_ENGINE__DTYPO"):
        with pytest.raises(ConfigError, match=f"^{name} "):
            check_no_settings({name: "float32"})


def test_yaml_reads_off_as_false(tmp_path: Path) -> None:
    file = tmp_path / "cantata.yaml"
    file.write_text("engine: {model_path: a}")
    assert load_config(file, {}).gateway.harmony_constraint == "headers"
    file.write_text("engine: {model_path: a}\ngateway: {harmony_constraint: off}")
    assert load_config(file, {}).gateway.harmony_constraint == "off"
    refused("gateway.harmony_constraint must be 'off' or 'headers'", gateway__harmony_constraint=True)
