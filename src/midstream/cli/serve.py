"""`midstream serve`. Flags, environment and configuration file have one list: the fields of ServerConfig."""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from midstream.config import ServerConfig
from midstream.errors import InputError


def command() -> Callable[..., None]:
    """The function behind `midstream serve`, with one option for each field."""

    def serve(config: Path | None, **given: Any) -> None:
        # torch and transformers take seconds to import; a wrong flag is answered at once.
        settings = read_settings(config, {name: value for name, value in given.items() if value not in (None, [])})
        from midstream.server.run import serve as run

        run(settings, progress=sys.stderr.isatty())

    options = [_option(name, field) for name, field in ServerConfig.model_fields.items()]
    file = typer.Option("--config", help="YAML file with any of these settings; flags and environment go before it.")
    first = _parameter("config", Annotated[Path | None, file])
    parameters = [first, *options]
    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    serve.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    serve.__doc__ = (
        "Serve the model, its adapters and the playground over HTTP, in OpenAI's format.\n\n"
        "Every flag is also an environment variable and a key of the --config file."
    )
    return serve


def read_settings(file: Path | None, given: Mapping[str, Any]) -> ServerConfig:
    """Settings from a file and, before it, what was given. Raises InputError that names what is wrong."""
    try:
        return ServerConfig.model_validate({**(_file(file) if file is not None else {}), **given})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
        raise InputError(wrong) from error


def settings_table() -> str:
    """All settings as a Markdown table, for docs/server.md."""
    lines = ["| flag | what |", "|---|---|", "| `--config FILE` | YAML file with any of these settings |"]
    for name, field in ServerConfig.model_fields.items():
        kind, many = _plain(field.annotation)
        lines.append(f"| `{_flag(name, many)}` | {_help(field, kind)} |")
    return "\n".join(lines)


def _file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path} is not a mapping of settings")
    return {key.replace("-", "_"): value for key, value in content.items()}


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    kind, many = _plain(field.annotation)
    flag = _flag(name, many)
    flags = (flag, flag.replace("--", "--no-", 1)) if kind is bool else (flag,)
    declared = "/".join(flags)
    option = typer.Option(declared, envvar=f"MIDSTREAM_SERVE_{name.upper()}", help=_help(field, kind))
    return _parameter(name, Annotated[list[kind] | None if many else kind | None, option])  # type: ignore[valid-type]


def _flag(name: str, many: bool) -> str:
    return "--" + (name.removesuffix("s") if many else name).replace("_", "-")


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _help(field: FieldInfo, kind: Any) -> str:
    text = field.description or ""
    if field.default in (None, ()) or kind is Path:
        return text
    shown = ("on" if field.default else "off") if kind is bool else field.default
    return f"{text} [default: {shown}]"


def _plain(annotation: Any) -> tuple[Any, bool]:
    """The type that a flag reads, and whether it may be given several times."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _plain(arguments[0])
    if origin is tuple:
        return _plain(arguments[0])[0], True
    if origin in (typing.Union, types.UnionType):
        return _plain(next(each for each in arguments if each is not type(None)))
    return (str if annotation is SecretStr else annotation), False
