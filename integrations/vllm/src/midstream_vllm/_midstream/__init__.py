"""midstream's modules as this package uses them; see `shared.py`. Built, not committed."""

from midstream_vllm.shared import find_in_checkout

find_in_checkout()
