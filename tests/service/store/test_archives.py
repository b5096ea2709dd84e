"""Archives: what PEFT's users pack is read, what is packed to do harm is refused, and nothing is unpacked."""

from __future__ import annotations

import gzip
import io
import stat
import struct
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.errors import CURES, AdapterRejected, UploadTooLarge
from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from adapters.store.archives import MAX_ENTRIES, read
from tests.service.http.test_api import error
from tests.support import tiny
from tests.support.site import Site
from tests.support.tiny import fake_site

URL = "/admin/v1/tenants/acme/adapters/a/versions"
MAX = 1 << 20
FILES = {CONFIG_FILE: b'{"r": 8}', WEIGHTS_FILE: b"\x00weights" * 3000}

Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, content: bytes = b"", **changes: Any) -> Entry:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in changes.items():
        setattr(info, field, value)
    return info, content


def tar(*entries: Entry, mode: str = "w", **options: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **options) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zipped(*entries: tuple[str | zipfile.ZipInfo, bytes], **options: Any) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **options) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return out.getvalue()


def unpack(archive: bytes, max_bytes: int = MAX) -> dict[str, bytes]:
    got: dict[str, bytes] = {}
    for name, piece in read(io.BytesIO(archive), max_bytes=max_bytes):
        got[name] = got.get(name, b"") + piece
    return got


def special(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


BOTH = [entry(name, content) for name, content in FILES.items()]
BESIDE = [
    entry("README.md", b"about"),
    entry("training_args.json", b"{}"),
    entry("optimizer.safetensors", b"x"),
]
IN_A_FOLDER = [
    entry("./run/", type=tarfile.DIRTYPE),
    *[entry(f"./run/{name}", content) for name, content in FILES.items()],
]
GOOD: dict[str, bytes] = {
    "tar": tar(*BOTH),
    "tar.gz": tar(*BOTH, mode="w:gz"),
    "a folder, as tar packs it": tar(*IN_A_FOLDER, mode="w:gz"),
    "with other files": tar(*BESIDE, *BOTH),
    "GNU": tar(*BOTH, format=tarfile.GNU_FORMAT),
    "PAX": tar(entry("ä" * 90, b"x", pax_headers={"comment": "ü"}), *BOTH, format=tarfile.PAX_FORMAT),
    "zip": zipped(*FILES.items()),
    "zip, deflated": zipped(*FILES.items(), compression=zipfile.ZIP_DEFLATED),
    "zip of a folder": zipped(("run/", b""), *((f"run/{name}", content) for name, content in FILES.items())),
    "with the checkpoints of its training": tar(
        *[entry(f"checkpoint-{n}/{name}", b"older") for n in (100, 500) for name in FILES], *BOTH
    ),
    "with the checkpoints below a folder": zipped(
        *((f"run/checkpoint-500/{name}", b"older") for name in FILES),
        *((f"run/{name}", content) for name, content in FILES.items()),
    ),
    "with a link of a log": tar(
        entry("wandb/latest-run", type=tarfile.SYMTYPE, linkname="run-20260101"), *BOTH
    ),
    "with a hard link and a pipe": tar(
        *BOTH,
        entry("copy", type=tarfile.LNKTYPE, linkname=CONFIG_FILE),
        entry("p", type=tarfile.FIFOTYPE),
    ),
    "with a link in a zip": zipped(*FILES.items(), (special("latest", stat.S_IFLNK | 0o777), b"x")),
    "with a log of thousands of files": tar(*[entry(f"wandb/run-1/{i}") for i in range(1200)], *BOTH),
    "with names of Windows": zipped(("logs\\x.txt", b"x"), ("C:\\x", b"x"), *FILES.items()),
    "with a name that has a colon": tar(entry("events.out:1", b"x"), entry("C:x", b"x"), *BOTH),
    "with an absolute path beside": tar(*BOTH, entry("/etc/passwd", b"x")),
    "with a path out beside": tar(*BOTH, entry("a/../../b", b"x")),
    "with an absolute link": tar(*BOTH, entry("/data", type=tarfile.SYMTYPE, linkname="/mnt/data")),
    "zip of a Mac": zipped(*FILES.items(), (f"__MACOSX/._{CONFIG_FILE}", b"\0")),
    "zip of Windows PowerShell": zipped(*((f"run\\{name}", content) for name, content in FILES.items())),
    "tar.gz with zeros behind": tar(*BOTH, mode="w:gz") + b"\0" * 512,
    "tar.gz in two pieces": gzip.compress(tar(*BOTH)[:5000]) + gzip.compress(tar(*BOTH)[5000:]),
}


@pytest.mark.parametrize("kind", GOOD)
def test_the_known_files_are_read(kind: str) -> None:
    assert unpack(GOOD[kind]) == FILES


def claims(entries: int, listing: int) -> bytes:
    return zipped(*FILES.items())[:-22] + struct.pack(
        "<4s4H2IH", b"PK\5\6", 0, 0, entries, entries, listing, 0, 0
    )


def encrypted() -> bytes:
    data = bytearray(zipped(*FILES.items()))
    for magic, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = 0
        while (start := data.find(magic, start)) >= 0:
            data[start + at] |= 1
            start += 4
    return bytes(data)


def flipped() -> bytes:
    """A bit of the weights is another one than when they were packed, which their gzip's sum tells."""
    packed = bytearray(gzip.compress(tar(*BOTH), compresslevel=0))
    packed[packed.rindex(b"weights")] ^= 1
    return bytes(packed)


def misplaced(magic: bytes, at: int, place: int) -> bytes:
    """A zip that says that something of it is at ``place``."""
    data = bytearray(zipped(*FILES.items()))
    start = data.rindex(magic) + at
    data[start : start + 4] = struct.pack("<I", place)
    return bytes(data)


def far_away() -> bytes:
    """A zip whose last file is where no file system has a place."""
    data = bytearray(zipped(*FILES.items()))
    last, end = data.rindex(b"PK\1\2"), data.rindex(b"PK\5\6")
    far = struct.pack("<HHQ", 1, 8, 2**62)
    data[end + 12 : end + 16] = struct.pack(
        "<I", struct.unpack("<I", data[end + 12 : end + 16])[0] + len(far)
    )
    data[end:end] = far
    data[last + 30 : last + 32], data[last + 42 : last + 46] = struct.pack("<H", len(far)), b"\xff" * 4
    return bytes(data)


def negative(size: int) -> bytes:
    """A tar with a file of less than no bytes: what follows would be read again."""
    head = bytearray(tarfile.TarInfo(CONFIG_FILE).tobuf())
    head[124:136] = (size % (1 << 96)).to_bytes(12, "big")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head[:512])
    return bytes(head) + tar(*BOTH)


def long_header() -> bytes:
    """A PAX header that says it is 100 MB long."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 100 << 20
    return info.tobuf() + b"\0" * 4096


BAD: dict[str, bytes] = {
    "nothing": b"",
    "noise": bytes(range(256)) * 20,
    "a 7z": b"7z\xbc\xaf'\x1c" + b"\0" * 100,
    "a cut tar": tar(*BOTH)[:9000],
    "a cut tar.gz": tar(*BOTH, mode="w:gz")[:-30],
    "a spoiled tar.gz": b"\x1f\x8b" + b"\x08\0\0\0\0\0\0\0" + b"spoiled" * 20,
    "a cut zip": zipped(*FILES.items())[:-30],
    "a zip with another sum": zipped(*FILES.items()).replace(b"weights", b"Weights", 1),
    "a zip of many": claims(MAX_ENTRIES + 1, 100),
    "a zip with an endless list": claims(2, 200 << 20),
    "an encrypted zip": encrypted(),
    "a file twice": tar(*BOTH, BOTH[0]),
    "a file in two folders": tar(*IN_A_FOLDER, entry(f"./other/{WEIGHTS_FILE}", b"x")),
    "a file twice in a zip": zipped((f"y/{CONFIG_FILE}", b"{}"), (f"x/{CONFIG_FILE}", b"{}")),
    "two runs mixed": tar(BOTH[0], *[entry(f"{n}/{WEIGHTS_FILE}", b"x") for n in ("a", "a/b")]),
    "an absolute path": tar(entry(f"/{CONFIG_FILE}", b"{}")),
    "a checkpoint's config beside the weights": tar(entry(f"checkpoint-1/{CONFIG_FILE}", b"{}"), BOTH[1]),
    "weights below their config": zipped((CONFIG_FILE, b"{}"), (f"best/{WEIGHTS_FILE}", b"x")),
    "a path out": tar(entry(f"../{CONFIG_FILE}", b"{}")),
    "a path out, later": tar(*BOTH, entry(f"a/../../{WEIGHTS_FILE}", b"x")),
    "a path of Windows": zipped((f"C:\\{CONFIG_FILE}", b"x")),
    "a path out of Windows": tar(entry(f"..\\{CONFIG_FILE}", b"x")),
    "a drive": tar(entry(f"C:{CONFIG_FILE}", b"x")),
    "a path out of a zip": zipped((f"../{CONFIG_FILE}", b"{}")),
    "a symbolic link": tar(entry(CONFIG_FILE, type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "a hard link": tar(BOTH[0], entry(WEIGHTS_FILE, type=tarfile.LNKTYPE, linkname=CONFIG_FILE)),
    "a device": tar(entry(WEIGHTS_FILE, type=tarfile.CHRTYPE)),
    "a pipe": tar(BOTH[0], entry(WEIGHTS_FILE, type=tarfile.FIFOTYPE)),
    "a link in a zip": zipped((special(CONFIG_FILE, stat.S_IFLNK | 0o777), b"/etc/passwd")),
    "a header without end": long_header(),
    "the same in gzip": gzip.compress(long_header()),
    "a tar.gz with another bit": flipped(),
    "a tar.gz with another sum": tar(*BOTH, mode="w:gz")[:-8] + b"\0" * 8,
    "a tar.gz cut at its sum": tar(*BOTH, mode="w:gz")[:-5],
    "a tar.gz with something behind": tar(*BOTH, mode="w:gz") + b"x" * 100,
    "a zip whose list is elsewhere": misplaced(b"PK\5\6", 16, 10**6),
    "a zip whose list is nowhere": misplaced(b"PK\5\6", 16, 0xFFFFFFFF),
    "a zip with a file elsewhere": misplaced(b"PK\1\2", 42, 10**6),
    "a zip with a file far away": far_away(),
    "a file of less than no bytes": negative(-512),
    "one that leads before the beginning": negative(-(1 << 20)),
    "the same, in gzip": gzip.compress(negative(-1024)),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_archive_of_an_adapter_is_refused(kind: str, tmp_path: Path) -> None:
    """Of a real file, which says other things than one in memory where a place is none."""
    (tmp_path / "archive").write_bytes(BAD[kind])
    with (tmp_path / "archive").open("rb") as file, pytest.raises(AdapterRejected) as caught:
        for _ in read(file, max_bytes=MAX):
            pass
    assert caught.value.code == "archive_invalid"
    assert caught.value.message.endswith(CURES["archive_invalid"])
    assert len(caught.value.message) < 600


def test_a_tar_has_only_so_many_entries() -> None:
    many = tarfile.TarInfo("f").tobuf() * MAX_ENTRIES
    assert unpack(many + tar(), max_bytes=64 << 20) == {}
    with pytest.raises(AdapterRejected, match="more than 10000 entries") as refused:
        unpack(many + tar(entry("g")), max_bytes=64 << 20)
    assert refused.value.code == "archive_invalid"


def zeros(name: str, size: int) -> bytes:
    return gzip.compress(tar(entry(name, b"\0" * size)))


BOMBS: dict[str, Callable[[], bytes]] = {
    "weights of zeros": lambda: zeros(WEIGHTS_FILE, 200 << 20),
    "another file of zeros": lambda: gzip.compress(tar(entry("README.md", b"\0" * (200 << 20)), *BOTH)),
    "a size that is not there": lambda: entry(WEIGHTS_FILE, size=1 << 40)[0].tobuf() + b"\0" * 10240,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_costs_no_more_than_what_is_allowed(kind: str) -> None:
    bomb = BOMBS[kind]()
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises((UploadTooLarge, AdapterRejected)):
        for _ in read(io.BytesIO(bomb), max_bytes=MAX):
            pass
    assert time.process_time() - started < 2
    assert tracemalloc.get_traced_memory()[1] < 8 * MAX
    tracemalloc.stop()


# --- over HTTP ------------------------------------------------------------------------------------------


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path, max_upload_bytes=200_000) as site:
        await site.admin.post("/admin/v1/tenants", json={"id": "acme"})
        yield site


def packed(kind: str) -> bytes:
    files = {name: (tiny.adapter(1) / name).read_bytes() for name in FILES}
    if kind == "zip":
        return zipped(*files.items(), ("README.md", b"x"), compression=zipfile.ZIP_DEFLATED)
    return tar(*[entry(f"run/{name}", content) for name, content in files.items()], mode=kind)


TYPES = {"w": "application/x-tar", "w:gz": "application/gzip", "zip": "application/zip"}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("as_field", [False, True])
async def test_an_archive_is_the_same_upload(site: Site, tmp_path: Path, kind: str, as_field: bool) -> None:
    plain = await site.upload("acme", "plain", tiny.adapter(1))
    sent: dict[str, Any] = {"content": packed(kind), "headers": {"Content-Type": TYPES[kind]}}
    if as_field:
        sent = {"files": {"archive": ("adapter.bin", packed(kind))}}
    made = await site.admin.post(URL, **sent)
    assert made.status_code == 201, made.text
    assert made.json()["digest"] == plain.json()["digest"]
    assert list((tmp_path / "quarantine").iterdir()) == []


HOSTILE: dict[str, tuple[int, str, Callable[[], dict[str, Any]]]] = {
    "beside the files": (
        400,
        "invalid_request",
        lambda: {"files": [("archive", packed("w")), (CONFIG_FILE, b"{}")]},
    ),
    "twice": (400, "invalid_request", lambda: {"files": [("archive", packed("w"))] * 2}),
    "after the files": (
        422,
        "archive_invalid",
        lambda: {"files": [(CONFIG_FILE, b"{}"), ("archive", b"x")]},
    ),
    "noise": (422, "archive_invalid", lambda: raw(b"noise" * 500)),
    "empty": (422, "archive_invalid", lambda: raw(b"")),
    "without weights": (400, "upload_incomplete", lambda: raw(tar(entry(CONFIG_FILE, b"{}")))),
    "with a pickle": (
        422,
        "weights_not_safetensors",
        lambda: raw(tar(entry("adapter_model.bin", b"\x80"), BOTH[0])),
    ),
    "a link": (422, "archive_invalid", lambda: raw(BAD["a symbolic link"])),
    "a bomb": (413, "upload_too_large", lambda: raw(zeros(WEIGHTS_FILE, 50 << 20))),
    "a bomb in a zip": (
        413,
        "upload_too_large",
        lambda: raw(zipped((WEIGHTS_FILE, b"\0" * (50 << 20)), compression=zipfile.ZIP_DEFLATED)),
    ),
    "too large": (413, "body_too_large", lambda: raw(b"x" * 300_000)),
}


def raw(body: bytes) -> dict[str, Any]:
    return {"content": body, "headers": {"Content-Type": "application/gzip"}}


@pytest.mark.parametrize("kind", HOSTILE)
async def test_nothing_of_a_refused_archive_is_kept(site: Site, tmp_path: Path, kind: str) -> None:
    status, code, make = HOSTILE[kind]
    answered: httpx.Response = await site.admin.post(URL, **make())
    assert (answered.status_code, answered.json()["error"]["code"]) == (status, code), answered.text
    assert list((tmp_path / "quarantine").iterdir()) == list((tmp_path / "blobs").iterdir()) == []


@pytest.mark.parametrize("first", [True, False])
async def test_a_pickle_beside_the_weights_is_ignored_and_said(site: Site, first: bool) -> None:
    files = [entry(name, (tiny.adapter(1) / name).read_bytes()) for name in FILES]
    pickle = [entry("adapter_model.bin", b"\x80\x04.")]
    made = await site.admin.post(URL, **raw(tar(*(pickle + files if first else files + pickle))))
    assert made.status_code == 201, made.text
    (warning,) = made.json()["report"]["warnings"]
    assert warning.startswith("adapter_model.bin beside")


async def test_files_of_a_tokenizer_that_are_passed_over_are_said(site: Site) -> None:
    """Those beside the adapter's config alone: others may be the base's."""
    files = [entry(f"run/{name}", (tiny.adapter(1) / name).read_bytes()) for name in FILES]
    more = [
        entry("run/additional_chat_templates/tool_use.jinja", b"{{ tools }}"),
        entry("run/additional_chat_templates/readme.txt", b"about"),
        entry("run/tokenizer.model", b"sentences"),
        entry("run/chat_template.json", type=tarfile.SYMTYPE, linkname="elsewhere"),
        entry("run/checkpoint-5/tokenizer.model", b"sentences"),
        entry("tokenizer.model", b"sentences"),
    ]
    made = await site.admin.post(URL, **raw(tar(*more, *files)))
    assert made.status_code == 201, made.text
    (warning,) = made.json()["report"]["warnings"]
    assert warning.startswith("additional_chat_templates/tool_use.jinja, tokenizer.model ignored: ")


async def test_an_archive_that_breaks_off_is_said_to(site: Site, tmp_path: Path) -> None:
    request = httpx.Request("POST", f"{site.url}{URL}", files={"archive": packed("w")})
    body = request.read()
    headers = {"Content-Type": request.headers["content-type"]}
    answered = await site.admin.post(URL, content=body[:-100], headers=headers)
    error(answered, 400, "upload_incomplete")
    assert list((tmp_path / "quarantine").iterdir()) == []
