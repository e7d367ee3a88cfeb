"""Claude Code does one task to its end: it reads a file, changes it through its own tools, and says
that it is done. The engine is a double, which answers on the results that the prompt has."""

import asyncio
import json
import os
import shutil
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path

import pytest

from cluster.config import GatewayConfig
from tests.clients.test_clients import API_KEY, FOLDER, MODEL, TIMEOUT_S
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import make_encoding, serving, turn
from workers.request import EngineRequest

WRAPPER = FOLDER / "node_modules/@anthropic-ai/claude-code/cli-wrapper.cjs"


@pytest.mark.clients
@pytest.mark.npm
@pytest.mark.skipif(
    not WRAPPER.exists() or shutil.which("node") is None,
    reason="the JavaScript client libraries are not installed: make test-clients",
)
async def test_claude_code_changes_a_file(tmp_path: Path) -> None:
    encoding = make_encoding(tmp_path)
    folder = tmp_path / "work"
    folder.mkdir()
    file = folder / "greeting.txt"
    file.write_text("hello world\n")
    prompts: list[str] = []

    def answer(request: EngineRequest) -> Script:
        prompt = encoding.decode(request.prompt_token_ids, skip_special_tokens=False)
        prompts.append(prompt)
        if "<|start|>functions.Edit<|" in prompt:
            return Script(
                turn(encoding, reasoning="All done.", text="The greeting is changed."), per_message=16
            )
        name, change = "Read", {}
        if "<|start|>functions.Read<|" in prompt:
            name, change = "Edit", {"old_string": "hello", "new_string": "goodbye"}
        call = (name, json.dumps({"file_path": str(file), **change}))
        return Script(turn(encoding, reasoning=f"I need {name}.", call=call), per_message=16)

    engine = await FakeEngine(max_model_len=200_000, answer=answer).start()
    try:
        async with serving(
            encoding, [engine], model_name=MODEL, config=GatewayConfig(api_keys=(API_KEY,))
        ) as gateway:
            environment = {
                "PATH": os.environ["PATH"],
                "HOME": str(tmp_path),
                "ANTHROPIC_BASE_URL": gateway.url,
                "ANTHROPIC_AUTH_TOKEN": API_KEY,
                "ANTHROPIC_MODEL": MODEL,
                "ANTHROPIC_DEFAULT_HAIKU_MODEL": MODEL,
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
                "DISABLE_AUTOUPDATER": "1",
            }
            task = "Change hello to goodbye in greeting.txt"
            command = ["node", str(WRAPPER), "-p", task, "--permission-mode", "acceptEdits"]
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
    assert process.returncode == 0, output.decode()[-4000:]
    assert output.decode().strip() == "The greeting is changed."
    assert file.read_text() == "goodbye world\n"
    # What the turns share is the same each time, and thinking comes back.
    assert prompts[1].startswith(prompts[0].removesuffix("<|start|>assistant"))
    assert "I need Read." in prompts[-1]
    assert "I need Edit." in prompts[-1]
