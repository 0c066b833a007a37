"""Reads many broken files in one process of bounded memory: argv is SEED COUNT LIMIT KIND FILE.

KIND is `capsule` or `report`. Half of the capsules get a checksum that fits, so that what comes
after the checksum is met as well. Prints one JSON object; what is not refused properly raises.
"""

import copy
import hashlib
import json
import random
import resource
import sys
import time
from pathlib import Path

from nanhunt.errors import CapsuleError, StoreError

# Numbers and words that a hasty reader believes.
TOKENS = (
    b"-1", b"0", b"1", b"255", b"2147483648", b"9223372036854775807", b"9223372036854775808",
    b"1152921504606846976", b"1e400", b"-0.0", b"NaN", b"null", b"true", b"[]", b"{}", b'""',
    b'"../../etc/passwd"', b'"__class__"', b'"os:system"', b"[[[[[[[[[[[[", b"]]]]", b"9" * 5000,
    b'"tensor"', b'"array"', b'"record"', b'"named"', b'"sparse_coo"', b'"qint8"', b'"O8"',
)  # fmt: skip


VALUES = (
    None, True, -1, 0, 1, 7, 2**31, 2**63 - 1, 2**63, -(2**63), 2**60, 1.5, 1e308, "", "x", "uint8",
    "float64", "complex64", "qint8", "<f8", "|O8", "<U9999999", "cuda:0", "__class__", "../../etc",
    [], {}, [[]], ["tensor", 0], ["tensor", 1], ["array", 0], ["array", 5], ["view", 0, "conj"],
    ["record", "os:system", ["a"], [1]], ["named", "a:b", ["x", "y"], [1, 2]], ["dict", [1, 2]],
    ["sparse_coo", [2**60], [["tensor", 0], ["tensor", 1]]], ["absent", "a", "b"], ["float", "nan"],
    ["numbers", "list", ["array", 0]], ["bytes", ["array", 0]], ["scalar", "<f8", "00" * 8],
    ["size", 2**62, 2**62], ["device", "cuda:99"], ["dtype", "onnx"], [2**62, 2**62], [1] * 70,
)  # fmt: skip


def mutate(content, rng):
    """The content with one to four changes of one kind each."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        rng.choice((flip, cut, insert, double, replace_number, replace_word, lengthen))(
            changed, rng
        )
    return bytes(changed)


def flip(content, rng):
    """One bit."""
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def cut(content, rng):
    """Some bytes, or all from a place on."""
    start = rng.randrange(len(content) + 1)
    del content[start : None if rng.random() < 0.3 else start + rng.randint(1, 64)]


def insert(content, rng):
    """A token."""
    start = rng.randrange(len(content) + 1)
    content[start:start] = rng.choice(TOKENS)


def double(content, rng):
    """A stretch once more, somewhere else."""
    start, size = rng.randrange(len(content) + 1), rng.randint(1, 200)
    place = rng.randrange(len(content) + 1)
    content[place:place] = content[start : start + size]


def replace_number(content, rng):
    """The digits next to a place."""
    start = rng.randrange(len(content) + 1)
    while start < len(content) and not 48 <= content[start] <= 57:
        start += 1
    end = start
    while end < len(content) and 48 <= content[end] <= 57:
        end += 1
    content[start:end] = rng.choice(TOKENS)


def replace_word(content, rng):
    """What stands between two quotation marks next to a place."""
    start = content.find(b'"', rng.randrange(len(content) + 1))
    end = content.find(b'"', start + 1)
    if 0 <= start < end:
        content[start : end + 1] = rng.choice(TOKENS)


def lengthen(content, rng):
    """The first eight bytes, where a capsule has the length of its header."""
    content[:8] = rng.choice((0, 1, 100, 2**20, 2**40, 2**60, 2**64 - 1)).to_bytes(8, "little")


def sealed(content):
    """A capsule with the checksum that it should have, if it still looks like one."""
    mark = b'"checksum":"'
    place = content.find(mark, 8, 200) + len(mark)
    if place < len(mark):
        return content
    end = place + 64
    digest = hashlib.blake2b(content[:place] + b"0" * 64 + content[end:], digest_size=32)
    return content[:place] + digest.hexdigest().encode() + content[end:]


def fitted(content, header):
    """A capsule whose header was changed, with its length."""
    data = content[8 + int.from_bytes(content[:8], "little") :]
    return len(header).to_bytes(8, "little") + header + data


def swap(tree, rng):
    """One value somewhere in what JSON holds becomes another."""
    while True:
        key = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        if isinstance(tree[key], dict | list) and tree[key] and rng.random() < 0.9:
            tree = tree[key]
            continue
        tree[key] = copy.deepcopy(rng.choice(VALUES))
        return


def inside(header, rng):
    """A header whose record is still JSON, and says something else; or whose entries do."""
    table = json.loads(header)
    record = json.loads(table["__metadata__"]["record"])
    for _ in range(rng.randint(1, 3)):
        trees = (record, record, record.get("tensors"), record.get("views"), table)
        swap(rng.choice([tree for tree in trees if tree and isinstance(tree, dict | list)]), rng)
    entries = {name: entry for name, entry in table.items() if name != "__metadata__"}
    tail = json.dumps(entries)[1:-1]
    start = header[: header.index(b'","record":') + len(b'","record":')]
    body = start + json.dumps(json.dumps(record)).encode() + b"}"
    return body + (f",{tail}" if tail else "").encode() + b"}"


def broken(content, rng, kind):
    """One broken file, and whether its checksum was made to fit."""
    way = rng.randrange(4) if kind == "capsule" else 0
    if kind == "report" and rng.random() < 0.5:
        tree = json.loads(content)
        swap(tree, rng)
        return json.dumps(tree).encode(), False
    if way < 2:
        return mutate(content, rng), False
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    return sealed(fitted(content, mutate(header, rng) if way == 2 else inside(header, rng))), True


def check(sentence):
    """One line, and not the whole file in it."""
    assert "\n" not in sentence, sentence
    assert len(sentence) < 600, len(sentence)


def main():
    """Read them all."""
    seed, count, room, kind, file = sys.argv[1:]
    if kind == "capsule":
        from nanhunt.capsule import read_capsule as read
    else:
        from nanhunt.store import load as read
    content, path = Path(file).read_bytes(), Path(file).with_suffix(".broken")
    read(file)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(room) * 2**20,) * 2)
    rng, refused, longest = random.Random(int(seed)), 0, 0.0  # noqa: S311 - to come again
    for _ in range(int(count)):
        mutant, is_sealed = broken(content, rng, kind)
        path.write_bytes(mutant)
        start = time.process_time()
        try:
            read(path)
        except (CapsuleError, StoreError) as error:
            refused += 1
            check(str(error))
        else:
            assert kind == "report" or is_sealed or mutant == content, "a broken file was taken"
        longest = max(longest, time.process_time() - start)
    sys.stdout.write(json.dumps({"refused": refused, "longest": longest}))


if __name__ == "__main__":
    main()
