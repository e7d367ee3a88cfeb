"""The `cantata` command: flags, errors as one sentence, and a help that loads nothing heavy."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import cli
from cluster.config import load_config, setting_paths
from cluster.harmony.encoding import HarmonyEncoding
from workers.errors import CheckpointError
from workers.model_config import load_model_config

CANTATA = [sys.executable, "-c", "import sys; from cluster.cli import main; sys.exit(main())"]


def run(*arguments: str, timeout_s: float = 60) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*CANTATA, *arguments], capture_output=True, text=True, timeout=timeout_s)


def parsed(*arguments: str) -> dict[str, object]:
    known = set(setting_paths())
    options = cli._parser().parse_args(["serve", *arguments])
    return {path: value for path, value in vars(options).items() if path in known}


def test_help_is_quick_because_it_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom cluster.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'grpc', 'pydantic', 'fastapi', 'tokenizers', 'numpy'} & "
        "set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "make-checkpoint" in result.stdout
    assert result.stderr.strip() == "[]"


def test_bench_has_help_of_its_own() -> None:
    result = run("bench", "--help")
    assert result.returncode == 0
    assert "usage: cantata bench" in result.stdout
    assert "--concurrency" in run("bench", "serve", "--help").stdout


def test_every_flag_sets_a_known_setting() -> None:
    known = set(setting_paths())
    for names, path, _, _ in cli.SERVE_FLAGS:
        assert path in known
        for name in names:
            assert parsed(name, "7") == {path: "7"}


def test_flags_reach_the_config() -> None:
    flags = parsed(
        *(
            "--model",
            "m",
            "--port",
            "1",
            "--grpc-port",
            "2",
            "--dtype",
            "float32",
            "--max-num-seqs",
            "3",
            "--kv-cache-memory",
            "1GiB",
        ),
        *(
            "--api-key",
            "a",
            "--api-key",
            "b",
            "--no-enable-prefix-caching",
            "--conversation-date",
            "none",
            "--request-timeout",
            "2.5",
        ),
    )
    config = load_config(None, {}, flags)
    assert (config.listen.http_port, config.listen.grpc_port) == (1, 2)
    assert config.engine.scheduler.max_num_seqs == 3
    assert config.engine.cache.memory_bytes == 2**30
    assert not config.engine.cache.prefix_caching
    assert config.gateway.api_keys == ("a", "b")
    assert config.gateway.request_timeout_s == 2.5


def test_flags_not_given_leave_the_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("engine: {model_path: m, cache: {prefix_caching: false}}\nlisten: {http_port: 5}")
    config = load_config(file, {}, parsed())
    assert not config.engine.cache.prefix_caching
    assert config.listen.http_port == 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["serve"],
            "cantata: no model is given; pass the folder of a checkpoint with --model, or set "
            "engine.model_path\n",
        ),
        (
            ["serve", "--model", "m", "--dtype", "int8"],
            "cantata: the command line: engine.dtype must be 'bfloat16' or 'float32', found 'int8'\n",
        ),
        (
            ["serve", "--config", "/nowhere.yaml"],
            "cantata: /nowhere.yaml cannot be read: No such file or directory\n",
        ),
    ],
)
def test_a_wrong_configuration_is_one_sentence(arguments: list[str], sentence: str) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", sentence)


@pytest.mark.parametrize("mode", [["--standalone"], []], ids=["standalone", "ray"])
def test_a_checkpoint_that_is_none_is_one_sentence(mode: list[str], tmp_path: Path) -> None:
    result = run("serve", *mode, "--model", str(tmp_path / "missing"))
    assert result.returncode == 1
    assert (
        result.stderr
        == f"cantata: {tmp_path / 'missing'} is not a folder; give the path of a gpt-oss checkpoint in "
        f"Hugging Face layout\n"
    )
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "llama"}')
    result = run("serve", *mode, "--model", str(foreign))
    assert result.returncode == 1
    assert (
        result.stderr
        == f"cantata: {foreign / 'config.json'}: model_type is 'llama'; only 'gpt_oss' is supported\n"
    )


@pytest.mark.parametrize("mode", [["--standalone"], []], ids=["standalone", "ray"])
def test_what_a_model_cannot_do_is_refused_before_anything_starts(
    mode: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = str(tmp_path / "tiny")
    assert cli.main(["make-checkpoint", "--preset", "tiny", "--layers", "1", model]) == 0
    for flags, said in (
        (("--max-model-len", "200k"), "engine.max_model_len must be 2 to 131072, the model's context"),
        (("-tp", "5"), "engine.parallel: tensor=5, expert=5 cannot work"),
    ):
        capfd.readouterr()
        assert cli.main(["serve", *mode, "--model", model, *flags]) == 1
        err = capfd.readouterr().err
        first, sentence = err.splitlines()
        assert first == f"Starting to serve {model}"
        assert sentence.startswith(f"cantata: {said}"), err


def test_the_first_line_does_not_wait_for_large_imports(tmp_path: Path) -> None:
    model = str(tmp_path / "tiny")
    assert cli.main(["make-checkpoint", "--preset", "tiny", "--layers", "1", model]) == 0
    code = (
        "import builtins, sys\nfrom cluster.cli import main\nsay = builtins.print\n"
        "def watched(*words, **options):\n"
        "    if words[0].startswith('Starting'):\n"
        "        say(sorted({'torch', 'ray', 'grpc', 'fastapi', 'tokenizers', 'numpy'} & set(sys.modules)))\n"
        "    say(*words, **options)\n"
        "builtins.print = watched\n"
        f"sys.exit(main(['serve', '--standalone', '--model', {model!r}, '--max-model-len', '200k']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "[]\n", result.stderr


def test_a_models_name_on_a_hub_says_how_to_download_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder") as caught:
        load_model_config(Path("openai/gpt-oss-20b"))
    command = (
        'hf download openai/gpt-oss-20b --exclude "original/*" --exclude "metal/*" --local-dir gpt-oss-20b'
    )
    assert str(caught.value).endswith(command)


def test_an_unknown_flag_is_refused() -> None:
    result = run("serve", "--modle", "x")
    assert result.returncode == 2
    assert "--modle" in result.stderr


def test_version() -> None:
    assert run("version").stdout == run("--version").stdout == "0.1.0\n"


def test_make_checkpoint_writes_a_folder_that_loads(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tiny"
    assert cli.main(["make-checkpoint", "--preset", "tiny", "--layers", "1", "--seed", "3", str(out)]) == 0
    printed = capfd.readouterr()
    assert f"writing {out}" in printed.err
    assert printed.out.startswith(f"{out} holds ")
    encoding = HarmonyEncoding.load(out)
    config = load_model_config(out)
    assert config.num_layers == 1
    assert config.vocab_size == encoding.vocab_size == 2048
    assert set(config.stop_token_ids) <= set(encoding.stop_token_ids)

    again = run("make-checkpoint", "--preset", "tiny", str(out))
    sentence = (
        f"cantata: {out} exists and is not an empty folder; give another path (nothing is overwritten)\n"
    )
    assert (again.returncode, again.stderr) == (1, sentence)

    copy = tmp_path / "copy"
    assert (
        cli.main(["make-checkpoint", "--preset", "tiny", "--layers", "1", "--tokenizer", str(out), str(copy)])
        == 0
    )
    assert (copy / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("mode", [["--standalone"], []], ids=["standalone", "ray"])
def test_more_threads_than_cores_are_one_sentence(mode: list[str], tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert cli.main(["make-checkpoint", "--preset", "tiny", "--layers", "1", str(out)]) == 0
    result = run(
        "serve", *mode, "--model", str(out), "--http-port", "0", "--grpc-port", "0", "--threads", "4096"
    )
    assert result.returncode == 1
    assert result.stdout == ""
    sentence = (
        rf"Starting to serve {re.escape(str(out))}\n"
        r"cantata: engine_cpus \(--threads\) is 4096, but this process may use (\d+) cores: set at most \1\n"
    )
    assert re.fullmatch(sentence, result.stderr), result.stderr


def test_make_checkpoint_dry_run_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "big"
    assert cli.main(["make-checkpoint", "--preset", "120b", "--dry-run", str(out)]) == 0
    assert "116.83 billion parameters (5.13 billion active per token)" in capfd.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--vocab", "10"], "vocabulary size 10 is too small"),
        (
            ["--tokenizer", "nowhere"],
            "--tokenizer nowhere is neither bpe, nor harmony, nor a folder with a tokenizer.json",
        ),
        (["--layers", "0"], "layers must be at least 1, got 0"),
        (["--seed", "-1"], "seed must not be negative, got -1"),
        (
            ["--tokenizer", "harmony", "--vocab", "300"],
            "--vocab 300 is too small for --tokenizer harmony, which has 201088 ids",
        ),
    ],
)
def test_make_checkpoint_says_what_is_wrong(
    arguments: list[str], part: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["make-checkpoint", "--preset", "tiny", *arguments, str(tmp_path / "out")]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("cantata: ")]
    assert len(lines) == 1
    assert part in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_the_operations_page_lists_every_setting_with_its_flags() -> None:
    page = (Path(__file__).parent.parent.parent / "docs/operations.md").read_text()
    rows = {
        line.split("|")[1].strip().strip("`"): line for line in page.splitlines() if line.startswith("| `")
    }
    for path in setting_paths():
        assert path in rows, f"{path} is not in docs/operations.md"
    for names, path, _, _ in cli.SERVE_FLAGS:
        assert f"`{names[0]}`" in rows[path]
