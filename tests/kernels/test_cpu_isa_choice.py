"""The choice of an instruction set for a process, and a processor that stops at one."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

from kernels.cpu import dense, native, trial
from kernels.mxfp4 import NATURAL, ROWS16, choose_layout
from workers.config import CpuIsa

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _best_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    native.choose(native.AUTO)
    yield
    monkeypatch.undo()
    native.choose(native.AUTO)


@pytest.fixture
def broken_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The library's file is one that no loader takes."""
    (tmp_path / "_native.so").write_bytes(b"\x7fELF of another machine")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native._loaded.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    native._loaded.cache_clear()


def test_the_setting_has_the_names_of_the_library() -> None:
    assert set(get_args(CpuIsa)) == {native.AUTO, *get_args(native.Isa), native.REFERENCE}
    assert set(native.ISAS) < set(get_args(native.Isa))
    assert native.available()[-1] == "portable"


def test_auto_is_the_best_and_names_are_obeyed() -> None:
    best = native.isa()
    assert best == native.available()[0]
    assert native.chosen_by() is None
    native.choose("portable")
    assert (native.isa(), native.chosen_by()) == ("portable", "cpu_isa")
    native.choose("auto")
    assert (native.isa(), native.chosen_by()) == (best, None)


def test_the_environment_decides_where_no_setting_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANTATA_CPU_ISA", "portable")
    native.choose("auto")
    assert (native.isa(), native.chosen_by()) == ("portable", "CANTATA_CPU_ISA")
    native.choose("reference")
    assert (native.isa(), native.chosen_by()) == (None, "cpu_isa")
    assert native.why_missing() == "cpu_isa is reference"
    for text in ("", "auto"):
        monkeypatch.setenv("CANTATA_CPU_ISA", text)
        native.choose("auto")
        assert (native.isa(), native.chosen_by()) == (native.available()[0], None)
    monkeypatch.setenv("CANTATA_CPU_ISA", "avx3")
    with pytest.raises(
        ValueError,
        match=r"^CANTATA_CPU_ISA is avx3, which this processor or this build does not "
        r"have: set it to one of auto, ",
    ):
        native.choose("auto")


def test_weights_that_are_packed_already_stay_usable_on_the_references() -> None:
    x, weight = torch.ones(3, 32).bfloat16(), torch.ones(16, 32).bfloat16()
    packed = dense.pack(weight)
    assert choose_layout(CPU) == ROWS16
    native.choose("reference")
    assert choose_layout(CPU) == NATURAL
    assert not dense.can_run(CPU, torch.bfloat16)
    assert torch.equal(dense.linear(x, packed, None), x @ weight.T)


def test_a_name_that_is_not_there_changes_nothing() -> None:
    missing = [name for name in ("sse5", *get_args(native.Isa)) if name not in native.available()]
    native.choose("portable")
    for name in missing:
        with pytest.raises(
            ValueError, match=f"^cpu_isa is {name}, which this processor or this build does not have: "
        ) as refused:
            native.choose(name)
        assert str(refused.value).endswith(
            f"set it to one of auto, {', '.join(native.available())}, reference"
        )
    assert native.isa() == "portable"


@pytest.mark.usefixtures("broken_library")
def test_a_library_that_cannot_be_loaded_is_said_and_refused_where_it_is_wanted() -> None:
    native.choose("auto")
    assert native.isa() is None
    assert native.why_missing().startswith("the C++ kernels cannot be loaded (")
    assert native.why_missing().endswith("): install Cantata again on this machine")
    assert native.available() == []
    native.choose("reference")
    with pytest.raises(
        ValueError,
        match=r"^cpu_isa is portable, and the C\+\+ kernels cannot be loaded \(.*; "
        r"or set it to auto or reference",
    ):
        native.choose("portable")


def test_every_instruction_set_here_passes_its_trial() -> None:
    for name in native.available():
        native.choose(name)
        assert native.runs()
    native.choose("reference")
    assert native.runs()
    assert trial.main(library_file(), "sse5") == 2


def library_file() -> str:
    [file] = Path(native.__file__).parent.glob("_native*.so")
    return str(file)


def interpreter(folder: Path, line: str) -> str:
    """Return the path of a program in place of Python that ends with the given line."""
    file = folder / "python"
    file.write_text(f'#!/bin/sh\necho $$ "$@" >>{folder}/calls\n{line}\n')
    file.chmod(0o755)
    return str(file)


def test_a_trial_that_dies_of_an_instruction(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    native.choose("portable")
    native._trial.cache_clear()
    try:
        monkeypatch.setattr(sys, "executable", interpreter(tmp_path, "kill -ILL $$"))
        assert not native.runs()
        assert not native.runs()
        [call] = (tmp_path / "calls").read_text().splitlines()
        assert call.endswith(f"-m kernels.cpu.trial {library_file()} portable")
        # Output that does not concern instructions stops no process.
        for line in ("exit 3", f"kill -{signal.SIGKILL.value} $$"):
            native._trial.cache_clear()
            monkeypatch.setattr(sys, "executable", interpreter(tmp_path, line))
            with caplog.at_level(logging.WARNING):
                assert native.runs()
        assert "ended it with code 3" in caplog.text
        assert f"ended it with code -{signal.SIGKILL.value}" in caplog.text
        native._trial.cache_clear()
        monkeypatch.setattr(sys, "executable", os.devnull)
        assert native.runs()
        assert "could not be tried" in caplog.text
    finally:
        native._trial.cache_clear()
