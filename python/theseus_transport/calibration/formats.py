"""Formats of training data: which one a record is in, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

Message = dict[str, Any]  # role, content (a string), and what else a chat template may read
Template = Callable[[list[Message], Any], str]  # messages and tools -> text
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
         "function_call": "assistant", "observation": "tool", "function_response": "tool"}  # of ShareGPT  # fmt: skip
WHOLE = ("text", "messages", "conversations")  # of these a record holds one


class Example(NamedTuple):
    """What a record says: a text, or a chat with its tools; `format` is the name of the format it is in."""

    format: str
    said: str | list[Message]
    tools: Any = None

    def text(self, template: Template | None = None) -> str:
        """The example as one text: a chat through `template`, or as `role: content`; ValueError if that refuses it."""
        if isinstance(self.said, str):
            return self.said
        if template is None:
            told = [{"role": "tools", "content": json.dumps(self.tools)}] if self.tools else []
            return "\n".join(f"{m['role']}: {' '.join(_words(m))}" for m in [*told, *self.said])
        return template(self.said, self.tools)


def read_example(record: Any) -> Example:
    """A record of a known format; ValueError says what is wrong with one that is not.

    `text`; OpenAI `messages` with tool calls and content parts; ShareGPT `conversations` of from and value; Alpaca
    `instruction`, `input` and `output`; `prompt` and `completion`, or `chosen`, each a string or messages.
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {_kind(record)}")
    found = [key for key in WHOLE if key in record]
    if len(found) > 1:
        raise ValueError(f"it has {' and '.join(found)}, expected an object with either; keep one")
    tools = record.get("tools")
    if found == ["text"]:
        return Example("text", _string(record, "text"))
    if found:
        key, name = found[0], "messages" if found == ["messages"] else "ShareGPT"
        return Example(name, [*_system(record), *_messages(record[key], key)], _parsed(tools))
    if "instruction" in record and "output" in record:
        asked = [_string(record, key) for key in ("instruction", "input") if record.get(key)]
        before = [turn for pair in record.get("history") or [] for turn in _exchange(*_pair(pair))]
        return Example("Alpaca", [*_system(record), *before, *_exchange("\n\n".join(asked), _string(record, "output"))])
    for key in ("completion", "chosen"):
        if key in record and ("prompt" in record or key == "chosen"):
            return Example(f"prompt and {key}", _continued(record.get("prompt"), record[key], key), _parsed(tools))
    if "input_ids" in record:
        raise ValueError(
            "it holds input_ids, which are of one tokenizer; give the text, or a .safetensors with input_ids "
            "[n, tokens]: rows of one length, shorter ones padded, with an attention_mask"
        )
    raise ValueError(
        "expected an object with either text, messages, conversations (ShareGPT), instruction and output (Alpaca), "
        f"prompt and completion, or prompt and chosen; it has {', '.join(map(str, record)) or 'nothing'}"
    )


def read_prompt(record: Any) -> Example:
    """What a record asks: a text to go on with, or a chat without the answers it ends in; ValueError as `read_example`.

    A `prompt`, an `instruction` or messages need no answer beside them.
    """
    if isinstance(record, dict) and "prompt" in record:
        given = record["prompt"]
        said = given if isinstance(given, str) else _messages(given, "prompt")
        example = Example("prompt", said, _parsed(record.get("tools")))
    else:
        asked = {"output": ""} if isinstance(record, dict) and "instruction" in record else {}
        example = read_example({**record, **asked} if asked else record)
    if isinstance(example.said, str):
        return example
    turns = [*example.said]
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        raise ValueError("it has no turn that asks for an answer")
    return example._replace(said=turns)


def _continued(prompt: Any, answer: Any, key: str) -> str | list[Message]:
    """A prompt and what follows it: strings, messages, or a string and messages."""
    if isinstance(answer, str) and isinstance(prompt, str | None):
        return (prompt or "") + answer
    turns = {
        name: [{"role": role, "content": given}] if isinstance(given, str) else _messages(given, name)
        for name, given, role in (("prompt", prompt, "user"), (key, answer, "assistant"))
        if given is not None
    }
    asked, replied = turns.get("prompt", []), turns[key]
    return replied if replied[: len(asked)] == asked else asked + replied  # some repeat the prompt in the answer


def _messages(given: Any, key: str) -> list[Message]:
    if not isinstance(given, list) or not given or not all(isinstance(turn, dict) for turn in given):
        raise ValueError(f"{key} must be a list of objects with role and content")
    return [_message(turn, key) for turn in given]


def _message(turn: dict[str, Any], key: str) -> Message:
    """With `role` and `content`, which ShareGPT calls `from` and `value`."""
    names = ("from", "value") if "from" in turn else ("role", "content")
    role, content = (turn.get(name) for name in names)
    if not isinstance(role, str):
        raise ValueError(f"{key} must be a list of objects with {names[0]} and {names[1]}; one has {', '.join(turn)}")
    calls = turn.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ValueError(f"tool_calls of {key} is {_kind(calls)}, expected a list of objects")
    if isinstance(content, list):
        content = "\n".join(_part(part, names[1]) for part in content)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"{names[1]} of {key} is {_kind(content)}, expected a string or parts of text")
    rest = {name: value for name, value in turn.items() if name not in names and value is not None}
    message = {**rest, "role": ROLES.get(role, role) if names[0] == "from" else role, "content": content}
    return message | ({"tool_calls": [_called(call) for call in calls]} if calls else {})


def _part(part: Any, name: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else "text"
    text = part.get("text") if isinstance(part, dict) else part
    if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
        raise ValueError(f"{name} holds a part of type {kind!r}; only text can be read")
    return text


def _called(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as an object, which templates expect, where they are given as its JSON."""
    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        return {**call, "function": {**function, "arguments": _parsed(function["arguments"])}}
    return call


def _words(message: Message) -> list[str]:
    """Of a message without a template: its content and its tool calls."""
    calls = [json.dumps(call.get("function", call)) for call in message.get("tool_calls", [])]
    return [part for part in (message["content"], *calls) if part]


def _system(record: dict[str, Any]) -> list[Message]:
    return [{"role": "system", "content": _string(record, "system")}] if record.get("system") else []


def _exchange(asked: str, answered: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _pair(pair: Any) -> tuple[str, str]:
    if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
        raise ValueError("history must be a list of pairs of strings")
    return pair[0], pair[1]


def _string(record: dict[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise ValueError(f"{key} is {_kind(record[key])}, expected a string")
    return str(record[key])


def _parsed(given: Any) -> Any:
    """JSON where a string is some."""
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return given


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
