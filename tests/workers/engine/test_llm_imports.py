"""Offline inference on one rank starts and answers without the libraries that only serving and
several ranks need, as on a GPU machine that has torch and little else."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_model import write_tiny_checkpoint

ROOT = Path(__file__).parents[3]
ELSEWHERE = (
    "fastapi",
    "google.protobuf",
    "grpc",
    "httpx",
    "jsonschema",
    "msgpack",
    "orjson",
    "pydantic",
    "ray",
    "uvicorn",
    "yaml",
    "zmq",
)
_GENERATE = """
import sys
for name in {elsewhere}:
    sys.modules[name] = None  # an import of it fails
from workers.engine.llm import LLM, SamplingParams
with LLM({path!r}, dtype="float32", max_model_len=64, kv_cache_bytes=4 << 20, threads=1) as llm:
    sampling = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    [answer] = llm.generate([[1, 2, 3]], sampling, use_tqdm=False)
print(len(answer.outputs[0].token_ids))
"""


def run(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_one_rank_answers_without_the_libraries_of_serving(tmp_path: Path) -> None:
    ran = run(_GENERATE.format(elsewhere=ELSEWHERE, path=str(write_tiny_checkpoint(tmp_path))))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "4\n"


@pytest.mark.parametrize("name", ["zmq", "msgpack"])
def test_the_block_works(name: str) -> None:
    ran = run(f"import sys\nsys.modules[{name!r}] = None\nimport workers.executor.distributed")
    assert f"import of {name} halted" in ran.stderr
