"""The public surface is a list, and what is exported is that list."""

import importlib
import types

import pytest


@pytest.mark.parametrize(
    "name", ["decode", "decode.acceptance", "decode.drafters", "decode.models"]
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
