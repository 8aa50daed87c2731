"""A sample that loses captions says the same in all its members, and every other member stays as it was."""

import json
from pathlib import Path

from data.filter.write import write_kept
from tests.data.filter.by_webdataset import read_by_webdataset
from tests.data.small_shards import picture, write_shard


def test_txt_and_json_hold_only_captions_that_were_kept(tmp_path: Path) -> None:
    def one(number: int, txt: str, captions: list[str]) -> dict[str, bytes | str | int]:
        fields = json.dumps({"captions": captions, "url": "u"})
        return {"__key__": f"{number:03d}", "jpg": picture(number), "txt": txt, "json": fields, "cls": number}

    samples = [one(0, "bad", ["bad", "good"]), one(1, "good ", ["bad", "good"]), one(2, "other", ["a", "b"])]
    shard = write_shard(tmp_path / "a.tar", samples)
    write_kept(str(shard), {0: {1}, 1: {1}, 2: {0, 1}}, tmp_path / "b.tar")
    first, second, third = read_by_webdataset(tmp_path / "b.tar")
    assert (first["txt"], json.loads(first["json"])) == (b"good", {"captions": ["good"], "url": "u"})
    assert (second["txt"], json.loads(second["json"])["captions"]) == (b"good ", ["good"])
    assert (third["txt"], third["json"]) == (b"other", str(samples[2]["json"]).encode())
    assert [one["jpg"] for one in (first, second, third)] == [picture(n) for n in range(3)]
