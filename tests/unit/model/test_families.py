from pathlib import Path

from lorax_shard.model.families import TESTED_FAMILIES

DOCUMENT = Path(__file__).parents[3] / "docs" / "models.md"


def test_the_document_lists_the_tested_families() -> None:
    section = DOCUMENT.read_text(encoding="utf-8").split("## Families")[1].split("(`shard/")[0]
    assert set(section.split("`")[1::2]) == TESTED_FAMILIES
