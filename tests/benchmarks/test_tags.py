"""The benchmark of tagged words: rows from labelled addresses, and the table."""

from __future__ import annotations

import json
from pathlib import Path

from results_tags import tags_section
from tags import addresses

SOURCE = b"""<AddressCollection>
  <AddressString><AddressNumber>12</AddressNumber> <StreetName>High</StreetName>
    <StreetName>Hill</StreetName></AddressString>
  <AddressString><PlaceName>New York,</PlaceName> <StateName>NY</StateName></AddressString>
  <AddressString></AddressString>
</AddressCollection>"""


def test_neighbours_with_one_label_are_a_span() -> None:
    assert list(addresses(SOURCE)) == [
        {"tokens": ["12", "High", "Hill"], "ner_tags": ["B-AddressNumber", "B-StreetName", "I-StreetName"]},
        {"tokens": ["New", "York,", "NY"], "ner_tags": ["B-PlaceName", "I-PlaceName", "B-StateName"]},
    ]


def test_the_table_has_what_the_files_hold(tmp_path: Path) -> None:
    assert tags_section(tmp_path) == ""
    (tmp_path / "tags").mkdir()
    scores = {"span_f1": 0.51234, "accuracy": 0.8, "nll": 0.7, "ece": 0.03, "aurc": 0.1}
    run = {
        "method": "melora", "seed": 0, "steps": 60, "training": {"steps": 60}, "rows": 304, "words": 1700,
        "scores": scores, "baseline": {"span_f1": 0.01, "accuracy": 0.12, "nll": 3.0},
        "label_scores": {"PlaceName": {}}, "sampled": {"samples": 10, "scores": {**scores, "nll": 0.65}},
    }  # fmt: skip
    (tmp_path / "tags" / "addresses-melora-0.json").write_text(json.dumps(run))
    table = tags_section(tmp_path)
    assert "1,700 words of 304 other addresses, 1 kinds of span, seed 0" in table
    assert "| always the most frequent tag | 0.010 | 0.120 | 3.000 | – | – |" in table
    assert "| Me-LoRA | 0.512 | 0.800 | 0.700 | 0.030 | 0.100 |" in table
    assert "| Me-LoRA, 10 samples | 0.512 | 0.800 | 0.650 |" in table
