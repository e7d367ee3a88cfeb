"""The words of options that settings and requests share."""

from typing import Literal

ReasoningEffort = Literal["low", "medium", "high"]
"""How much gpt-oss reasons; the prompt names it."""
HarmonyConstraint = Literal["off", "headers"]
"""How far a turn is constrained: not at all, or to well-formed headers and ends of messages."""
ToolArguments = Literal["schema_types", "json", "free"]
"""What arguments of functions may be that are neither strict nor forced: JSON with the types of the
schema, any JSON object, any text."""
