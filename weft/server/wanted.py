"""What form an answer must have, as OpenAI's and vLLM's clients say it. Knows JSON; knows nothing of requests."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, StringConstraints

from weft.errors import InputError
from weft.grammar import ANY_OBJECT
from weft.server.strict import Strict
from weft.speech.form import HEAD, of_choices, of_pattern, of_schema

MOST_FORM_CHARACTERS, MOST_CHOICES = 65536, 1024

Text = Annotated[str, StringConstraints(min_length=1, max_length=MOST_FORM_CHARACTERS)]
Choices = Annotated[list[Text], Field(min_length=1, max_length=MOST_CHOICES, fail_fast=True)]
Schema = dict[str, Any] | str


class AnswerShape(NamedTuple):
    """One of these: a JSON schema as text; a rule's right side; a whole grammar."""

    schema: str = ""
    rule: str = ""
    grammar: str = ""

    def as_rule(self) -> str:
        """As a part of a larger grammar. Raises `InputError` for what is a whole one."""
        if self.grammar:
            raise InputError("a grammar of one's own can't stand beside tools or thoughts; leave those out")
        return of_schema(json.loads(self.schema)) if self.schema else self.rule

    def alone(self) -> dict[str, str]:
        """As sampling parameters, where the answer is nothing else."""
        if self.schema:
            return {"json_schema": self.schema}
        return {"grammar": self.grammar or f"{HEAD}start: {self.rule}\n"}


class JsonSchema(Strict):
    """The schema of a `json_schema` response format."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def shape(self) -> AnswerShape | None:
        """None for free text. Raises `InputError`."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return AnswerShape(schema=ANY_OBJECT)
        if self.json_schema is None:
            raise InputError("response_format json_schema needs the field json_schema with a schema in it")
        return AnswerShape(schema=schema_text(self.json_schema.schema_))


class StructuredOutputs(Strict):
    """vLLM's: one of these."""

    json_: Schema | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None

    def shapes(self) -> list[AnswerShape]:
        """As many as there are. Raises `InputError`."""
        found = []
        if self.json_ is not None:
            found.append(AnswerShape(schema=schema_text(self.json_)))
        if self.json_object:
            found.append(AnswerShape(schema=ANY_OBJECT))
        if self.regex is not None:
            found.append(AnswerShape(rule=of_pattern(self.regex)))
        if self.choice is not None:
            found.append(AnswerShape(rule=of_choices(self.choice)))
        if self.grammar is not None:
            found.append(AnswerShape(grammar=_grammar(self.grammar)))
        return found


def _grammar(text: str) -> str:
    """Of llguidance's, of Lark's or of GBNF's form. Raises `InputError`."""
    if text.lstrip().startswith(HEAD.split()[0]):
        return text.lstrip()
    if "::=" not in text:
        return HEAD + text
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return HEAD + str(any_to_lark(text)).removeprefix(HEAD.strip())
    except Exception as error:  # it raises what its parser happens to
        reason = str(error).partition("\n")[0] or "it is not GBNF"
        raise InputError(f"the grammar can't be followed: {reason}") from None


def schema_text(schema: Schema) -> str:
    """As JSON text. Raises `InputError` for what is none."""
    try:
        given = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(given, allow_nan=False)
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError("the JSON schema holds half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise InputError("the JSON schema is nested too deeply to be followed; send a flatter one") from None
    except json.JSONDecodeError as error:
        raise InputError(f"the JSON schema is not JSON: {error}") from None
    except ValueError:
        raise InputError("the JSON schema holds NaN or Infinity, which are no numbers in JSON") from None
    if not isinstance(given, dict | bool):
        raise InputError("a JSON schema is an object, or true or false")
    if len(text) > MOST_FORM_CHARACTERS:
        raise InputError(f"the JSON schema has {len(text)} characters; at most {MOST_FORM_CHARACTERS} are taken")
    return text


def only(shapes: list[AnswerShape]) -> AnswerShape | None:
    """The one that there is, if any. Raises `InputError` where there are several."""
    if len(shapes) > 1:
        raise InputError("several forms of the answer are asked for; give one of response_format, structured_outputs "
                         "and guided_json, guided_regex, guided_choice, guided_grammar")  # fmt: skip
    return shapes[0] if shapes else None
