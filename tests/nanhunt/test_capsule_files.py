"""Files of capsules: broken, foreign and hostile ones; full disks; folders within their limits."""

import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from nanhunt import store
from nanhunt.capsule import CapsuleFolder, capture, read_capsule, write_capsule
from nanhunt.errors import CapsuleError
from nanhunt.structure import named_tensors

PROGRAMS = Path(__file__).parent / "programs"
LONG = os.environ.get("NANHUNT_LONG") == "1"
HEAD = b'{"__metadata__":{"nanhunt":"capsule 1","checksum":"'


@pytest.fixture
def file(tmp_path):
    """A capsule with a little of everything."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    x = torch.arange(12.0).reshape(3, 4)
    batch = {"x": x, "t": x.t(), "e": x[:, :1].expand(3, 9), "c": torch.randn(3).cfloat().conj()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch |= {"coo": torch.eye(3).to_sparse(), "csr": torch.eye(3).to_sparse_csr()}
    batch |= {"a": x.numpy()[::-1], "many": list(range(40)), "b": b"bytes", "n": float("nan")}
    batch |= {"s": x.numpy()[0, 0], "z": torch.Size([1]), "f": len, "d": torch.float16}
    capsule = capture(model, batch, optimizer=optimizer, step=3, subject="package.module:build")
    return write_capsule(capsule, tmp_path / "a.capsule")


def refusal(path):
    """The sentence with which a file is refused."""
    start = time.process_time()
    with pytest.raises(CapsuleError) as caught:
        read_capsule(path)
    assert time.process_time() - start < 1.0
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence.partition(f"{path}: ")[2]


def made(path, header, data=b""):
    """A file with this header, and a checksum that fits it."""
    content = len(header).to_bytes(8, "little") + header + data
    place = 8 + len(HEAD)
    if header.startswith(HEAD):
        digest = hashlib.blake2b(content, digest_size=32).hexdigest().encode()
        content = content[:place] + digest + content[place + 64 :]
    path.write_bytes(content)
    return path


def header_of(record, entries=""):
    """A header with this record, its checksum left open."""
    return HEAD + b"0" * 64 + b'","record":' + json.dumps(record).encode() + b"}" + (
        f",{entries}" if entries else ""
    ).encode() + b"}"  # fmt: skip


def changed(path, change):
    """The same file with something else in its record, and a checksum that fits."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:end])
    record = json.loads(table["__metadata__"]["record"])
    change(record)
    del table["__metadata__"]
    return made(path, header_of(json.dumps(record), json.dumps(table)[1:-1]), content[end:])


# --- what is no capsule --------------------------------------------------------------------------


def test_every_cut_is_refused(file, tmp_path):
    """Whatever the length at which a file ends, it is refused."""
    content, path = file.read_bytes(), tmp_path / "cut"
    for size in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert refusal(path)
    assert refusal(path).endswith("it was cut short")
    path.write_bytes(content + b"x")
    assert refusal(path).endswith("something was added to it")


def test_every_flipped_bit_is_refused(file, tmp_path):
    """The checksum is over everything, also the header and itself."""
    content, path = file.read_bytes(), tmp_path / "flipped"
    for place in range(0, len(content), 97):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        assert refusal(path)
    changed = bytearray(content)
    changed[-1] ^= 1
    path.write_bytes(changed)
    assert refusal(path) == "its checksum does not fit its content; it is broken, fetch it again"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it has 0 bytes, too few for a capsule; it may be cut short"),
        (b"PK\x03\x04 and so on, a zip of torch.save", "its header is to have"),
        (
            (2**60).to_bytes(8, "little"),
            "its header is to have 1152921504606846976 bytes, and that",
        ),
        ((2**24).to_bytes(8, "little") + b"{", "it ends within its header, after 9 bytes"),
        ((2).to_bytes(8, "little") + b"{}", "it does not begin as a capsule does"),
        (b"\x10" + bytes(7) + b'{"a": [1, 2, 3]}', "it does not begin as a capsule does"),
    ],
)
def test_other_files(tmp_path, content, said):
    """Each is refused by what is wrong with it."""
    path = tmp_path / "other"
    path.write_bytes(content)
    assert refusal(path).startswith(said)


def test_another_schema(file):
    """A file of a later nanhunt is not guessed at."""
    file.write_bytes(file.read_bytes().replace(b'"capsule 1"', b'"capsule 2"', 1))
    assert refusal(file) == (
        "it has schema 2 and this nanhunt reads schema 1; read it with the nanhunt that wrote it"
    )


def test_what_is_no_file(tmp_path):
    """A folder, a pipe that nobody writes to, a device, nothing at all."""
    assert refusal(tmp_path) == "it is a folder; give a file that nanhunt wrote"
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe").startswith("it is not a regular file")
    assert refusal(Path("/dev/zero")).startswith("it is not a regular file")
    assert refusal(tmp_path / "none").startswith("cannot be read (no such file or directory)")
    assert refusal(f"{tmp_path}/a\0b").startswith("cannot be")


WIDE = ",".join(["9223372036854775807"] * 64)
HOSTILE = {
    "deep header": HEAD + b"0" * 64 + b'","record":' + b"[" * 400_000 + b"]" * 400_000 + b"}}",
    "deep record": header_of("[" * 900_000),
    "deep batch": header_of('{"batch":' + '["list",' * 90_000 + "1" + "]" * 90_000 + "}"),
    "many values": header_of('{"views":[' + "[]," * 300_000 + "[]]}"),
    "too many values": header_of('{"views":[' + "[]," * 900_000 + "[]]}"),
    "long number": header_of('{"step":' + "9" * 1_000_000 + "}"),
    "NaN": header_of('{"step":NaN}'),
    "a key twice": header_of("{}", '"a":{},"a":{}'),
    "a list": header_of("[]"),
    "huge shape": header_of(
        "{}", f'"a":{{"dtype":"U8","shape":[{WIDE}],"data_offsets":[0,0]}}'
    ),
    "far offset": header_of(
        "{}", '"a":{"dtype":"U8","shape":[4611686018427387904],"data_offsets":[0,1]}'
    ),
    "unknown dtype": header_of("{}", '"a":{"dtype":"X8","shape":[0],"data_offsets":[0,0]}'),
    "overlapping": header_of(
        "{}",
        '"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
        '"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(tmp_path, name):
    """Headers that ask for depth, length or memory cost neither."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refusal(made(tmp_path / "hostile", HOSTILE[name], bytes(8)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


def view(**changes):
    """A change of the first view of a record."""
    return lambda record: record["views"][0].update(changes)


HUGE = 2**62
CHANGES = [
    (view(offset=-8), "a tensor looks at region"),
    (view(offset=1), "a tensor looks at bytes"),
    (view(region=999), "a tensor looks at region 999; there are"),
    (view(shape=[HUGE], strides=[1]), "a tensor has the shape (4611686018427387904,), larger than"),
    (view(shape=[10**9], strides=[1]), "a tensor looks at bytes"),
    (view(shape=[3, 1, 3]), "a shape of 3 has strides of 2"),
    (view(shape=[2], strides=[-1]), "a tensor has the strides (-1,), which cannot be"),
    (view(dtype="qint8"), "a tensor is of dtype 'qint8', which no capsule holds"),
    (view(dtype="load"), "a tensor is of dtype 'load', which no capsule holds"),
    (lambda r: r.update(step="3"), "its step is not what a capsule has there"),
    (lambda r: r.update(model=3), "its record has no list of parameters"),
    (lambda r: r.update(model=[["a", 1]]), None),
    (lambda r: r.pop("batch"), "its record has no batch"),
    (lambda r: r.update(batch=["pickle", "cos"]), "'pickle' is no kind of value that this nanhunt"),
    (lambda r: r.update(batch=["tensor", 10**6]), "there is no tensor 1000000; there are"),
    (lambda r: r.update(batch=["dtype", "hub"]), "'hub' is no dtype of torch"),
    (lambda r: r.update(batch=["record", "os:x", ["__class__"], [1]]), "'os:x' has a field '__cla"),
    (lambda r: r.update(batch=["named", "a:b", ["x", "x"], [1, 1]]), "'a:b' has 2 fields, some of"),
    (lambda r: r.update(batch=["named", "a:b", ["def"], [1]]), "'a:b' has a field 'def', which is"),
    (lambda r: r.update(batch=["scalar", "|O8", "00" * 8]), "an array is of dtype '|O8', which no"),
    (lambda r: r["tensors"].append(["sparse_coo", [1], [["tensor", len(r["tensors"])]] * 2]) or
        r.update(batch=["tensor", len(r["tensors"]) - 1]), "a sparse tensor is made of itself"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_hostile_records(file, change, said):
    """A checksum that fits is no reason to believe what a record says."""
    changed(file, change)
    if said is None:
        assert read_capsule(file).model == {}
    else:
        assert refusal(file).startswith(said)


BROKEN_STATES = [
    (2, lambda numbers: numbers.__setitem__(3, 10**6), "its state of numpy's generator is none"),
    (2, lambda numbers: numbers.__setitem__(1, "PCG64"), "its state of numpy's generator is none"),
    (
        1,
        lambda python: python.__setitem__(1, 9),
        "its states of the generators are none (state with",
    ),
    (3, lambda cpu: cpu.__setitem__(1, 0), "its state of torch's generator is none"),
]


@pytest.mark.parametrize(("place", "change", "said"), BROKEN_STATES)
def test_generators_that_are_none(file, place, change, said):
    """Also a state that numpy would take, and then read beyond its end with."""
    changed(file, lambda record: change(record["generators"][place][1]))
    assert refusal(file).startswith(said)


def test_an_expanded_tensor_costs_no_memory(file):
    """A shape larger than the memory behind it is what expanding makes."""
    changed(file, view(shape=[10**9], strides=[0]))
    read_capsule(file)


def test_reading_imports_nothing(file):
    """Neither the factory nor a type that a file names; and there is no pickle in the room."""
    code = (
        "import sys\n"
        "from nanhunt.capsule import read_capsule\n"
        "known = set(sys.modules)\n"
        f"read_capsule({str(file)!r})\n"
        "print(sorted(set(sys.modules) - known))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
    room = Path(read_capsule.__code__.co_filename).parent
    words = [path.name for path in room.glob("*.py") if "import pickle" in path.read_text()]
    assert words == []


# --- writing -------------------------------------------------------------------------------------


def full(*_):
    """What `os.write` does on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def small_capsule(step=0):
    """A capsule of a few kilobytes."""
    return capture(nn.Linear(2, 2), torch.ones(3), step=step)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    """After a failed write the folder is as it was."""
    path = write_capsule(small_capsule(1), tmp_path / "a.capsule")
    before = path.read_bytes()
    real, calls = os.write, []

    def soon_full(handle, content):
        calls.append(1)
        return real(handle, content[:100]) if len(calls) < 5 else full()

    monkeypatch.setattr(os, "write", soon_full)
    with pytest.raises(CapsuleError) as caught:
        write_capsule(small_capsule(2), path)
    assert str(caught.value) == (
        f"{path}: cannot be written (no space left on device); give a file in a folder that exists "
        f"and has room"
    )
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (before, [path])


def test_short_writes_are_gone_on_with(tmp_path, monkeypatch):
    """`os.write` may take a part only."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, content: real(handle, content[:777]))
    assert read_capsule(write_capsule(small_capsule(4), tmp_path / "a")).step == 4


def test_a_limit_on_the_size_of_files(tmp_path):
    """The kernel refuses to go on in the middle of the file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = CapsuleFolder(tmp_path / "capsules")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.warns(RuntimeWarning, match="could not store a capsule"):
            assert folder.store(small_capsule()) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in folder.path.iterdir()] == [".gitignore"]
    assert folder.store(small_capsule()) is not None


def test_only_its_owner_can_read_it(tmp_path):
    """It holds the user's data."""
    path = write_capsule(small_capsule(), tmp_path / "a")
    assert path.stat().st_mode & 0o077 == 0


# --- folders -------------------------------------------------------------------------------------


def test_a_folder_keeps_the_newest(tmp_path):
    """So many, and git does not see them."""
    folder = CapsuleFolder(tmp_path / "deep" / "capsules", keep=3)
    (tmp_path / "deep").mkdir()
    stored = []
    for step in range(6):
        stored.append(folder.store(small_capsule(step)))
        os.utime(stored[-1], (step, step))
        (folder.path / "mine.capsule").touch()
    assert folder.files() == stored[:2:-1]
    assert (folder.path / "mine.capsule").exists()
    assert "*\n" in (folder.path / ".gitignore").read_text()
    assert [read_capsule(path).step for path in folder.files()] == [5, 4, 3]


def test_a_folder_keeps_within_its_bytes_but_for_the_newest(tmp_path):
    """The newest stays even where it alone is too large."""
    folder = CapsuleFolder(tmp_path, keep=100, limit_bytes=1)
    for step in range(3):
        newest = folder.store(small_capsule(step))
    assert folder.files() == [newest]
    size = newest.stat().st_size
    roomy = CapsuleFolder(tmp_path, keep=100, limit_bytes=int(2.5 * size))
    for step in range(4):
        roomy.store(small_capsule(step))
    assert len(roomy.files()) == 2


def test_leftovers_of_killed_writers_go(tmp_path):
    """A draft whose writer lives stays, and so does a fresh one of another machine."""
    from nanhunt.capsule.container import host

    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead = tmp_path / f".capsule-{host()}-{child.pid}-abc.part"
    alive = tmp_path / f".capsule-{host()}-{os.getppid()}-abc.part"
    other, old = tmp_path / ".capsule-ffff-1-abc.part", tmp_path / ".capsule-ffff-2-abc.part"
    for path in (dead, alive, other, old):
        path.touch()
    os.utime(old, (0, 0))
    CapsuleFolder(tmp_path).store(small_capsule())
    assert [path.exists() for path in (dead, alive, other, old)] == [False, True, True, False]


@pytest.mark.parametrize("fault", ["full", "read-only", "in the way", "vanished", "unfit"])
def test_a_training_goes_on(tmp_path, monkeypatch, fault):
    """One warning, then silence; and when it works again, it works again."""
    folder = CapsuleFolder(tmp_path / "capsules")
    with monkeypatch.context() as patch:
        if fault == "full":
            patch.setattr(os, "write", full)
        elif fault == "read-only":
            patch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "")))
        elif fault == "in the way":
            (tmp_path / "capsules").touch()
        elif fault == "vanished":
            patch.setattr(Path, "mkdir", lambda *_, **__: None)
        else:
            patch.setattr("nanhunt.capsule.record.spell", lambda _: 1 / 0)
        with pytest.warns(RuntimeWarning, match="could not store a capsule in .*the training goes"):
            assert folder.store(small_capsule()) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert folder.store(small_capsule()) is None
        assert folder.failure
    if fault == "in the way":
        (tmp_path / "capsules").unlink()
    assert folder.store(small_capsule()) is not None
    assert folder.failure == ""


def test_a_warning_that_is_an_error_does_not_stop_the_training(tmp_path, capsys):
    """Under `python -W error` the sentence goes to stderr."""
    (tmp_path / "capsules").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CapsuleFolder(tmp_path / "capsules").store(small_capsule()) is None
    assert "nanhunt could not store a capsule" in capsys.readouterr().err


# --- at length -----------------------------------------------------------------------------------


def run(program, *words):
    """Run one of the programs beside this file, and read what it prints."""
    command = [sys.executable, "-W", "error", str(PROGRAMS / program), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=900, env=environment
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout)


def test_writers_killed_at_any_moment(tmp_path):
    """No broken capsule is ever taken, and none that was complete is lost."""
    found = run("kill.py", 3, 100 if LONG else 20, tmp_path)
    assert found["left"] == []
    assert found["whole"] > 0
    assert found["drafts"] > 0  # some were really killed in the midst of writing


def test_broken_capsules(file):
    """However a file is broken, it is refused in one sentence, fast and in little memory."""
    count = 5000 if LONG else 250
    assert [named for named, _ in named_tensors(read_capsule(file).batch)]
    found = run("mutate.py", 11, count, 256, "capsule", file)
    assert found["refused"] > 0.8 * count
    assert found["longest"] < 1.0


def test_broken_reports(incident_report, tmp_path):
    """The same for saved reports."""
    store.save(incident_report, tmp_path / "report.json")
    count = 5000 if LONG else 250
    found = run("mutate.py", 12, count, 256, "report", tmp_path / "report.json")
    assert found["refused"] > 0.5 * count
    assert found["longest"] < 1.0
