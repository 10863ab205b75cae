"""The `midstream` command: one verb per file."""

from __future__ import annotations

import sys

import typer

from midstream.cli import adapters, call, chat, complete, demo, models, train
from midstream.errors import InputError, MidstreamError

app = typer.Typer(
    name="midstream",
    help="Adapters that switch on mid-conversation and reuse the base model's KV cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo.demo)
app.command()(chat.chat)
app.command()(complete.complete)
app.command()(call.call)
app.command()(train.train)
app.add_typer(adapters.app, name="adapters")
app.add_typer(models.app, name="models")


def main() -> None:
    """Run the command line. Errors are one line on standard error; status 2 for bad input, 1 for a failure."""
    try:
        app(standalone_mode=True)
    except MidstreamError as error:
        print(f"midstream: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
