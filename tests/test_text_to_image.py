"""The example of text to image runs and goes on, and its scenes are what their captions say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")


def test_scenes_are_what_their_captions_say():
    """Each digit on its side, dark ones by the factor; both captions name the same four facts; pairs are held out."""
    import captioned_scenes as example

    (images, labels), (others, _) = example.halves()
    assert not {tuple(x.flatten().tolist()) for x in images} & {tuple(x.flatten().tolist()) for x in others}
    x, facts = example.scenes(images, labels, 200, 0, held_out=False)
    again, same = example.scenes(images, labels, 200, 0, held_out=False)
    assert torch.equal(x, again)
    assert torch.equal(facts, same)
    brightest = torch.stack([half.flatten(1).amax(1) for half in x.split(example.SIDE, -1)], 1)
    light = facts[:, 1::2] == 0
    assert torch.equal(brightest > 2 * example.DARK - 1 + 1e-6, light)
    pairs = {(a, b) for a, _, b, _ in facts.tolist()}
    assert not pairs & example.HELD_OUT
    held = {(a, b) for a, _, b, _ in example.scenes(images, labels, 200, 0, held_out=True)[1].tolist()}
    assert held == example.HELD_OUT
    for side in (0, 1):  # each digit is held out twice on either side
        assert sorted(pair[side] for pair in example.HELD_OUT) == sorted(2 * list(range(10)))
    for row in facts[:50].tolist():
        found = []
        for text in example.sentences(row):
            (_, a), (_, b) = words = re.findall(r"a (dark )?(\w+?)(?= |$)", text)
            sides = [(example.NUMBERS.index(a), bool(words[0][0])), (example.NUMBERS.index(b), bool(words[1][0]))]
            found.append(sides if " left of " in text else sides[::-1])
        assert found[0] == found[1] == [(row[0], bool(row[1])), (row[2], bool(row[3]))]


def test_it_runs_goes_on_and_its_laws_hold(tmp_path, monkeypatch, capsys):
    import text_to_image as example

    monkeypatch.setattr(example, "WEIGHTS", (1.0, 3.0))
    monkeypatch.setattr(example, "STRENGTHS", (0.5, 1.0))
    monkeypatch.setattr(example, "SHOWN", 2)
    few = [
        "--tokens",
        "bytes",
        "--scenes",
        "128",
        "--clip-steps",
        "1",
        "--reader-steps",
        "1",
        "--images",
        "8",
        "--nfe",
        "2",
    ]
    where = ["--out", str(tmp_path), "--models", str(tmp_path / "models")]
    example.main([*few, *where, "--train-steps", "1"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(results["laws"].values())
    assert len(results["laws"]) == 5
    assert [(row["way"], row["strength"]) for row in results["rows"]] == [
        ("real", None), ("weight", 1), ("weight", 3), ("CLIP", 0.5), ("CLIP", 1)]  # fmt: skip
    assert "DOES NOT HOLD" not in (tmp_path / "README.md").read_text()
    assert (tmp_path / "text_to_image.png").stat().st_size > 10_000
    capsys.readouterr()
    with pytest.warns(UserWarning, match="from here on the learning rate goes down"):
        example.main([*few, *where, "--train-steps", "2"])
    out = capsys.readouterr().out
    assert "step 1 to 2" in out
    assert out.count("training on") == 1


def test_it_takes_images_and_captions_of_ones_own(tmp_path):
    import text_to_image as example

    from scoresde.pictures import write_png

    for i in range(3):
        write_png(tmp_path / f"{i}.png", torch.full((1, 12, 12), 80 * i, dtype=torch.uint8))
    (tmp_path / "captions.txt").write_text("black\ndark\nbright, and of more letters than a caption of digits has\n")
    steps = ["--train-steps", "1", "--clip-steps", "1", "--nfe", "1"]
    where = ["--out", str(tmp_path / "out"), "--models", str(tmp_path / "models")]
    example.main(
        ["--data", str(tmp_path), "--size", "8", "8", "--tokens", "bytes", *steps, *where, "--text", "dark", "bright"]
    )
    assert (tmp_path / "out" / "text_to_image.png").stat().st_size > 5_000
