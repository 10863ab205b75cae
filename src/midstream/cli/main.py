"""The `midstream` command: one verb per file."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from midstream.cli import adapters, bench, call, chat, complete, demo, eval, flow, models, sample, serve, train
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
app.command("eval")(eval.evaluate)
app.command()(sample.sample)
app.command()(bench.bench)
app.command("serve")(serve.command())
app.add_typer(adapters.app, name="adapters")
app.add_typer(models.app, name="models")
app.add_typer(flow.app, name="flow")


def main() -> None:
    """Run the command line. Errors are one line on standard error; status 2 for bad input, 1 for a failure."""
    try:
        status = app(standalone_mode=False)
    except MidstreamError as error:
        _fail(str(error), 2 if isinstance(error, InputError) else 1)
    except TyperException as error:
        # A wrong option or argument; without a message the help has been shown in its place.
        message = getattr(error, "format_message", error.__str__)()
        _fail(message, 2) if message else sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> NoReturn:
    print(f"midstream: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
