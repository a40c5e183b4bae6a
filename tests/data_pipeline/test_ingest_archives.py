"""Archives: read as streams, never extracted; whatever is odd is a counted reject."""

import hashlib
import io
import itertools
import json
import os
import random
import stat
import struct
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.ingest import archive_members, archives
from data_pipeline.ingest.stage import IngestOptions, plan_ingest
from data_pipeline.runner.output import Manifest
from data_pipeline.runner.stage import Options, run_stage
from megaphi.process_memory import peak_memory, reset_peak_memory
from tests.data_pipeline.record_files import read

CODE = "def f(x):\n    return x\n"
ROWS = b'{"text": "one"}\n{"body": 1}\n{"text": "two"}\n'


def ingest(path: Path, out: Path, **options: Any) -> Manifest:
    stage, work = plan_ingest([str(path)], IngestOptions(**options))
    return run_stage(stage, work, out, Options(max_reject=1))[0]


def fates(out: Path) -> list[tuple[str, str]]:
    """(member, kept or reason) of each document."""
    kept = [(record.get("path", record["text"]), "kept") for record in read(out)]
    rejected = [
        (reject["position"].partition("!")[2], reject["reason"]) for reject in read(out, "rejected")
    ]
    return kept + rejected


def tree_hash(root: Path, *without: Path) -> str:
    """Digest of every name, type and content below a directory."""
    found = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if any(path == other or other in path.parents for other in without):
            continue
        status = path.lstat()
        found.update(f"{path} {stat.S_IFMT(status.st_mode)}\n".encode())
        if path.is_file() and not path.is_symlink():
            found.update(f"{status.st_mtime_ns}\n".encode() + path.read_bytes())
    return found.hexdigest()


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **more: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in more.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(data))


def hostile_tar(path: Path, mode: str = "w") -> dict[str, str]:
    """A tar of everything that extraction would stumble over; the fate of each member."""
    code = CODE.encode()
    with tarfile.open(path, mode) as archive:
        add(archive, "good.py", code)
        add(archive, "folder", type=tarfile.DIRTYPE)
        add(archive, "folder/rows.jsonl", ROWS)
        add(archive, "README.md", b"not an input")
        add(archive, "../../escape.py", code)
        add(archive, "/tmp/absolute.py", code)
        add(archive, "a/../../b.py", code)
        add(archive, "link.py", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "hard.py", type=tarfile.LNKTYPE, linkname="good.py")
        add(archive, "null.py", type=tarfile.CHRTYPE, devmajor=1, devminor=3)
        add(archive, "pipe.py", type=tarfile.FIFOTYPE)
        add(archive, "good.py", b"print('second')\n")
        add(archive, "./good.py", b"print('third')\n")
        add(archive, "inner.zip", b"PK")
        add(archive, "large.py", b"#" * (2**20 + 1))
        add(archive, "utf16.py", CODE.encode("utf-16"))
        add(archive, "last.py", code)
    return {
        "good.py": "kept",
        "last.py": "kept",
        "one": "kept",
        "two": "kept",
        "../../escape.py": "unsafe_path",
        "/tmp/absolute.py": "unsafe_path",
        "a/../../b.py": "unsafe_path",
        "inner.zip": "nested_archive",
        **dict.fromkeys(("link.py", "hard.py", "null.py", "pipe.py"), "not_regular_file"),
        "large.py": "too_large",
        "utf16.py": "utf8",
    }


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.bz2", "tar.xz", "tar.zst"])
def test_a_hostile_tar(tmp_path: Path, suffix: str) -> None:
    work = tmp_path / "work"
    work.mkdir()
    path = work / f"x.{suffix}"
    if suffix == "tar.zst":
        import zstandard

        expected = hostile_tar(work / "x.tar")
        path.write_bytes(zstandard.compress((work / "x.tar").read_bytes()))
    else:
        expected = hostile_tar(path, f"w:{suffix[4:]}" if "." in suffix else "w")
    before = tree_hash(tmp_path)
    manifest = ingest(path, work / "out")
    assert tree_hash(tmp_path, work / "out") == before
    found = fates(work / "out")
    assert Counter(found) == Counter(
        [
            *expected.items(),
            ("good.py", "duplicate_member"),
            ("./good.py", "duplicate_member"),
            ("folder/rows.jsonl:byte 16", "missing_field"),
        ]
    )
    assert manifest.records_in == len(found)
    # the id is that of the member and of its text
    records = list(read(work / "out"))
    expected_ids = set()
    members = ("good.py", "last.py", "folder/rows.jsonl:byte 0", "folder/rows.jsonl:byte 28")
    for inside, record in itertools.product(members, records):
        member = hashlib.sha256(f"local\0x.{suffix}!{inside}".encode()).hexdigest()[:32]
        content = json.dumps([record["text"], None, record.get("path"), None, None])
        expected_ids.add(hashlib.sha256(f"{member}\0{content}".encode()).hexdigest()[:32])
    assert {record["id"] for record in records} <= expected_ids
    assert len({record["id"] for record in records}) == len(members)


def test_a_hostile_zip(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.py", CODE)
        archive.writestr("folder/", "")
        archive.writestr("../escape.py", CODE)
        archive.writestr("/absolute.py", CODE)
        archive.writestr("C:\\windows.py", CODE)
        link = zipfile.ZipInfo("link.py")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("good.py", "print('second')")
        archive.writestr("encrypted.py", CODE)
        archive.writestr("shorter.py", CODE * 9)
        archive.writestr("longer.py", CODE * 9)
        archive.writestr("crc.py", CODE)
        archive.writestr(zipfile.ZipInfo("bz.py"), CODE, zipfile.ZIP_BZIP2)
        archive.writestr("rows.jsonl", ROWS)
        archive.writestr("inner.tar.gz", b"x")
    data = bytearray(path.read_bytes())

    def central(name: str) -> int:
        """Where the central directory's entry of a member begins."""
        return data.rindex(name.encode()) - 46

    data[central("encrypted.py") + 8] |= 1
    size = struct.Struct("<I")
    size.pack_into(data, central("shorter.py") + 24, 5)  # says less than there is
    size.pack_into(data, central("longer.py") + 24, 9999)  # says more than there is
    size.pack_into(data, central("crc.py") + 16, 1)
    path.write_bytes(data)
    before = tree_hash(tmp_path)
    manifest = ingest(path, tmp_path / "out")
    assert tree_hash(tmp_path, tmp_path / "out") == before
    found = fates(tmp_path / "out")
    assert Counter(found) == Counter(
        {
            ("good.py", "kept"): 1,
            ("one", "kept"): 1,
            ("two", "kept"): 1,
            ("rows.jsonl:byte 16", "missing_field"): 1,
            **{(name, "unsafe_path"): 1 for name in ("../escape.py", "/absolute.py")},
            ("C:\\\\windows.py" if os.sep == "\\" else "C:\\windows.py", "unsafe_path"): 1,
            ("link.py", "not_regular_file"): 1,
            ("good.py", "duplicate_member"): 1,
            ("encrypted.py", "encrypted"): 1,
            **{(name, "unreadable"): 1 for name in ("shorter.py", "longer.py", "crc.py")},
            ("bz.py", "compression"): 1,
            ("inner.tar.gz", "nested_archive"): 1,
        }
    )
    assert manifest.records_in == len(found)


def test_a_7z(tmp_path: Path) -> None:
    py7zr = pytest.importorskip("py7zr")
    path = tmp_path / "x.7z"
    with py7zr.SevenZipFile(path, "w") as archive:
        archive.writestr(CODE, "good.py")
        archive.writestr(ROWS, "folder/rows.jsonl")
        archive.writestr(b"print('one')", "twice.py")
        archive.writestr(b"print('two')", "twice.py")
        archive.writestr(b"#" * (2**20 + 1), "large.py")
        archive.writestr(b"x", "README.md")
        archive.writestr(b"PK", "inner.zip")
        archive.writestr(CODE, "last.py")
    with path.open("rb") as stream, py7zr.SevenZipFile(stream, "r") as archive:
        names = [file.filename for file in archive.files]
    before = tree_hash(tmp_path)
    ingest(path, tmp_path / "out")
    assert tree_hash(tmp_path, tmp_path / "out") == before
    expected = [
        *(("good.py", "kept"), ("last.py", "kept"), ("one", "kept"), ("two", "kept")),
        *(("folder/rows.jsonl:byte 16", "missing_field"), ("large.py", "too_large")),
        ("inner.zip", "nested_archive"),
    ]
    expected += [("twice.py", "duplicate_member")] * names.count("twice.py")
    assert Counter(fates(tmp_path / "out")) == Counter(expected)


@pytest.mark.parametrize("method", ["zstd", "encrypted", "torn", "header"])
def test_a_7z_that_is_not_read(tmp_path: Path, method: str) -> None:
    py7zr = pytest.importorskip("py7zr")
    path = tmp_path / "x.7z"
    filters = [{"id": py7zr.FILTER_PPMD, "order": 6, "mem": 16}] if method == "zstd" else None
    password = "secret" if method == "encrypted" else None
    with py7zr.SevenZipFile(path, "w", filters=filters, password=password) as archive:
        archive.writestr(random.Random(1).randbytes(50_000).hex(), "good.py")
    data = bytearray(path.read_bytes())
    if method == "torn":
        del data[-20:]
    if method == "header":
        data[10_000] ^= 0xFF
    path.write_bytes(data)
    (tmp_path / "rows.jsonl").write_text('{"text": "beside"}\n')
    manifest = ingest(tmp_path, tmp_path / "out")
    assert manifest.records_out == 1
    assert 1 <= manifest.rejected["unreadable"] <= 2


def bomb(path: Path, megabytes: int) -> None:
    """An archive of one member of zeros, as dense as its format allows."""
    block = b"\0" * 2**20
    if path.suffix == ".zip":
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("bomb.jsonl", "w") as stream,
        ):
            for _ in range(megabytes):
                stream.write(block)
        return
    info = tarfile.TarInfo("README" if "skipped" in path.name else "bomb.jsonl")
    info.size = megabytes * 2**20

    class Zeros(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            return block[:size]

    with tarfile.open(path, f"w:{path.suffix[1:]}") as archive:
        archive.addfile(info, Zeros())


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz", "skipped.tar.gz", "x.tar.bz2", "x.tar.xz"])
def test_bombs_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A thousandfold or more: reading stops long before the end, also where a member is skipped."""
    monkeypatch.setattr(archive_members, "FREE_BYTES", 2**22)
    bomb(tmp_path / name, 100)
    size = (tmp_path / name).stat().st_size
    assert size < 110_000
    taken: list[int] = []
    real = archives.Budget.take

    def take(budget: archives.Budget, count: int) -> None:
        taken.append(count)
        real(budget, count)

    monkeypatch.setattr(archives.Budget, "take", take)
    before = reset_peak_memory()
    assert before is not None
    (tmp_path / "a.jsonl").write_text('{"text": "beside"}\n')
    manifest = ingest(tmp_path, tmp_path / "out")
    grown = peak_memory() - before
    assert manifest.rejected == {"archive_bomb": 1}
    assert manifest.records_out == 1
    assert sum(taken) < 2**22 + archive_members.MAX_RATIO * size + 2**21
    assert grown < 60 * 2**20
    written = sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert written < 10_000


def test_a_7z_bomb_is_told_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_members, "FREE_BYTES", 2**20)
    py7zr = pytest.importorskip("py7zr")
    with py7zr.SevenZipFile(tmp_path / "x.7z", "w") as archive:
        archive.writestr(b"\0" * 16 * 2**20, "bomb.py")
    (tmp_path / "a.jsonl").write_text('{"text": "beside"}\n')
    assert ingest(tmp_path, tmp_path / "out").rejected == {"archive_bomb": 1}


def test_a_tar_header_cannot_take_the_memory(tmp_path: Path) -> None:
    """A pax record of 100 MB: `tarfile` would hold it whole."""
    path = tmp_path / "x.tar.gz"
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 100 * 2**20
    import gzip

    with gzip.open(path, "wb") as stream:
        stream.write(info.tobuf())
        for _ in range(100):
            stream.write(b"9" * 2**20)
    (tmp_path / "a.jsonl").write_text('{"text": "beside"}\n')
    before = reset_peak_memory()
    assert before is not None
    assert ingest(tmp_path, tmp_path / "out").rejected == {"archive_bomb": 1}
    assert peak_memory() - before < 60 * 2**20


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz", "zip", "7z"])
def test_damaged_archives_never_lose_members_silently(tmp_path: Path, suffix: str) -> None:
    """Flip a byte or cut the file at random: all members are kept, or a reject says otherwise."""
    names = [f"m{n}.py" for n in range(20)]
    texts = {name: f"x = {hashlib.sha256(name.encode()).hexdigest()!r}\n" * 20 for name in names}
    whole = tmp_path / f"whole.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in texts.items():
                archive.writestr(name, text)
    elif suffix == "7z":
        py7zr = pytest.importorskip("py7zr")
        with py7zr.SevenZipFile(whole, "w") as archive:
            for name, text in texts.items():
                archive.writestr(text, name)
    else:
        with tarfile.open(whole, "w:" + suffix[4:]) as archive:
            for name, text in texts.items():
                add(archive, name, text.encode())
    pristine = whole.read_bytes()
    (tmp_path / "beside.jsonl").write_text('{"text": "beside"}\n')
    draw = random.Random(7)
    flagged = 0
    for number in range(40):
        data = bytearray(pristine)
        if number % 4 == 0:
            del data[draw.randrange(1, len(data)) :]
        else:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (tmp_path / f"x.{suffix}").write_bytes(data)
        out = tmp_path / "outs" / str(number)
        out.parent.mkdir(exist_ok=True)
        stage, work = plan_ingest(
            [str(tmp_path / f"x.{suffix}"), str(tmp_path / "beside.jsonl")], IngestOptions()
        )
        manifest, _ = run_stage(stage, work, out, Options(max_reject=1))
        got = {r["path"]: r["text"] for r in read(out) if "path" in r}
        assert manifest.records_in == manifest.records_out + manifest.num_rejected
        missing = [name for name in names if name not in got]
        if suffix == "zip" and not manifest.num_rejected:  # a name became that of another kind
            missing = [name for name in missing if name.encode() in data[len(data) // 2 :]]
        assert not missing or manifest.num_rejected, number
        if suffix != "tar":  # which has no checksum of the content
            assert manifest.num_rejected or got.items() <= texts.items(), number
        flagged += bool(manifest.num_rejected)
    assert flagged > 5


def test_archives_give_the_same_with_any_number_of_workers(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        hostile_tar(tmp_path / "in" / f"{number}.tar.gz", "w:gz")
    results = []
    for workers in (1, 3):
        stage, work = plan_ingest([str(tmp_path / "in")], IngestOptions())
        options = Options(workers=workers, max_reject=1)
        manifest, _ = run_stage(stage, work, tmp_path / f"out{workers}", options)
        results.append((manifest.parts, manifest.rejects, manifest.key))
    assert results[0] == results[1]


def test_parquet_in_an_archive(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"content": [CODE, ""]}), tmp_path / "a.parquet")
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as archive:
        archive.add(tmp_path / "a.parquet", "data/a.parquet")
        add(archive, "broken.parquet", b"PAR1 not really")
    manifest = ingest(tmp_path / "x.tgz", tmp_path / "out")
    assert manifest.rejected == {"empty": 1, "unreadable": 1}
    assert [record["text"] for record in read(tmp_path / "out")] == [CODE]
    assert json.loads((tmp_path / "out" / "manifest.json").read_bytes())["inputs"][0]["files"] == 1
