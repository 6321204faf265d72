"""Write ``docs/api.md``, the reference of the public names, from their docstrings and signatures.

    python docs/reference.py

Only what the modules themselves say goes in; a test holds the page against what this script makes.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_origin

import sgd_probe
import sgd_probe.theory
from sgd_probe.curvature.pyhessian import hessian
from sgd_probe.integrations.huggingface import SGDProbeCallback

PAGE = Path(__file__).with_name("api.md")

_HEAD = """# API reference

Made from the docstrings by `python docs/reference.py`; change those, not this page. Everything else in the
package is its inside and may change at any time. [getting-started.md](getting-started.md) shows the names in
use, [metrics.md](metrics.md) what is logged.
"""

_SECTIONS = {"Args": "Arguments", "Attributes": "Attributes", "Returns": "Returns", "Raises": "Raises"}

#: What belongs together, in the order in which a reader meets it.
_GROUPS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("The probe", (sgd_probe.SGDProbe, sgd_probe.LoopProbe, SGDProbeCallback)),
    ("Configuration", (sgd_probe.ProbeConfig,)),
    (
        "Results",
        (
            sgd_probe.WindowResult,
            sgd_probe.ModeResult,
            sgd_probe.Verdict,
            sgd_probe.ModeKind,
            sgd_probe.CurvatureResult,
            sgd_probe.CostResult,
            sgd_probe.LagPoint,
            sgd_probe.Interval,
        ),
    ),
    ("Flags", (sgd_probe.Flag, sgd_probe.find_flags)),
    ("Weights & Biases", (sgd_probe.wandb_workspace,)),
    ("Theory", tuple(getattr(sgd_probe.theory, name) for name in sgd_probe.theory.__all__)),
    ("PyHessian's interface", (hessian,)),
)


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")


def render() -> str:
    """The whole page as Markdown."""
    parts = [_HEAD, *_contents()]
    for title, things in _GROUPS:
        parts.append(f"## {title}\n")
        if title == "Theory":
            parts.append(_prose(_sections(inspect.getdoc(sgd_probe.theory) or "")[""]))
        for thing in things:
            parts += _entry(thing)
    return "\n".join(parts).rstrip() + "\n"


def _contents() -> Iterator[str]:
    for title, things in _GROUPS:
        names = (f"[`{thing.__name__}`](#{thing.__name__.lower()})" for thing in things)
        yield f"- **{title}**: {', '.join(names)}"
    yield ""


def _home(thing: Any) -> str:
    """The module that users import it from."""
    for package in (sgd_probe, sgd_probe.theory):
        if thing.__name__ in package.__all__:
            return package.__name__
    return str(thing.__module__)


def _entry(thing: Any) -> Iterator[str]:
    name = thing.__name__
    kind = "function" if inspect.isfunction(thing) else "class"
    yield f"### {name}\n"
    yield f"*{kind}, `from {_home(thing)} import {name}`*\n"
    if isinstance(thing, type) and issubclass(thing, enum.Enum):
        yield _prose(_sections(inspect.getdoc(thing) or "")[""])
        yield "\n".join(f"- `{name}.{member.name}`: `{member.value!r}`" for member in thing) + "\n"
        return
    fields = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
    sections = _sections(_own_docstring(thing))
    if not fields:
        yield _signature(name, thing)
    yield _prose(sections.pop(""))
    for section, text in sections.items():
        if section in ("Args", "Attributes") and fields:
            yield _described("Fields", text, {f.name: _field_note(f, thing) for f in fields})
        else:
            yield _section(section, text, _parameter_notes(thing) if section == "Args" else {})
    if isinstance(thing, type):
        for attribute, member in _members(thing):
            yield from _member(name, attribute, member)


def _members(thing: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that the class defines, in the order of its source.

    What a trainer's own class has as well is a hook: the trainer calls it, not the reader.
    """
    hooks = {name for base in thing.__mro__[1:] for name in vars(base)}
    for attribute, member in vars(thing).items():
        hook = attribute in hooks or attribute.startswith("on_")
        if attribute[0] != "_" and not hook and inspect.isfunction(_function(member)):
            yield attribute, member


def _function(member: Any) -> Any:
    """What is behind a property or a class method."""
    return getattr(member, "__func__", getattr(member, "fget", member))


def _member(owner: str, attribute: str, member: Any) -> Iterator[str]:
    function = _function(member)
    sections = _sections(inspect.getdoc(function) or "")
    label = f"{owner}.{attribute}"
    if isinstance(member, property):
        yield f"#### `{label}`\n"
        yield f"*property, {_annotation(inspect.signature(function).return_annotation)}*\n"
    else:
        yield f"#### `{label}()`\n"
        yield _signature(label, function)
    yield _prose(sections.pop(""))
    for section, text in sections.items():
        yield _section(section, text, _parameter_notes(function) if section == "Args" else {})


def _own_docstring(thing: Any) -> str:
    """The docstring as written: dataclasses without one are given their signature, which is no text."""
    text = inspect.getdoc(thing) or ""
    return "" if text.startswith(f"{thing.__name__}(") else text


# --- signatures -----------------------------------------------------------------------------------------


def _signature(name: str, thing: Callable[..., Any]) -> str:
    """The call on one line where it fits, else a parameter a line."""
    found = inspect.signature(thing)
    parameters = [p for p in found.parameters.values() if p.name not in ("self", "cls")]
    shown: list[str] = []
    keyword_only = False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            shown.append("*")
        prefix = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
        prefix = "**" if parameter.kind is parameter.VAR_KEYWORD else prefix
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        shown.append(f"{prefix}{parameter.name}{default}")
    returns = "" if isinstance(thing, type) else f" -> {_type(found.return_annotation)}"
    line = f"{name}({', '.join(shown)}){returns}"
    if len(line) > 100:
        wrapped = textwrap.fill(", ".join(shown), 92, initial_indent="    ", subsequent_indent="    ")
        line = f"{name}(\n{wrapped},\n){returns}"
    return f"```text\n{line}\n```\n"


def _type(annotation: Any, owner: Any = None) -> str:
    """An annotation as text: modules dropped from its names, a name for some literals replaced by them."""
    if annotation is inspect.Parameter.empty:
        return "Any"
    alias = getattr(sys.modules.get(getattr(owner, "__module__", "")), str(annotation), None)
    annotation = alias if get_origin(alias) is Literal else annotation
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:\w+\.)+(\w)", r"\1", text)


def _annotation(annotation: Any, owner: Any = None) -> str:
    return f"`{_type(annotation, owner)}`"


def _parameter_notes(thing: Callable[..., Any]) -> dict[str, str]:
    notes = {}
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.annotation is not parameter.empty:
            notes[parameter.name] = _annotation(parameter.annotation, thing)
    return notes


def _field_note(field: dataclasses.Field[Any], owner: type) -> str:
    """Type and default of a field."""
    note = _annotation(field.type, owner)
    if field.default is not dataclasses.MISSING:
        return f"{note}, default `{field.default!r}`"
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        plain = f"{type(made).__name__}()" if dataclasses.is_dataclass(made) else repr(made)
        return f"{note}, default `{'Interval.unknown()' if isinstance(made, sgd_probe.Interval) else plain}`"
    return note


# --- docstrings -----------------------------------------------------------------------------------------


def _sections(docstring: str) -> dict[str, str]:
    """A Google-style docstring by section; the text before the first one is under ""."""
    found: dict[str, list[str]] = {"": []}
    current = ""
    for line in docstring.splitlines():
        heading = line.removesuffix(":")
        if line.endswith(":") and heading in _SECTIONS:
            current = heading
            found[current] = []
        else:
            found[current].append(line)
    return {name: textwrap.dedent("\n".join(lines)).strip("\n") for name, lines in found.items()}


def _section(section: str, text: str, notes: dict[str, str]) -> str:
    if section == "Returns":
        return f"**Returns** {_flow(text)}\n"
    return _described(_SECTIONS[section], text, notes)


def _described(title: str, text: str, notes: dict[str, str]) -> str:
    """``name: meaning`` entries, whose further lines are indented, as a list."""
    items: list[tuple[str, str]] = []
    for line in text.splitlines():
        if line[:1].strip():
            name, colon, rest = line.partition(":")
            if not colon:
                raise ValueError(f"expected `name: meaning` under {title}, found {line!r}")
            items.append((name, rest.strip()))
        elif line.strip():
            items[-1] = (items[-1][0], f"{items[-1][1]} {line.strip()}")
    lines = [f"**{title}**\n"]
    for name, meaning in items:
        note = f" ({notes[name]})" if name in notes else ""
        lines.append(f"- `{name}`{note}: {_inline(meaning)}")
    return "\n".join(lines) + "\n"


def _prose(text: str) -> str:
    """Paragraphs, lists and ``::`` blocks of code; lines are joined, since Markdown wraps by itself."""
    out: list[str] = []
    code = False
    for paragraph in re.split(r"\n\s*\n", text):
        if code and paragraph.startswith(" "):
            out.append(f"```python\n{textwrap.dedent(paragraph)}\n```")
            continue
        code = paragraph.endswith("::")
        paragraph = paragraph.removesuffix("::").rstrip()
        if not paragraph:
            continue
        if paragraph.startswith(("* ", "- ")):
            items = re.split(r"\n(?=[*-] )", paragraph)
            out.append("\n".join(f"- {_flow(item[2:])}" for item in items))
        else:
            out.append(_flow(paragraph))
    return "\n\n".join(out) + "\n"


def _flow(text: str) -> str:
    return _inline(" ".join(line.strip() for line in text.splitlines()))


def _inline(text: str) -> str:
    """Roles and double backticks to Markdown's code; what it would read as markup outside of that escaped."""
    text = re.sub(r":\w+:`~(?:\w+\.)*(\w+)`", r"``\1``", text)
    text = re.sub(r":\w+:`([\w.]+)`", r"``\1``", text)
    parts = re.split(r"(``.+?``|`[^`]+`)", text)
    for index, part in enumerate(parts):
        parts[index] = f"`{part.strip('`')}`" if index % 2 else re.sub(r"([*<])", r"\\\1", part)
    return "".join(parts)


if __name__ == "__main__":
    main()
