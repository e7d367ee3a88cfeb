"""What a request says of the form of its answer's text, as the service's Structure: OpenAI's
`response_format`, vLLM's `structured_outputs` and its older `guided_…`, llama.cpp's `json_schema`
and `grammar`."""

from collections.abc import Iterator, Mapping, Sequence

from cluster.frontend.schema import SamplingFields
from cluster.frontend.schema_formats import (
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponseFormat,
    StructuredOutputs,
)
from cluster.generation import Structure
from cluster.generation.limits import check_format_name
from cluster.generation.requests import StructureKind
from cluster.harmony.render import ResponseFormat as ShownFormat
from workers.errors import InvalidRequest
from workers.grammars import grammar as grammars
from workers.grammars.structured import grammar_of, only_kind, parsed

_METRIC_KINDS: Mapping[str, StructureKind] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "json_object": "json_object",
}


def body_structure(body: SamplingFields) -> Structure | None:
    """Return the form that a body asks for, under whichever names.

    Raises:
        InvalidRequest: a form is wrong, or two of them differ.
    """
    return one_of([*_asked_for(body)])


def _asked_for(body: SamplingFields) -> Iterator[Structure | None]:
    yield response_format(body.response_format)
    yield structured_outputs(body.structured_outputs)
    aliases = {
        "json": body.guided_json,
        "regex": body.guided_regex,
        "choice": body.guided_choice,
        "grammar": body.guided_grammar,
    }
    for kind, value in aliases.items():
        if value is not None:
            yield structured(kind, value, f"guided_{kind}")
    if body.json_schema is not None:
        yield structured("json", body.json_schema, "json_schema")
    if body.grammar:  # llama.cpp's default is an empty text
        yield structured("grammar", body.grammar, "grammar")


def one_of(found: Sequence[Structure | None]) -> Structure | None:
    """Return the form that is given; several must be the same one.

    Raises:
        InvalidRequest: two of them differ.
    """
    given = [structure for structure in found if structure is not None]
    for other in given[1:]:
        if other.grammar != given[0].grammar:
            raise InvalidRequest(
                f"{other.param} and {given[0].param} ask for different forms of the answer; send one.",
                other.param,
            )
    return given[0] if given else None


def structured(kind: str, value: object, param: str) -> Structure:
    """Return the form that a field of `structured_outputs` asks for.

    Args:
        kind: one of KINDS.
        value: not None; for `json` a schema or its text.
        param: the field as the client's API names it.
    Raises:
        InvalidRequest: with `param`.
    """
    return Structure(_METRIC_KINDS[kind], grammar_of(kind, value, param), param)


def json_schema_format(name: str, description: str, schema: Mapping[str, object], place: str) -> Structure:
    """Return the form of OpenAI's `json_schema`, which the model is told of.

    Args:
        place: path of the object that has these fields.
    Raises:
        InvalidRequest: with `param`.
    """
    check_format_name(name, f"{place}.name")
    param = f"{place}.schema"
    grammar = grammars.json_schema(schema, param)
    return Structure("json_schema", grammar, param, ShownFormat(name, schema, description))


def response_format(asked: ResponseFormat | None) -> Structure | None:
    """Return the form that OpenAI's field asks for; None: any text.

    Raises:
        InvalidRequest: with `param`.
    """
    match asked:
        case JsonSchemaFormat(json_schema=it):
            return json_schema_format(
                it.name, it.description or "", it.schema_, "response_format.json_schema"
            )
        case JsonObjectFormat(schema_=None):
            return structured("json_object", True, "response_format")
        case JsonObjectFormat(schema_=schema):
            return structured("json", schema, "response_format.schema")
        case _:
            return None


def structured_outputs(asked: StructuredOutputs | None) -> Structure | None:
    """Return the form that vLLM's `structured_outputs` asks for.

    Raises:
        InvalidRequest: with `param`.
    """
    if asked is None:
        return None
    if asked.structural_tag is not None:
        raise InvalidRequest(
            "structured_outputs.structural_tag is not offered: use tools, or structured_outputs.grammar.",
            "structured_outputs.structural_tag",
        )
    if asked.disable_additional_properties:
        raise InvalidRequest(
            "structured_outputs.disable_additional_properties is not offered: write "
            "additionalProperties: false into the schema.",
            "structured_outputs.disable_additional_properties",
        )
    values = {
        "json": asked.json_,
        "regex": asked.regex,
        "choice": asked.choice,
        "grammar": asked.grammar,
        "json_object": asked.json_object or None,
    }
    return only(values, "structured_outputs")


def only(values: Mapping[str, object], param: str) -> Structure | None:
    """Return the form of `structured_outputs`.

    Args:
        values: by kind; None for what is not asked for.
    Raises:
        InvalidRequest: there is not exactly one.
    """
    kind = only_kind(values, param)
    return structured(kind, values[kind], f"{param}.{kind}")


def parsed_schema(text: str, param: str) -> dict[str, object]:
    """Return a JSON schema that was sent as a text.

    Raises:
        InvalidRequest: it is no JSON object.
    """
    schema = parsed(text, param)
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{param} must be the text of a JSON object.", param)
    return schema
