"""Packed files that were cut short, changed or made to do harm are refused in one line, without memory to speak of."""

from __future__ import annotations

import base64
import json
import random
import resource
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from bayeslora import BayesLoraError, export, load_packed
from bayeslora.export.container import CHECKSUM_KEY, CODES, DTYPES, INDEX_KEY, checksum
from tests.methods import variational_models
from tests.methods.reference import FROZEN, Tiny, seeded, tiny_model

FILE = "adapter_model.safetensors"
FAST, SLOW = 150, 2_000
MAX_HEADER = 100_000_000  # of safetensors
VALUES: list[Any] = [
    None, True, -1, 0, 1, 2, 5, 99, 2**31, 2**40, 2**63, 10**30, -0.5, 1e308, "", "A", "9:x", "../../etc/passwd", [],
    [[]], [-1, 4], [2**31, 2**31], [2**62, 4], {}, {"a": 1}, "A" * 5000, [1] * 3000,
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Real packed adapters: quantized, with ranges a channel, of ranks alone, and of another method."""
    folder = tmp_path_factory.mktemp("packed")
    models = [
        tiny_model(FROZEN),
        tiny_model(FROZEN, mode="q", per_channel=True, quantize_input=True, seed=2),
        tiny_model(FROZEN, mode="ra"),
        variational_models.tiny("melora"),
    ]
    for index, model in enumerate(models):
        export(model.eval(), folder / str(index), format="packed")
    return [folder / str(index) for index in range(len(models))]


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _joined(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _index(header: dict[str, Any]) -> dict[str, Any]:
    return json.loads(zlib.decompress(base64.b85decode(header["__metadata__"][INDEX_KEY])))


def _with_index(header: dict[str, Any], index: Any, data: bytes) -> bytes:
    """The file with another index and a checksum that is right for it: the work of an attacker, not of chance."""
    text = base64.b85encode(zlib.compress(json.dumps(index).encode())).decode()
    header["__metadata__"][INDEX_KEY] = text
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            part = bytearray(data[entry["data_offsets"][0] : entry["data_offsets"][1]])
            flat = torch.frombuffer(part, dtype=DTYPES[entry["dtype"]]) if part else torch.zeros(0)
            tensors[name] = flat.to(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    header["__metadata__"][CHECKSUM_KEY] = checksum(text, tensors)
    return _joined(header, data)


def _anywhere(value: Any, new: Any, generator: random.Random) -> Any:
    """`value` with one of its parts, at any depth, replaced, removed or doubled."""
    if isinstance(value, dict) and value and generator.random() < 0.9:
        key = generator.choice(sorted(value))
        if generator.random() < 0.15:
            return {name: part for name, part in value.items() if name != key}
        return {**value, key: _anywhere(value[key], new, generator)}
    if isinstance(value, list) and value and generator.random() < 0.8:
        place = generator.randrange(len(value))
        if generator.random() < 0.15:
            return value + value[place:]
        return [*value[:place], _anywhere(value[place], new, generator), *value[place + 1 :]]
    return new


def _flipped(data: bytes, generator: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(generator.choice([1, 1, 1, 2, 8])):
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def _cut(data: bytes, generator: random.Random) -> bytes:
    return data[: generator.choice([0, 4, 8, 9, generator.randrange(len(data))])]


def _grown(data: bytes, generator: random.Random) -> bytes:
    place = generator.randrange(len(data) + 1)
    return data[:place] + generator.randbytes(generator.randint(1, 20)) + data[place:]


def _other_length(data: bytes, generator: random.Random) -> bytes:
    return struct.pack("<Q", generator.choice([0, 1, MAX_HEADER + 1, 2**40, 2**63, 2**64 - 1])) + data[8:]


def _other_header(data: bytes, generator: random.Random) -> bytes:
    header, rest = _split(data)
    return _joined(_anywhere(header, generator.choice(VALUES), generator), rest)


def _other_index(data: bytes, generator: random.Random) -> bytes:
    header, rest = _split(data)
    return _with_index(header, _anywhere(_index(header), generator.choice(VALUES), generator), rest)


def _other_data(data: bytes, generator: random.Random) -> bytes:
    header, rest = _split(data)
    return _with_index(header, _index(header), _flipped(rest, generator))


MUTATIONS = [_flipped, _cut, _grown, _other_length, _other_header, _other_index, _other_data]


def _mutate(folders: list[Path], path: Path, cases: int, seed: int) -> dict[str, int]:
    """Writes and reads `cases` mutated files; counts what was refused and what passed."""
    generator = random.Random(seed)
    originals = [(folder / FILE).read_bytes() for folder in folders]
    counted = dict.fromkeys([change.__name__ for change in MUTATIONS], 0)
    for case in range(cases):
        change = MUTATIONS[case % len(MUTATIONS)]
        original = generator.choice(originals)
        path.write_bytes(changed := change(original, generator))
        try:
            state = load_packed(path)
        except BayesLoraError as error:
            assert "\n" not in str(error) and len(str(error)) < 500, str(error)
            counted[change.__name__] += 1
            continue
        # What is read after all has the sizes of its bytes, and only a right checksum lets different content through.
        assert sum(tensor.nbytes for tensor in state.values()) < 32 * len(changed)
        assert change in (_other_index, _other_data, _other_header, _grown) or changed == original
    return counted


def _check(counted: dict[str, int], cases: int) -> None:
    share = cases // len(MUTATIONS)
    for certain in ("_cut", "_other_length"):
        assert counted[certain] >= share
    assert counted["_flipped"] >= 0.97 * share  # a bit may come back by a second flip
    assert counted["_grown"] >= 0.9 * share  # white space between the header's parts means nothing
    assert counted["_other_header"] > 0.6 * share and counted["_other_index"] > 0.6 * share


def test_mutated_files_are_refused_in_one_line(folders: list[Path], tmp_path: Path) -> None:
    _check(_mutate(folders, tmp_path / FILE, FAST, seed=0), FAST)


@pytest.mark.slow
def test_thousands_of_mutated_files_are_refused_in_one_line(folders: list[Path], tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _check(_mutate(folders, tmp_path / FILE, SLOW, seed=1), SLOW)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_every_single_flipped_bit_of_codes_and_header_is_found(folders: list[Path], tmp_path: Path) -> None:
    data = (folders[0] / FILE).read_bytes()
    path = tmp_path / FILE
    for place in range(8, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        if json_equal(data, bytes(changed)):
            continue
        with pytest.raises(BayesLoraError):
            load_packed(path)


def json_equal(first: bytes, second: bytes) -> bool:
    """Whether two files differ in nothing but white space of the header."""
    try:
        return _split(first) == _split(second)
    except ValueError:
        return False


def _index_cases() -> dict[str, Callable[[dict[str, Any]], Any]]:
    return {
        "a rank below zero": lambda i: {**i, "ranks": [-1, *i["ranks"][1:]]},
        "a rank of a billion": lambda i: {**i, "ranks": [10**9, *i["ranks"][1:]]},
        "a rank that overflows": lambda i: {**i, "ranks": [2**63, *i["ranks"][1:]]},
        "a huge shape": lambda i: {**i, "shapes": [[2**30, 2**30]] * len(i["shapes"])},
        "a negative shape": lambda i: {**i, "shapes": [[-12, 10], *i["shapes"][1:]]},
        "a shape of nothing": lambda i: {**i, "shape": [7] * len(i["shape"])},
        "an unknown width": lambda i: {**i, "widths": i["widths"].replace(i["widths"][0], "6")},
        "a missing matrix": lambda i: {**i, "widths": i["widths"][:2] + "0" + i["widths"][3:]},
        "missing widths": lambda i: {**i, "widths": i["widths"][:-1]},
        "a range that is no number": lambda i: {**i, "ranges": _floats(i, float("nan"))},
        "an infinite range": lambda i: {**i, "ranges": _floats(i, float("inf"))},
        "a range of zero": lambda i: {**i, "ranges": _floats(i, float("-inf"))},
        "a range beyond use": lambda i: {**i, "ranges": _floats(i, 80.0)},
        "missing ranges": lambda i: {**i, "ranges": ""},
        "a layer twice": lambda i: {**i, "layers": [i["layers"][0], "5:"]},
        "a name before any": lambda i: {**i, "layers": ["3:x", i["layers"][1]]},
        "a name with a line break": lambda i: {**i, "layers": ["0:fir\nst", i["layers"][1]]},
        "a missing layer": lambda i: {**i, "layers": i["layers"][:1]},
        "another method": lambda i: {**i, "method": "../blora"},
        "a version of the future": lambda i: {**i, "version": 2},
        "a version that is true": lambda i: {**i, "version": True},
        "no object": lambda i: [i],
    }


def _floats(index: dict[str, Any], value: float) -> str:
    count = len(base64.b64decode(index["ranges"])) // 4
    return base64.b64encode(struct.pack(f"<{count}f", value, *[0.0] * (count - 1))).decode()


@pytest.mark.parametrize("case", list(_index_cases()))
def test_a_hostile_index_with_a_right_checksum_is_refused(case: str, folders: list[Path], tmp_path: Path) -> None:
    header, data = _split((folders[0] / FILE).read_bytes())
    (tmp_path / FILE).write_bytes(_with_index(header, _index_cases()[case](_index(header)), data))
    with pytest.raises(BayesLoraError) as caught:
        load_packed(tmp_path)
    assert "\n" not in str(caught.value)


def _header_cases() -> dict[str, Callable[[dict[str, Any], int], Any]]:
    def entry(**change: Any) -> Callable[[dict[str, Any], int], Any]:
        return lambda header, size: {**header, CODES: {**header[CODES], **change}}

    return {
        "a shape of 2^62 bytes": entry(shape=[2**62]),
        "a product that overflows": entry(shape=[2**33, 2**33]),
        "a negative size": entry(shape=[-1, -517]),
        "offsets beyond the file": entry(data_offsets=[0, 10**9], shape=[10**9]),
        "offsets the wrong way": entry(data_offsets=[5, 0]),
        "another type": entry(dtype="F32"),
        "an unknown type": entry(dtype="PICKLE"),
        "a type that is a list": entry(dtype=["U8"]),
        "dimensions without end": entry(shape=[1] * 100_000),
        "overlapping tensors": lambda header, size: {**header, "other": header[CODES]},
        "a tensor of no bytes and 2^62 rows": lambda header, size: {
            **header,
            "other": {"dtype": "U8", "shape": [2**62, 0], "data_offsets": [size, size]},
        },
        "no codes": lambda header, size: {"__metadata__": header["__metadata__"], "codes": header[CODES]},
        "no index": lambda header, size: {**header, "__metadata__": {"format": "pt", CHECKSUM_KEY: "0"}},
        "metadata that are a list": lambda header, size: {**header, "__metadata__": [INDEX_KEY]},
        "brackets without end": lambda header, size: {**header, "deep": json.loads("[" * 900 + "]" * 900)},
    }


@pytest.mark.parametrize("case", list(_header_cases()))
def test_a_hostile_header_is_refused(case: str, folders: list[Path], tmp_path: Path) -> None:
    header, data = _split((folders[0] / FILE).read_bytes())
    (tmp_path / FILE).write_bytes(_joined(_header_cases()[case](header, len(data)), data))
    with pytest.raises(BayesLoraError) as caught:
        load_packed(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_bombs_and_endless_brackets_are_refused_in_bounded_memory(folders: list[Path], tmp_path: Path) -> None:
    """In a process of its own that may have 200 MB more than it starts with, where the bomb has 268."""
    header, data = _split((folders[0] / FILE).read_bytes())
    bomb = dict(header, __metadata__=dict(header["__metadata__"]))
    bomb["__metadata__"][INDEX_KEY] = base64.b85encode(zlib.compress(b" " * (1 << 28), 9)).decode()
    (tmp_path / "bomb").write_bytes(_joined(bomb, data))
    deep = f'{{"{INDEX_KEY}":'.encode() + b"[" * 1_000_000
    (tmp_path / "deep").write_bytes(struct.pack("<Q", len(deep)) + deep)
    long = b"{" + b" " * (MAX_HEADER + 10)
    (tmp_path / "long").write_bytes(struct.pack("<Q", len(long)) + long)
    code = """
import resource, sys
from bayeslora import BayesLoraError, load_packed
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, used + 200_000_000))
for name in sys.argv[1:]:
    try:
        load_packed(name)
    except BayesLoraError as error:
        print("refused", len(str(error).splitlines()))
"""
    paths = [str(tmp_path / name) for name in ("bomb", "deep", "long")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["refused 1"] * 3, done.stderr


def test_paths_that_are_no_files_are_refused(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "link", tmp_path / "missing", Path("/dev/zero")):
        with pytest.raises(BayesLoraError, match="missing or not a file"):
            load_packed(path)


def test_pefts_own_loader_refuses_damaged_files_the_same_way(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((folders[0] / "adapter_config.json").read_bytes())
    data = (folders[0] / FILE).read_bytes()
    generator = random.Random(5)
    for change in (_flipped, _cut, _other_length, lambda data, _: data[:3], lambda data, _: b""):
        (tmp_path / FILE).write_bytes(change(data, generator))
        with warnings.catch_warnings(), pytest.raises(BayesLoraError) as caught:
            warnings.simplefilter("ignore")
            PeftModel.from_pretrained(seeded(Tiny), tmp_path)
        assert "\n" not in str(caught.value)
