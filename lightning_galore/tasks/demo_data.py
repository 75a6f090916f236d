# SPDX-License-Identifier: Apache-2.0
"""Movie-review sentences with human sentiment ratings, out of the source release of vaderSentiment (MIT).

The release holds 10,605 sentences, each with the mean of about 20 ratings from -4 to 4 (Hutto and Gilbert, ICWSM 2014).
The 10,072 that are clearly positive or negative (rating of at least 0.5 either way) make a balanced two-class task.
The sentences are in large part those of SST-2: never train on them and then report figures on SST-2.
"""

import hashlib
import io
import tarfile
from pathlib import Path

DEMO_ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
DEMO_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_INNER_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_CLEAR_RATING = 0.5


def download_command(folder: Path | str) -> str:
    """The command that puts the archive into ``folder``."""
    return f"pip download --no-deps --no-binary vaderSentiment -d {folder} vaderSentiment==3.3.2"


def read_demo_archive(path: Path) -> list[tuple[str, int]]:
    """Read the demo data out of vaderSentiment's source archive, without unpacking it to disk.

    Args:
        path: The file ``vaderSentiment-3.3.2.tar.gz``.

    Returns:
        One ``(sentence, label)`` for each clearly rated sentence, in the order of the file; label 1 is positive.

    Raises:
        ValueError: If the file is not the archive that the recipes were made with.
    """
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != DEMO_SHA256:
        raise ValueError(
            f"{path} is not {DEMO_ARCHIVE}: its sha256 is {digest}, expected {DEMO_SHA256}. "
            f"Remove it and download it again: {download_command(path.parent)}"
        )
    text = _member(_member(content, _INNER_ARCHIVE), _INNER_FILE).decode("latin-1")
    rows = (line.split("\t", 2) for line in text.splitlines() if line.strip())
    return [(sentence, int(float(score) > 0)) for _, score, sentence in rows if abs(float(score)) >= _CLEAR_RATING]


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        member = tar.extractfile(name)
        assert member is not None, name  # the checksum has been compared: the member is there and is a file
        return member.read()
