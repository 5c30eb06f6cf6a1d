"""What the page shows in each language belongs to the nodes as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import write_locales

LANGUAGES = sorted(path.name for path in write_locales.LOCALES.iterdir())
SPECIAL = set("{}@|")  # vue-i18n, which the page uses, takes them for its own syntax


def read(language: str) -> dict[str, Any]:
    return json.loads((write_locales.LOCALES / language / write_locales.FILE).read_text(encoding="utf-8"))


def sentences(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        for part in content.values():
            yield from sentences(part)
    else:
        yield content


def test_english_is_what_the_nodes_say():
    found = read("en")
    assert found == write_locales.definitions(), "run: python -m scripts.write_locales"


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_has_the_keys_of_the_nodes_and_no_syntax(language):
    known, found = write_locales.definitions(), read(language)
    for name in set(found) & set(known):  # another branch's node may be translated before it is there
        definition = found[name]
        assert set(definition) == {"display_name", "description", "inputs", "outputs"}
        assert set(definition["inputs"]) <= set(known[name]["inputs"])
        assert set(definition["outputs"]) <= set(known[name]["outputs"])
    assert not SPECIAL & set("".join(sentences(found)))


def test_there_is_chinese_of_every_node():
    """A new node in Chinese: its name at least, or it is shown in English among Chinese ones."""
    assert set(write_locales.definitions()) <= set(read("zh"))
    assert LANGUAGES == ["en", "zh"]
