"""The model that client programs talk to. Its answer depends on the last message of the prompt.

| last message | answer |
| --- | --- |
| What is the weather in Paris? | reasoning, then a call of get_weather, if it is declared |
| the result of a call | the result in a sentence |
| Say hello. | reasoning, then a greeting |
| Pick a number. | the last digit of the seed |
| Count. | one two three four five |
| Who wrote the first program? | JSON; if no schema is enforced, fenced, with a word for the year |
| a report of a validation error | the same with a number for the year |
| Are you busy? | the first time an error, the engine is overloaded; then a greeting |
| Hand over. | a call of transfer_to_specialist, if it is declared |
| Break off. | some words, then the engine dies |
"""

import re
from dataclasses import dataclass, field

from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import Script
from tests.support.gateway import turn
from workers.errors import EngineDead, Overloaded
from workers.request import EngineRequest

CALL_REASONING = "I should look up the weather."
RETRY_AFTER_S = 1.0
_MESSAGE = re.compile(
    r"<\|start\|>(?P<author>[^<]*)(?:<\|channel\|>[^<]*)?<\|message\|>(?P<text>.*?)<\|end\|>", re.S
)
_CITY = re.compile(r"\bin (\w+)\?")


@dataclass
class ScriptedModel:
    """The model of one engine.

    Attributes:
        prompts: texts of the prompts it was asked, special tokens by name, in order of arrival.
    """

    encoding: HarmonyEncoding
    prompts: list[str] = field(default_factory=list)
    _was_busy: bool = False

    def answer(self, request: EngineRequest) -> Script:
        """Return the answer to a request; FakeEngine's `answer`."""
        prompt = self.encoding.decode(request.prompt_token_ids, skip_special_tokens=False)
        self.prompts.append(prompt)
        *_, last = _MESSAGE.finditer(prompt)
        author, text = last["author"], last["text"].strip()
        if author.startswith("functions.get_weather"):
            return self._say(f"The weather: {text.strip(chr(34))}.")
        if (city := _CITY.search(text)) and "type get_weather = " in prompt:
            call = ("get_weather", f'{{"city": "{city[1]}"}}')
            return Script(turn(self.encoding, reasoning=CALL_REASONING, call=call), num_cached_tokens=16)
        if text == "Pick a number.":
            return self._say(str((request.sampling.seed or 0) % 10))
        if text == "Count.":
            return self._say("one two three four five")
        if "validation error" in text:
            return self._say(_fenced('{"name": "Ada Lovelace", "year": 1843}'))
        if text.startswith("Who wrote the first program?") and "# Response Formats" in prompt:
            return self._say('{"name": "Ada Lovelace", "year": 1843}')
        if text.startswith("Who wrote the first program?"):
            return self._say(_fenced('{"name": "Ada Lovelace", "year": "long ago"}'))
        if text == "Hand over." and "type transfer_to_specialist = " in prompt:
            return Script(turn(self.encoding, call=("transfer_to_specialist", "{}")))
        if text == "Break off.":
            ids = turn(self.encoding, text="This sentence has no")
            return Script(ids, break_after=len(ids) - 1, failure=EngineDead("scripted"))
        if text == "Are you busy?" and not self._was_busy:
            self._was_busy = True
            return Script(refusal=Overloaded("The queue is full.", RETRY_AFTER_S))
        return self._say("Hello! How can I help?", reasoning="A greeting.")

    def _say(self, text: str, reasoning: str = "") -> Script:
        return Script(turn(self.encoding, reasoning=reasoning, text=text))


def _fenced(json: str) -> str:
    return f"```json\n{json}\n```"
