"""Programs that use well-known client libraries as their users do, each against a server of its own
in the test's event loop.

scripts/install_clients.sh installs the libraries: those for Python into .venv/clients, those for
JavaScript into programs/node_modules.
"""

import asyncio
import os
import shutil
import subprocess
from asyncio.subprocess import PIPE, STDOUT
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.config import GatewayConfig
from tests.clients.scripted_model import CALL_REASONING, ScriptedModel
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import make_encoding, serving
from tests.support.random_engine import RandomEngine, write_random_checkpoint

ROOT = Path(__file__).parent.parent.parent
FOLDER = Path(__file__).parent / "programs"
PYTHON = ROOT / ".venv/clients/bin/python"
MODEL = "gpt-oss-20b"
API_KEY = "secret"
TIMEOUT_S = 240
"""Bound for one program; on an idle machine each takes seconds, most of them for its imports."""
CALL = (
    "<|start|>assistant<|channel|>commentary to=functions.get_weather "
    '<|constrain|>json<|message|>{"city": "Paris"}<|call|>'
)
RESULT = "<|start|>functions.get_weather<|channel|>commentary to=assistant<|message|>sunny, 21 degrees<|end|>"

pytestmark = pytest.mark.clients
needs_python_libraries = pytest.mark.skipif(
    not PYTHON.exists(), reason="the client libraries are not installed: make test-clients"
)


@dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
        file: in FOLDER.
        has_tools: it asks for the weather in Paris, then in Oslo, with get_weather; and for a
            greeting, with low effort.
        returns_reasoning: its library sends the reasoning before a call back with the call.
    """

    file: str
    has_tools: bool = True
    returns_reasoning: bool = True


PYTHON_PROGRAMS = (
    Program("openai_chat.py"),
    Program("langchain_chat.py", returns_reasoning=False),
    Program("litellm_chat.py"),
    Program("pydantic_ai_chat.py"),
    Program("instructor_chat.py", has_tools=False),
    Program("agents_chat.py"),
    Program("openai_responses_chat.py"),
    Program("agents_responses_chat.py"),
)
NODE_PROGRAMS = (Program("openai_chat.mjs"), Program("ai_chat.mjs"))


@needs_python_libraries
@pytest.mark.parametrize("program", PYTHON_PROGRAMS, ids=lambda program: program.file)
async def test_python_client(program: Program, tmp_path: Path) -> None:
    check_prompts(program, await run([str(PYTHON), str(FOLDER / program.file)], tmp_path))


@pytest.mark.npm
@pytest.mark.skipif(
    not (FOLDER / "node_modules/.installed").exists() or shutil.which("node") is None,
    reason="the JavaScript client libraries are not installed: make test-clients",
)
@pytest.mark.parametrize("program", NODE_PROGRAMS, ids=lambda program: program.file)
async def test_javascript_client(program: Program, tmp_path: Path) -> None:
    check_prompts(program, await run(["node", str(FOLDER / program.file)], tmp_path))


@needs_python_libraries
def test_without_node_the_installation_says_what_to_install(tmp_path: Path) -> None:
    for tool in ("cmp", "dirname"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    said = subprocess.run(
        ["/bin/bash", ROOT / "scripts/install_clients.sh", "npm"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert said.returncode == 1
    assert "need node" in said.stderr
    assert "apt-get install nodejs npm" in said.stderr


async def run(command: list[str], folder: Path) -> list[str]:
    """Run a program, which must succeed, and return the prompts that its model got."""
    encoding = make_encoding(folder)
    model = ScriptedModel(encoding)
    engine = await FakeEngine(max_model_len=4096, answer=model.answer).start()
    random = await RandomEngine(write_random_checkpoint(folder / "model", encoding)).start()
    config = GatewayConfig(api_keys=(API_KEY,))
    try:
        async with (
            serving(encoding, [engine], model_name=MODEL, config=config) as gateway,
            serving(encoding, [random], model_name=MODEL, config=config) as noise,
        ):
            environment = {
                "PATH": os.environ["PATH"],
                "HOME": str(folder),
                "OPENAI_BASE_URL": f"{gateway.url}/v1",
                "NOISE_BASE_URL": f"{noise.url}/v1",  # a real engine, whose weights are random
                "OPENAI_API_KEY": API_KEY,
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it asks the internet for prices
            }
            process = await asyncio.create_subprocess_exec(
                *command, env=environment, cwd=folder, stdout=PIPE, stderr=STDOUT
            )
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    output, _ = await process.communicate()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
    finally:
        await engine.stop()
        await random.stop()
    assert process.returncode == 0, f"exit code {process.returncode}:\n{output.decode()[-6000:]}"
    return model.prompts


def check_prompts(program: Program, prompts: list[str]) -> None:
    """Check what the model got to see of the conversation with a tool, and of the effort."""
    if not program.has_tools:
        return
    after_result = prompt_that_ends_in(RESULT, prompts)
    assert "// Current weather of a city.\ntype get_weather = (_: {\n" in after_result
    assert CALL + RESULT in after_result
    assert (CALL_REASONING in after_result) is program.returns_reasoning
    next_turn = prompt_that_ends_in("<|start|>user<|message|>And in Oslo?<|end|>", prompts)
    assert CALL + RESULT in next_turn
    assert "<|channel|>final<|message|>The weather: sunny, 21 degrees.<|end|>" in next_turn
    assert CALL_REASONING not in next_turn  # it is of use only until the final answer
    (low,) = (prompt for prompt in prompts if "\nReasoning: low\n" in prompt)
    assert low.endswith("<|start|>user<|message|>Say hello.<|end|><|start|>assistant")


def prompt_that_ends_in(message: str, prompts: list[str]) -> str:
    """Return the first prompt with this last message. Arguments of calls are as the model wrote
    them, although some libraries write them anew, without spaces."""
    found = [prompt for prompt in prompts if prompt.endswith(f"{message}<|start|>assistant")]
    assert found, f"no prompt ends in {message}:\n" + "\n\n".join(prompts)
    return found[0].replace('{"city":"', '{"city": "')
