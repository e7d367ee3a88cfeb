"""The answers of the end-to-end tests' model, and the chats that lead to them."""

from cluster.frontend.chat_messages import ChatMessage, ToolCall, harmony_messages
from cluster.harmony.render import Conversation
from cluster.harmony.tools import ToolDefinition
from tests.support.scripted_checkpoint import Script

GREETING = "Say hello."
GREETING_REASONING = "The user wants a greeting."
GREETING_ANSWER = "Hello there! How can I help?"

QUESTION = "What is the weather in Paris?"
CALL_REASONING = "I need the weather tool."
CALL_ARGUMENTS = '{"city": "Paris"}'
TOOL_RESULT = '{"celsius": 21}'
FINAL_ANSWER = "It is 21 degrees in Paris."
WEATHER_PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER_DESCRIPTION = "Current weather of a city."
WEATHER_TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": WEATHER_DESCRIPTION, "parameters": WEATHER_PARAMETERS},
}

_TOOLS = (ToolDefinition("get_weather", WEATHER_DESCRIPTION, WEATHER_PARAMETERS),)
_QUESTION = ChatMessage("user", QUESTION)
_CALL = ChatMessage(
    "assistant", reasoning=CALL_REASONING, tool_calls=(ToolCall("call_1", "get_weather", CALL_ARGUMENTS),)
)
_RESULT = ChatMessage("tool", TOOL_RESULT, tool_call_id="call_1")

SCRIPTS = (
    Script(
        Conversation(harmony_messages((ChatMessage("user", GREETING),))),
        f"<|channel|>analysis<|message|>{GREETING_REASONING}<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{GREETING_ANSWER}<|return|>",
    ),
    Script(
        Conversation(harmony_messages((_QUESTION,)), _TOOLS),
        f"<|channel|>analysis<|message|>{CALL_REASONING}<|end|>"
        f"<|start|>assistant<|channel|>commentary to=functions.get_weather "
        f"<|constrain|>json<|message|>{CALL_ARGUMENTS}<|call|>",
    ),
    Script(
        Conversation(
            harmony_messages((_QUESTION, _CALL, ChatMessage("tool", TOOL_RESULT, tool_call_id="call_1"))),
            _TOOLS,
        ),
        f"<|channel|>final<|message|>{FINAL_ANSWER}<|return|>",
    ),
)
