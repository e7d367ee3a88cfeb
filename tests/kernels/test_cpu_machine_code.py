"""No instruction of an instruction set can run before the processor was asked for it.

Such instructions are only in functions that are local to the instruction set's own file, and these
files define no function that the linker could take for the others as well.
"""

import ast
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import kernels.cpu
from kernels.cpu import native
from tests.support.machine_code import EVEX, LEGACY, TILE, VEX, Function, extension, extensions, output, tool

SOURCES = Path(kernels.cpu.__file__).parent / "src"
SETUP = Path(__file__).parents[2] / "setup.py"
BEYOND = {
    "isa_avx2.cpp": {LEGACY, VEX},
    "isa_avx512.cpp": {LEGACY, VEX, EVEX},
    "isa_avx512_bf16.cpp": {LEGACY, VEX, EVEX},
    "isa_amx.cpp": {LEGACY, VEX, EVEX, TILE},
}
"""What may be in the functions that are local to these files. The others are for every
processor."""
PLANTED = """
#pragma GCC target("avx2,fma")
#include <vector>
namespace cantata {
namespace {
float inside(const float* x) { return x[0] * x[1] + x[2]; }
}
const auto table = &inside;
float leaked(const float* x) { return x[0] * x[1] + x[2]; }
std::vector<int> kept(int value) { std::vector<int> all; all.push_back(value); return all; }
const float at_load = leaked(new float[3]());
}
"""


def only_x86() -> None:
    if "avx2" not in native.ISAS:
        pytest.skip("this processor has no instruction sets of x86")


def misplaced(needs: dict[Function, set[str]]) -> set[str]:
    """Return the functions that need more than every processor has, where such are not allowed."""
    return {
        function.name for function, found in needs.items() if not found <= BEYOND.get(function.file, set())
    }


def run_at_load(needs: dict[Function, set[str]]) -> set[str]:
    """Return the functions of the files of an instruction set that are not of their anonymous
    namespace: initialisers."""
    return {f.name for f in needs if f.file.startswith("isa_") and "(anonymous namespace)" not in f.name}


def compiler() -> str:
    path = shutil.which("g++")
    if path is None:
        pytest.skip("g++ is not installed (Debian: g++)")
    return path


def flags() -> list[str]:
    """Return the compiler's flags in setup.py."""
    for node in ast.walk(ast.parse(SETUP.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "extra_compile_args":
            return [*ast.literal_eval(node.value), "-fPIC"]
    raise AssertionError("setup.py gives no extra_compile_args")


def weak_symbols(sources: list[Path], folder: Path) -> set[str]:
    """Return the functions that object files of these sources would share with others.

    They are compiled for link-time optimisation, which ends after a fifth of the whole time, before
    functions are inlined across their callers. The object's table of symbols then names every
    function that is still called; that of a whole compilation has a part of these, and no others
    but local copies. Only the weak pointer to the handler of exceptions is added later.
    """
    gxx = compiler()
    plugin = output([gxx, "-print-file-name=liblto_plugin.so"])[0]

    def symbols(source: Path) -> set[str]:
        made = folder / f"{source.stem}.o"
        command = [gxx, *flags(), "-flto", "-fno-fat-lto-objects", "-c", str(source), "-o", str(made)]
        subprocess.run(command, check=True, timeout=280)
        listed = output([tool("nm"), f"--plugin={plugin}", "-C", "--defined-only", str(made)])
        assert any("cantata::" in line for line in listed), f"nm finds no symbols in {made}"
        return {line.split(maxsplit=2)[2] for line in listed if line.split()[1] in "VWu"}

    with ThreadPoolExecutor(2) as pool:
        return set().union(*pool.map(symbols, sources))


def test_instructions_of_an_instruction_set_are_only_in_its_operations() -> None:
    only_x86()
    library = native.built_file()
    assert library is not None, "the C++ library was not built"
    needs = extensions(library)
    found = {file: set().union(*(kinds for f, kinds in needs.items() if f.file == file)) for file in BEYOND}
    assert VEX in found["isa_avx2.cpp"], (
        "its functions are not where they are looked for; was the library stripped?"
    )
    assert EVEX in found["isa_avx512.cpp"]
    assert misplaced(needs) == set()
    assert run_at_load(needs) == set()


def test_object_files_of_instruction_sets_share_no_function(tmp_path: Path) -> None:
    sources = sorted(SOURCES.glob("isa_*.cpp"))
    assert {source.name for source in sources} >= set(BEYOND)
    assert weak_symbols(sources, tmp_path) == set()
    assert "-fno-exceptions" in flags(), "with exceptions they share DW.ref.__gxx_personality_v0"


def test_what_is_misplaced_or_shared_would_be_noticed(tmp_path: Path) -> None:
    only_x86()
    source, library = tmp_path / "isa_avx2.cpp", tmp_path / "planted.so"
    source.write_text(PLANTED)
    subprocess.run(
        [compiler(), *flags(), "-shared", str(source), "-o", str(library)], check=True, timeout=120
    )
    needs = extensions(library)
    assert {name.split("(")[0] for name in misplaced(needs)} >= {"cantata::leaked", "cantata::kept"}
    assert not any("inside" in name for name in misplaced(needs))
    assert run_at_load(needs) == {"_GLOBAL__sub_I_isa_avx2.cpp"}
    assert any("vector<int" in name for name in weak_symbols([source], tmp_path))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("c5 f8 28 c1", VEX),  # vmovaps %xmm1,%xmm0
        ("c4 e2 78 f2 c1", VEX),  # andn
        ("c4 e2 7b 5e c1", TILE),
        ("62 f1 7c 48 28 c1", EVEX),
        ("67 c5 f8 28 00", VEX),  # with an address of 32 bits
        ("66 0f 38 00 c1", LEGACY),  # pshufb
        ("66 41 0f 3a 0f c1 08", LEGACY),  # palignr, with REX
        ("f3 48 0f b8 c1", LEGACY),  # popcnt
        ("f2 0f 7c c1", LEGACY),  # haddps
        ("66 0f 6f c1", None),  # movdqa
        ("0f 28 c1", None),
        ("f3 0f 12 c1", LEGACY),  # movsldup
        ("0f 12 c1", None),  # movhlps
        ("48 8b 05 c4 c5 62 00", None),
        ("8f 00", None),  # pop
        ("f3 0f bc c1", None),  # rep bsf
    ],
)
def test_instructions_are_told_by_their_encoding(code: str, kind: str | None) -> None:
    assert extension(bytes.fromhex(code), "tdpbf16ps" if kind == TILE else "") == kind
