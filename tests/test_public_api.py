"""The public surface is a list, and what is exported is that list."""

import importlib
import subprocess
import sys
import types

import pytest


@pytest.mark.parametrize(
    "name", ["decode.acceptance", "decode.drafters", "decode.models", "decode.suffix"]
)
def test_all_lists_exactly_what_is_exported(name: str) -> None:
    module = importlib.import_module(name)
    exported = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert sorted(module.__all__) == sorted(exported)
    assert len(set(module.__all__)) == len(module.__all__)


def test_the_runtime_exports_what_it_lists_and_imports_it_when_asked() -> None:
    import decode

    for name in decode.__all__:
        assert getattr(decode, name) is not None
    assert decode.__all__ == sorted(set(decode.__all__))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        decode.nothing_of_the_kind  # noqa: B018
    code = "import sys, decode.suffix; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
