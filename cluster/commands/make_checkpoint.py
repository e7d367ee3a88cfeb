"""`cantata make-checkpoint`: write random weights of a preset's shape, with a tokenizer, into one
folder."""

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.make_tokenizer import HARMONY_VOCAB_SIZE, write_bpe_tokenizer, write_harmony_tokenizer
from workers.errors import CheckpointError, ConfigError
from workers.model.make_checkpoint import (
    DEFAULT_VOCAB,
    Summary,
    plan_checkpoint,
    preset_config,
    write_checkpoint,
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def run_make_checkpoint(
    out: Path, preset: str, *, seed: int, vocab: int | None, layers: int | None, tokenizer: str, dry_run: bool
) -> int:
    """Write the checkpoint, or with `dry_run` print what would be written; return the exit code.

    Args:
        tokenizer: `bpe`, `harmony`, or the path of a folder with a tokenizer.json.
    Raises:
        ConfigError, CheckpointError: one sentence for the user.
    """
    if dry_run:
        planned = vocab or _planned_vocab(preset, tokenizer)
        config = preset_config(preset, vocab_size=planned, num_layers=layers)
        summary = plan_checkpoint(config, seed=seed).summary
        _print_summary(f"{out} would hold", summary)
        return 0
    _check_out(out)
    with tempfile.TemporaryDirectory(prefix="cantata-tokenizer-") as folder:
        written = _write_tokenizer(Path(folder), tokenizer, preset, vocab)
        encoding = HarmonyEncoding.load(written, vocab)
        vocab_size = vocab or (HARMONY_VOCAB_SIZE if tokenizer == "harmony" else encoding.vocab_size)

        def add_tokenizer(target: Path) -> None:
            for name in TOKENIZER_FILES:
                if (written / name).is_file():
                    shutil.copyfile(written / name, target / name)

        with _progress_bar(f"writing {out}") as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            config = preset_config(
                preset, vocab_size=vocab_size, num_layers=layers, stop_token_ids=encoding.stop_token_ids
            )
            summary = write_checkpoint(out, config, seed=seed, add_files=add_tokenizer, progress=progress)
    _print_summary(f"{out} holds", summary)
    return 0


def _planned_vocab(preset: str, tokenizer: str) -> int:
    if tokenizer == "harmony":
        return HARMONY_VOCAB_SIZE
    return DEFAULT_VOCAB[preset] if tokenizer == "bpe" else HarmonyEncoding.load(Path(tokenizer)).vocab_size


def _check_out(out: Path) -> None:
    # write_checkpoint checks this as well; here it is found before the tokenizer is made.
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out} exists and is not an empty folder; give another path (nothing is overwritten)"
        )


def _write_tokenizer(folder: Path, tokenizer: str, preset: str, vocab: int | None) -> Path:
    """Write the tokenizer's files; return the folder that holds them."""
    if tokenizer == "bpe":
        vocab_size = vocab or DEFAULT_VOCAB[preset]
        _say(f"making a byte-level BPE tokenizer of {vocab_size:,} tokens")
        write_bpe_tokenizer(folder, vocab_size)
    elif tokenizer == "harmony":
        if vocab is not None and vocab < HARMONY_VOCAB_SIZE:
            raise ConfigError(
                f"--vocab {vocab} is too small for --tokenizer harmony, which has {HARMONY_VOCAB_SIZE} ids"
            )
        write_harmony_tokenizer(folder, progress=_say)
    else:
        source = Path(tokenizer)
        if source.is_file():
            source = source.parent
        if not source.is_dir():
            raise CheckpointError(
                f"--tokenizer {tokenizer} is neither bpe, nor harmony, nor a folder with a tokenizer.json"
            )
        return source
    return folder


def _print_summary(what: str, summary: Summary) -> None:
    size = (
        f"{summary.num_bytes / 1e9:.2f} GB"
        if summary.num_bytes >= 1e9
        else f"{summary.num_bytes / 1e6:.1f} MB"
    )
    print(
        f"{what} {_count(summary.parameters_total)} parameters ({_count(summary.parameters_active)} active "
        f"per token) "
        f"in {len(summary.files)} files, {size}"
    )


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _progress_bar(description: str) -> "Iterator[tqdm[NoReturn]]":
    with tqdm(
        desc=description, unit="B", unit_scale=True, unit_divisor=1000, file=sys.stderr, total=0
    ) as bar:
        yield bar
