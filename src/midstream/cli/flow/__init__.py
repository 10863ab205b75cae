"""`midstream flow`: intrinsics and turns of the base model composed, one file a flow."""

import typer

from midstream.cli.flow.agent import agent
from midstream.cli.flow.best_of_n import best_of_n
from midstream.cli.flow.guarded import guarded
from midstream.cli.flow.majority import majority
from midstream.cli.flow.rag import rag
from midstream.cli.flow.repair import repair

app = typer.Typer(
    help="Programs of intrinsics and answers: retrieval turns, best of n, votes, repair, guards, agents.",
    no_args_is_help=True,
)
app.command("rag")(rag)
app.command("best-of-n")(best_of_n)
app.command("majority")(majority)
app.command("repair")(repair)
app.command("guarded")(guarded)
app.command("agent")(agent)
