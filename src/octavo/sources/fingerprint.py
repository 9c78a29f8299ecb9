"""One digest that changes when any weight, config or tokenizer byte may have; the packed cache's key.

Small files (config, tokenizer, template, a GGUF's header) enter with their content. Hashing gigabytes of
weights at every start would cost more than loading them, so those enter with an identity:

- a local file: name, size, and the times of the last write (mtime) and of the last change of any kind
  (ctime), in nanoseconds. mtime alone can be set back (`touch -r`, `cp -p`, archives with fixed dates); no
  program can set ctime. The price: a chmod, or the file's move to another machine, packs once more. The
  inode is left out: it says nothing more, and network file systems renumber it;
- a file of a hub snapshot: commit, blob name and size. Both names are hashes of the content;
- the default model: the SHA-256 that was checked when it was fetched.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping


def local_identity(status: os.stat_result) -> str:
    return f"local {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def fingerprint(identities: Mapping[str, str], documents: Mapping[str, bytes]) -> str:
    """SHA-256 hex digest over weight files (name -> identity) and documents (name -> content)."""
    digest = hashlib.sha256(b"octavo source 1\n")
    for kind, entries in (("weights", identities), ("document", documents)):
        for name in sorted(entries):
            value = entries[name]
            content = value.encode() if isinstance(value, str) else value
            # Hashed apart, so that no content can imitate the border to the next entry.
            digest.update(f"{kind} {name!r} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()
