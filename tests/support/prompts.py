"""A fixed suite of prompts of 5 to 3,000 tokens, from text that does not change: the licence, and a few
lines in other scripts, code and numbers."""

from __future__ import annotations

from pathlib import Path

LENGTHS = [5, 6, 8, 10, 12, 15, 17, 19, 24, 30, 31, 32, 33, 47, 60, 64, 75, 95, 120, 150, 190, 240]
LENGTHS += [256, 300, 480, 512, 760, 1200, 1900, 3000]
"""30 lengths; around block (16) and chunk (512) borders on purpose."""

SNIPPETS = [
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "Der Fluss fließt langsam durch das Tal, und am Ufer sitzen drei alte Männer. ",
    "東京は日本の首都です。人口は約1400万人です。",
    "The sum of 127 and 348 is 475. The product of 12 and 12 is 144. ",
    "Once upon a time there was a small robot that wanted to learn how to paint. ",
    "😀 Emoji, naïve café, Ελληνικά, русский текст, and some ASCII. ",
]


def text() -> str:
    """About 20,000 characters: snippets, then the licence, twice over."""
    licence = (Path(__file__).resolve().parents[2] / "LICENSE").read_text()
    return ("".join(SNIPPETS) + licence) * 2


def suite(ids: list[int]) -> list[list[int]]:
    """Windows of the tokenized `text()`, one per length, from different places."""
    windows = []
    for number, length in enumerate(LENGTHS):
        start = (number * 37) % (len(ids) - length)
        windows.append(ids[start : start + length])
    return windows
