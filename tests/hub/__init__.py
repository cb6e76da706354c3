"""
A stand-in for the Hugging Face Hub that is only read, for huggingface_hub unmodified.

    with Hub() as hub:
        repo = hub.create("acme/Tiny", files={"config.json": b"{}", "model.safetensors": weights})
        pinned = repo.head
        repo.commit({"README.md": b"new words"}, title="Reword the card")
        ...
        assert hub.sent_bytes("*.safetensors") == 0
        hub.fault("*/config.json", Fault("status", status=502))

It keeps real bytes in memory, real commits with parents, branches and tags, and says what the Hub
says: git's blob ids, sha256 of what is in LFS, redirects of old names, the error codes of what is
gated, private, disabled or gone. Bytes of LFS come from another origin, by a signed address that
takes no token, with an entity tag of that storage's own. What it cannot show: xet, rate limits.

A request that the Hub would not know is answered with 501 and kept in `unexpected`.
"""

from .faults import KINDS, Fault
from .repository import Commit, File, Repo, is_lfs
from .server import INSIDER, Hub, Request

__all__ = ["INSIDER", "KINDS", "Commit", "Fault", "File", "Hub", "Repo", "Request", "is_lfs"]
