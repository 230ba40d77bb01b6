"""``python tools/gallery.py``: the pictures of README.md and the documentation, from the experiments' own plots.

Trains each experiment below, unless its run folder is there, and scales one of its plots into ``docs/images``; all of
them beside each other are ``docs/images/overview.png``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT, GAP = 480, 300, 20


class Picture(NamedTuple):
    title: str
    experiment: str
    plot: str


PICTURES = {
    "tfno": Picture("Darcy flow by a tensorized FNO", "tfno_darcy", "plots/darcy_16.png"),
    "tensor_attention": Picture("Match3, by one layer", "match3_xor", "plots/accuracy.png"),
    "gaunt": Picture("Forces in an alloy", "gaunt_potential", "plots/parity.png"),
    "maestro": Picture("One training, models of every size", "maestro_digits", "plots/frontier.png"),
    "ring_attention": Picture("Length against ranks", "max_sequence", "max_sequence.png"),
    "separable_conv": Picture("A wave, eight snapshots ahead", "separable_wave", "plots/waves.png"),
    "polynomial": Picture("Graphs told apart", "polynomial_expressivity", "polynomial_expressivity.png"),
}


def plot_of(picture: Picture, runs: Path) -> Path:
    """The plot, after a run where there is none."""
    folder = runs / picture.experiment
    found = folder / picture.plot
    if not found.is_file():
        command = [sys.executable, "train.py", f"experiment={picture.experiment}", f"run_dir={folder}"]
        subprocess.run(command, cwd=ROOT, check=True)
    return found


def thumbnail(plot: Path) -> Image.Image:
    """The plot, whole, on a white card of the gallery's size."""
    with Image.open(plot) as image:
        drawn = image.convert("RGB")
    drawn.thumbnail((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    card = Image.new("RGB", (WIDTH, HEIGHT), "white")
    card.paste(drawn, ((WIDTH - drawn.width) // 2, (HEIGHT - drawn.height) // 2))
    return card


def overview(cards: dict[str, Image.Image], columns: int = 4) -> Image.Image:
    """All cards with their titles."""
    caption, rows = 34, -(-len(cards) // columns)
    sheet = Image.new("RGB", (columns * (WIDTH + GAP), rows * (HEIGHT + caption + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(22)
    for place, (name, card) in enumerate(cards.items()):
        row, column = divmod(place, columns)
        # A last row that is not full stands in the middle.
        inset = (columns - min(columns, len(cards) - row * columns)) * (WIDTH + GAP) // 2
        x, y = inset + column * (WIDTH + GAP) + GAP // 2, row * (HEIGHT + caption + GAP)
        pen.text((x + WIDTH // 2, y + caption // 2), PICTURES[name].title, fill="#222222", font=font, anchor="mm")
        sheet.paste(card, (x, y + caption))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "gallery", help="folder of the run folders")
    options = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    cards = {}
    for name, picture in PICTURES.items():
        cards[name] = thumbnail(plot_of(picture, options.runs.resolve()))
        cards[name].quantize(128).save(IMAGES / f"{name}.png", optimize=True)
    overview(cards).quantize(192).save(IMAGES / "overview.png", optimize=True)


if __name__ == "__main__":
    main()
