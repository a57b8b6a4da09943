"""Where the datasets come from: what sources.yaml says, and what its fields mean. No address has been tried."""

from dataclasses import dataclass
from pathlib import Path

import yaml

# CoOp's split files in a public repository (MIT), and the images in CoOp's layout as one zip per dataset, pinned.
SPLITS = "https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/main/splits"
MIRROR = "https://huggingface.co/zhengli97/prompt_learning_dataset/resolve/ceb3112337fb6e1bf71534e355ca5569b63f19a6"


@dataclass(frozen=True)
class Archive:
    """A file with a dataset's images. `url` is an address, or `drive:` and a Google Drive id.

    `checksum` is its MD5 (32 digits) or SHA-256 (64), None if unknown; `saved_as` its name here, if not the address's.
    """

    url: str
    checksum: str | None = None
    saved_as: str = ""

    @property
    def file(self) -> str:
        return self.saved_as or self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """How to get one dataset.

    `archives` have the same images and are tried in order. They have about `gigabytes` (10^9 bytes), and so have their
    unpacked images. `split_drive` and `split_sha256` are the Google Drive id and the checksum of CoOp's split file, if
    there is one; `split_reported` means that the checksum is not that of the copy below SPLITS but was reported for
    another. `parts` are the folders that must be in the image folder (empty: only the image folder itself). `called` is
    another name of the image folder in the archive. `hints` say where else to look if the addresses fail.
    """

    gigabytes: float
    archives: tuple[Archive, ...] = ()
    split_drive: str = ""
    split_sha256: str = ""
    split_reported: bool = False
    parts: tuple[str, ...] = ()
    called: str = ""
    hints: tuple[str, ...] = ()


def _archive(fields: dict[str, str]) -> Archive:
    """Return an archive from its fields in the file: those of Archive, or `copy`, a zip in MIRROR, and its checksum."""
    if "copy" not in fields:
        return Archive(**fields)
    # Under another name: some differ from the original's only in upper and lower case, and a partial download of one
    # must not be resumed with the other.
    saved_as = fields["copy"].replace(".zip", "-copy.zip")
    return Archive(f"{MIRROR}/{fields['copy']}", fields.get("checksum"), saved_as)


def _source(fields: dict) -> Source:
    lists = {name: tuple(fields.get(name, ())) for name in ("parts", "hints")}
    return Source(**fields | lists | {"archives": tuple(map(_archive, fields.get("archives", ())))})


_TABLE = yaml.safe_load(Path(__file__).with_name("sources.yaml").read_text(encoding="utf-8"))
SOURCES = {name: _source(fields) for name, fields in _TABLE.items()}
