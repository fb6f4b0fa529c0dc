"""The reader of CamVid's layout: photos, labels, and the split into training and validation."""

from pathlib import Path

import pytest
from PIL import Image

from deployment.export.dataset import label_of, list_photos, split_photos

NAMES = ["b.png", "a.JPG", "d.e.png", "c.tiff", "f g.webp"]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for name in [*NAMES, "notes.txt", "._b.png"]:  # macOS writes the last
        (tmp_path / "images" / name).touch()
    return tmp_path


def test_lists_the_photos_of_either_layout(folder):
    expected = ["a.JPG", "b.png", "c.tiff", "d.e.png", "f g.webp"]
    assert [p.name for p in list_photos(folder)] == expected
    assert list_photos(folder / "images") == list_photos(str(folder))


def test_a_label_lies_beside():
    assert label_of(Path("x/images/0001.jpg")) == Path("x/labels/0001_P.png")
    assert label_of(Path("x/images/0001.jpg"), Path("y")) == Path("y/0001_P.png")


@pytest.mark.parametrize(
    "listing",
    [
        "b.png\nd.e.png\nf g.webp\n",
        "b\nd.e\nf g\n",
        "b\r\nd.e.png\r\n\r\nf g.webp",
        "  b.png\nd.e\nf g\nno such photo\n",
        "\ufeffb.png\nd.e.png\nf g.webp\n",
    ],
    ids=["names", "stems", "both", "more", "Excel"],
)
def test_valid_txt_has_names_or_stems(listing, folder):
    (folder / "valid.txt").write_text(listing, encoding="utf-8", newline="")
    train, valid = split_photos(folder)
    assert [p.name for p in train] == ["a.JPG", "c.tiff"]
    assert [p.name for p in valid] == ["b.png", "d.e.png", "f g.webp"]


@pytest.mark.parametrize(("listing", "n_valid"), [("", 0), ("a\nb\nc\nd.e\nf g\n", 5)])
def test_either_part_may_be_empty(listing, n_valid, folder):
    (folder / "valid.txt").write_text(listing)
    train, valid = split_photos(folder)
    assert (len(train), len(valid)) == (5 - n_valid, n_valid)


@pytest.mark.parametrize("n", [1, 4, 5, 23, 100])
def test_without_a_list_it_is_fastai_s_random_fifth(n, tmp_path):
    from fastai.data.transforms import RandomSplitter

    for i in range(n):
        Image.new("L", (1, 1)).save(tmp_path / f"{i:03}.png")
    photos = list_photos(tmp_path)
    train, valid = split_photos(tmp_path)
    expected = RandomSplitter(0.2, seed=42)(photos)
    assert [sorted(photos[i] for i in part) for part in expected] == [train, valid]
    assert not {*train} & {*valid} and len(train) + len(valid) == n
