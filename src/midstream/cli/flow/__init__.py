"""`midstream flow`: intrinsics and turns of the base model composed, one file a flow."""

import typer

from midstream.cli.flow import rag

app = typer.Typer(
    help="Programs of intrinsics and answers: retrieval turns, best of n, repair, agents.", no_args_is_help=True
)
app.command("rag")(rag.rag)
