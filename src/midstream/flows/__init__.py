"""Flows: intrinsics and base turns composed.

Each is `async def flow(backend, conversation, ..., settings, *, run) -> Result`, over any Backend. A `Run` sets limits,
listens and cancels; whatever stops a flow, its result has what was found up to then.
"""

from midstream.flows.agent import AgentRun, AgentSettings, agent, agent_tool
from midstream.flows.agent_step import AgentStep
from midstream.flows.best_of_n import BestOfN, BestOfNSettings, Point, best_of_n
from midstream.flows.calculator import calculator
from midstream.flows.draft import Drawn
from midstream.flows.draw import Candidate
from midstream.flows.events import Call, Decision, Event
from midstream.flows.flow_tools import intrinsic_tool, search
from midstream.flows.guarded import Guarded, GuardSettings, guarded
from midstream.flows.majority import (
    Group,
    Majority,
    MajoritySettings,
    WeightedMajoritySettings,
    majority,
    weighted_majority,
)
from midstream.flows.rag import RagSettings, RagTurn, rag_turn
from midstream.flows.repair import Attempt, Repair, RepairSettings, repair
from midstream.flows.replay import ReplayBackend
from midstream.flows.requirements import Requirement, Verdict
from midstream.flows.run import FlowResult, Run
from midstream.flows.scorers import Scorer
from midstream.flows.tools import FlowTool, Observation, Place, Tool, tool
from midstream.flows.trace import Recorder, Trace

__all__ = [
    "AgentRun",
    "AgentSettings",
    "AgentStep",
    "Attempt",
    "BestOfN",
    "BestOfNSettings",
    "Call",
    "Candidate",
    "Decision",
    "Drawn",
    "Event",
    "FlowResult",
    "FlowTool",
    "Group",
    "GuardSettings",
    "Guarded",
    "Majority",
    "MajoritySettings",
    "Observation",
    "Place",
    "Point",
    "RagSettings",
    "RagTurn",
    "Recorder",
    "Repair",
    "RepairSettings",
    "ReplayBackend",
    "Requirement",
    "Run",
    "Scorer",
    "Tool",
    "Trace",
    "Verdict",
    "WeightedMajoritySettings",
    "agent",
    "agent_tool",
    "best_of_n",
    "calculator",
    "guarded",
    "intrinsic_tool",
    "majority",
    "rag_turn",
    "repair",
    "search",
    "tool",
    "weighted_majority",
]
