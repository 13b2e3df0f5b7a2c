"""vLLM's suffix method, which imports arctic-inference, on this index."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

from decode.suffix.cache import SuffixDecodingCache
from decode.suffix.drafts import SuffixDraft

PACKAGE = "arctic_inference"
MODULE = f"{PACKAGE}.suffix_decoding"


def install_for_vllm(*, replace: bool = False) -> bool:
    """Let `arctic_inference.suffix_decoding` be this package, in this process.

    vLLM calls it in each of its processes, as a plug-in (`vllm.general_plugins`); where
    arctic-inference is installed that changes nothing.

    Args:
        replace: stand in for an installed arctic-inference too.

    Returns:
        Whether this package stands in.
    """
    if isinstance(sys.modules.get(MODULE), _StandIn):
        return True
    installed = find_spec(PACKAGE) is not None
    if installed and not replace:
        return False
    if not installed:
        package = sys.modules[PACKAGE] = _StandIn(PACKAGE)
        package.__path__ = []
    module = sys.modules[MODULE] = _StandIn(MODULE)
    vars(module).update(SuffixDecodingCache=SuffixDecodingCache, SuffixDecodingDraft=SuffixDraft)
    return True


class _StandIn(ModuleType):
    """A module without a file."""

    def __init__(self, name: str):
        super().__init__(name, "Draftsmith's, in place of arctic-inference's.")
        self.__spec__ = ModuleSpec(name, None)  # vLLM asks for it to see whether it is installed
