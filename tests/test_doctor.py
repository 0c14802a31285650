"""What the doctor says of this machine."""

import platform
from pathlib import Path

import pytest

from mtllama import doctor


def test_the_allocator_is_named_and_glibcs_comes_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    read = Path.read_text
    for maps, verdict, value in (("libc.so.6", "note", "glibc's"), ("/usr/lib/libtcmalloc_minimal.so.4.5.10\nlibc.so.6", "ok", "tcmalloc")):
        monkeypatch.setattr(Path, "read_text", lambda self, maps=maps, **how: maps if str(self) == "/proc/self/maps" else read(self, **how))
        (found,) = doctor._allocator()
        assert (found.verdict, found.value) == (verdict, value) and ("LD_PRELOAD" in found.advice) is (verdict == "note")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))  # musl, say
    monkeypatch.setattr(Path, "read_text", lambda self, **how: "")
    assert not list(doctor._allocator())
