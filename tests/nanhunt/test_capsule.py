"""What a capsule holds comes again: strides, aliases, dtypes, structure, generators, settings."""

import collections
import dataclasses
import functools
import json
import math
import random
import sys
import types

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from nanhunt.capsule import (
    Absent,
    Settings,
    capture,
    open_capsule,
    read_capsule,
    read_settings,
    settings_applied,
    unused,
    write_capsule,
)
from nanhunt.errors import CapsuleError
from nanhunt.generators import read_generators
from nanhunt.structure import map_tensors
from nanhunt.subject import Subject

Point = collections.namedtuple("Point", "x index")  # noqa: PYI024 - as users write them


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """A frozen batch that checks what it is given."""

    y: Tensor
    names: list
    made: int = dataclasses.field(init=False, default=3)

    def __post_init__(self):
        if not isinstance(self.names, list):
            raise TypeError("names")

    @property
    def samples(self):
        """Its size."""
        return len(self.y)


@pytest.fixture
def again(tmp_path):
    """Write a batch and read it back."""

    def there_and_back(batch):
        path = write_capsule(capture(nn.Linear(1, 1), batch), tmp_path / "a.capsule")
        return read_capsule(path)

    return there_and_back


def bits(tensor):
    """The bits of a tensor's elements."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.contiguous().reshape(-1).view(torch.uint8).tolist()


def base():
    """Numbers with everything in them that floats have."""
    return torch.tensor([[1.0, -0.0, math.nan], [math.inf, 1e-40, -2.5]])


TENSORS = {
    "transposed": base().t(),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "expanded": torch.ones(3, 1).expand(3, 5),
    "overlapping": torch.arange(10).unfold(0, 4, 2),
    "every second": torch.arange(10.0)[1::2],
    "offset": torch.arange(9.0)[1:],
    "odd offset": torch.arange(9, dtype=torch.uint8)[1:],
    "complex128": torch.randn(3, 2, dtype=torch.complex128),
    "conj view": torch.randn(3, dtype=torch.complex64).conj(),
    "neg view": torch.randn(3, dtype=torch.complex64).conj().imag,
    "zero dimensions": torch.tensor(math.nan),
    "empty": torch.empty(0, 3),
    "empty, strided": torch.empty(3, 4)[:, 1:1],
    "bool": torch.tensor([True, False]),
    "float8": torch.randn(5).to(torch.float8_e4m3fn),
    "float8 without a name": torch.randn(5).to(torch.float8_e5m2fnuz),
    "bfloat16": torch.randn(3).bfloat16(),
    "half": torch.randn(3).half(),
    "uint16": torch.tensor([65535], dtype=torch.uint16),
    "learns": torch.ones(3, requires_grad=True),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(again, name):
    """Dtype, shape, strides, flags and bits come again, and nothing is missing."""
    tensor = TENSORS[name]
    capsule = again((tensor,))
    kept = capsule.batch[0]
    assert (kept.dtype, kept.shape, kept.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert (kept.is_conj(), kept.is_neg()) == (tensor.is_conj(), tensor.is_neg())
    assert kept.requires_grad == tensor.requires_grad
    assert bits(kept) == bits(tensor)
    assert capsule.incomplete == ()


@pytest.mark.parametrize("layout", ["coo", "coalesced", "csr", "csc", "bsr", "bsc"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors(again, layout):
    """Sparse tensors are stored as their parts."""
    dense = torch.eye(4, dtype=torch.float64) * 3
    if layout in ("coo", "coalesced"):
        twice = torch.sparse_coo_tensor([[1, 1, 3], [0, 0, 2]], [1.0, 2.0, math.nan], (4, 5))
        tensor = twice.coalesce() if layout == "coalesced" else twice
    elif layout in ("bsr", "bsc"):
        tensor = getattr(dense, f"to_sparse_{layout}")((2, 2))
    else:
        tensor = getattr(dense, f"to_sparse_{layout}")()
    kept = again([tensor]).batch[0]
    assert (kept.layout, kept.shape, kept.dtype) == (tensor.layout, tensor.shape, tensor.dtype)
    assert bits(kept.to_dense()) == bits(tensor.to_dense())
    if tensor.layout is torch.sparse_coo:
        assert kept.is_coalesced() == tensor.is_coalesced()
        assert bits(kept._values()) == bits(tensor._values())


def test_aliases(again):
    """Views of one memory still share it, whatever holds them, and one tensor stays one object."""
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    x = torch.arange(12.0).reshape(3, 4)
    batch = {"x": x, "t": x.t(), "row": x[1], "same": [x], "array": array}
    batch |= {"flipped": array[::-1, ::2], "shared": torch.from_numpy(array)}
    batch["as bytes"] = x.view(torch.uint8)
    kept = again(batch).batch
    kept["x"][1, 2] = 99
    kept["array"][0, 0] = 77
    assert (kept["t"][2, 1], kept["row"][2]) == (99, 99)
    assert kept["same"][0] is kept["x"]
    assert (kept["flipped"][3, 0], kept["shared"][0, 0]) == (77, 77)
    assert kept["flipped"].strides == array[::-1, ::2].strides
    assert kept["as bytes"][1, 8:12].tolist() == bits(kept["x"][1, 2])


def test_only_what_is_looked_at_is_stored(tmp_path):
    """A batch cut out of a large data set does not take the data set with it."""
    data = torch.zeros(1_000_000)
    path = write_capsule(capture(nn.Linear(1, 1), (data[10:20], data[50:60])), tmp_path / "a")
    assert path.stat().st_size < 40_000


PLAIN = [
    None, True, 0, -(2**63), 1.5, -0.0, "é\n\ud800", b"\x00\xff", bytearray(b"ab"), (), [], {},
    torch.Size([2, 3]), torch.float16, torch.device("cuda:1"), 1 + 2j, list(range(100)),
    tuple(range(-50, 50)), [0.1] * 30, {"b": 1, "a": [2, (3,)], 3: None, True: {}},
    collections.OrderedDict(z=1, a=2), np.float32(1.5), np.int64(-3), np.bool_(True),
    np.datetime64("2020-01-02"), np.str_("text"),
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values(again, value):
    """Everything that a batch may be made of comes again, in its own type and order."""
    capsule = again({"value": value})
    kept = capsule.batch["value"]
    assert type(kept) is type(value)
    assert repr(kept) == repr(value)
    assert capsule.incomplete == ()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks(again, value):
    """NaN and infinities, alone and many of them."""
    kept = again([value, [value] * 20]).batch
    assert repr(kept) == repr([value, [value] * 20])


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3)[:, ::-1],
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.array(3),
        np.empty((0, 2)),
        np.array(["a", "longer"]),
        np.array(["2020-01-02"], dtype="M8[D]"),
        np.arange(3, dtype=">f8"),
        np.broadcast_to(np.arange(3), (4, 3)),
        np.array([1 + 2j]),
    ],
)
def test_arrays(again, array):
    """Arrays of numbers, texts and times, with their strides."""
    kept = again([array]).batch[0]
    assert (kept.dtype, kept.strides, kept.shape) == (array.dtype, array.strides, array.shape)
    assert kept.tobytes() == array.tobytes()
    assert kept.flags.writeable == array.flags.writeable


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_what_cannot_be_stored_is_named(again):
    """The capsule says what it lacks, by the expression that reaches it, and holds the rest."""
    batch = {
        "f": len,
        "set": {1},
        "deep": functools.reduce(lambda inner, _: [inner], range(100), 1),
        "long": 2**70,
        "meta": torch.empty(2, device="meta"),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "objects": np.array([{}]),
        (1, 2): "a key",
        "x": torch.ones(2),
    }
    capsule = again(batch)
    deep = "batch['deep']" + "[0]" * 64
    assert capsule.incomplete == (
        "batch['f'] (builtin_function_or_method)",
        "batch['set'] (set)",
        f"{deep} (nested more than 64 deep)",
        "batch['long'] (a whole number beyond 64 bits)",
        "batch['meta'] (a tensor on the meta device, which holds no numbers)",
        "batch['quantised'] (a tensor of dtype qint8)",
        "batch['objects'] (an array of dtype object and 1 elements)",
        "batch[(1, 2)] (under a key that is tuple)",
    )
    assert capsule.batch["f"] == Absent("batch['f']", "builtin_function_or_method")
    assert capsule.batch["x"].tolist() == [1, 1]


def test_a_part_that_is_too_much_is_lost_alone(again):
    """Half a million texts do not take the tensors beside them with them, nor the model."""
    many = ["a"] * 400_000
    rows = [[k] * 20 for k in range(20_000)]
    capsule = again({"x": torch.ones(2), "many": many, "rows": rows, "y": [torch.zeros(1)]})
    assert capsule.incomplete == (
        "batch['many'] (more values than a capsule holds)",
        "batch['rows'] (more values than a capsule holds)",
    )
    assert (capsule.batch["x"].tolist(), capsule.batch["y"][0].tolist()) == ([1, 1], [0])
    assert list(capsule.model) == ["weight", "bias"]
    assert again([rows[:5000]]).batch == [rows[:5000]]
    assert again([["a"]] * 400_000).incomplete == ("batch (more values than a capsule holds)",)


def test_capture_knows_what_is_missing_before_it_is_written():
    """The same names as in the file, without a file."""
    assert capture(nn.Linear(1, 1), {"f": len}).incomplete == (
        "batch['f'] (builtin_function_or_method)",
    )


def test_classes_of_their_own_are_kept_as_what_they_are_made_of(again):
    """A subclass of a dict, a list or a tensor is plain afterwards, and that is said."""

    class Rows(list):
        pass

    class Image(Tensor):
        pass

    capsule = again([collections.Counter("ab"), Rows([1]), torch.ones(2).as_subclass(Image)])
    assert repr(capsule.batch) == "[{'a': 1, 'b': 1}, [1], tensor([1., 1.])]"
    assert [name.partition(";")[2] for name in capsule.incomplete] == [
        " kept as a dict)",
        " kept as a list)",
        " kept as a tensor)",
    ]


# --- named tuples and data classes ---------------------------------------------------------------


def test_types_are_rebuilt_without_importing(again, monkeypatch):
    """A named tuple and a data class are look-alikes: names, positions, and what nanhunt asks."""
    batch = Point(torch.ones(2), Scene(torch.zeros(3), ["a"]))
    monkeypatch.setitem(sys.modules, __name__, None)  # importing it would raise now
    kept = again(batch).batch
    assert type(kept) is not Point
    assert isinstance(kept, tuple)
    assert kept._fields == ("x", "index")
    assert kept.x is kept[0]
    scene = kept.index
    assert (scene.names, scene.made) == (["a"], 3)
    assert not hasattr(scene, "samples")
    assert [field.name for field in dataclasses.fields(scene)] == ["y", "names", "made"]
    doubled = map_tensors(kept, lambda t: t + 1)
    assert doubled.index.y.tolist() == [1, 1, 1]
    assert kept._replace(x=1)._asdict()["x"] == 1


def test_look_alikes_are_written_under_the_name_they_stand_for(again):
    """Reading and writing again loses nothing."""
    twice = again(again(Point(1, Scene(torch.ones(1), []))).batch)
    opened = open_capsule(twice, (nn.Linear(1, 1), 0, lambda model, batch: 0))
    assert type(opened.batches[0]) is Point


def subject_of(model, **given):
    """A subject with any batch."""
    return Subject(model, [None], lambda model, batch: 0, **given)


def test_types_that_the_subject_has_imported_are_taken(again, monkeypatch):
    """After the factory has run, its own types are known, without calling their constructors."""
    capsule = again([Point(1, Scene(torch.zeros(3), ["a"]))])
    monkeypatch.setattr(Scene, "__post_init__", lambda self: pytest.fail("was called"))
    point = open_capsule(capsule, subject_of(nn.Linear(1, 1))).batches[0][0]
    assert type(point) is Point
    assert (type(point.index), point.index.samples, point.index.made) == (Scene, 3, 3)


def test_a_type_with_other_fields_is_not_taken(again, monkeypatch):
    """The code has changed meanwhile: a look-alike keeps what was stored."""
    capsule = again(Point(1, 2))
    changed = collections.namedtuple("Point", "x y")  # noqa: PYI024
    monkeypatch.setitem(globals(), "Point", changed)
    batch = open_capsule(capsule, subject_of(nn.Linear(1, 1))).batches[0]
    assert batch._fields == ("x", "index")


def test_a_type_of_a_script_is_found_in_the_module_of_the_factory(again, monkeypatch):
    """What was `__main__` in the training is another module in the replay."""
    monkeypatch.setattr(Point, "__module__", "__main__")
    capsule = again(Point(1, 2))
    assert type(open_capsule(capsule, subject_of(nn.Linear(1, 1))).batches[0]) is Point


def test_a_module_is_not_asked_for_what_it_would_import(again, monkeypatch):
    """A name in a file does not reach a module's `__getattr__`."""
    home = types.ModuleType("lazy_home")
    home.__getattr__ = lambda name: pytest.fail(f"was asked for {name}")
    monkeypatch.setitem(sys.modules, "lazy_home", home)
    monkeypatch.setattr(Point, "__module__", "lazy_home")
    capsule = again(Point(1, 2))
    assert open_capsule(capsule, subject_of(nn.Linear(1, 1))).batches[0].x == 1


# --- the model and what goes with it -------------------------------------------------------------


def network():
    """Tied weights, a frozen one, a buffer that no state_dict has, modules of both modes."""
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    net[0].bias.requires_grad_(False)
    net.register_buffer("table", torch.randn(4), persistent=False)
    return net


def test_model_and_optimizer_come_again(tmp_path):
    """A freshly built subject stands where the training stood, to the bit."""
    model = network()
    model[1].eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.125)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    path = tmp_path / "a.capsule"
    write_capsule(capture(model, 0, optimizer=optimizer, scheduler=scheduler, step=7), path)
    torch.manual_seed(1)
    other = network()
    other[0].bias.requires_grad_(True)
    fresh = torch.optim.Adam(other.parameters())
    timetable = torch.optim.lr_scheduler.StepLR(fresh, 2)
    with torch.no_grad():
        other[2].weight.set_(other[2].weight.t().contiguous().t())  # other strides
    built = subject_of(other, optimizer=fresh, scheduler=timetable)
    opened = open_capsule(read_capsule(path), built)
    assert opened.step == 7
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    for (name, one), (same, two) in pairs:
        assert (name, bits(one), one.stride()) == (same, bits(two), two.stride())
        assert one.requires_grad == two.requires_grad
    assert bits(model.table) == bits(other.table)
    assert other[2].weight is other[0].weight
    assert [m.training for m in model.modules()] == [m.training for m in other.modules()]
    assert str(fresh.state_dict()) == str(optimizer.state_dict())
    assert timetable.state_dict() == scheduler.state_dict()


def test_optimizer_states_keep_their_dtype(tmp_path):
    """Torch would cast them to that of the parameter."""
    model = nn.Linear(2, 2).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["mean"] = torch.full((2, 2), 1 / 3)
    path = write_capsule(capture(model, 0, optimizer=optimizer), tmp_path / "a")
    other = nn.Linear(2, 2).bfloat16()
    fresh = torch.optim.SGD(other.parameters(), lr=0.5)
    open_capsule(read_capsule(path), subject_of(other, optimizer=fresh))
    assert bits(fresh.state[other.weight]["mean"]) == bits(torch.full((2, 2), 1 / 3))
    assert fresh.param_groups[0]["lr"] == 0.1


def test_wrappers_leave_no_trace_in_the_names():
    """A model that is compiled in the training is not in the replay, and the other way round."""
    model = nn.Sequential(nn.Linear(1, 1))
    shared = torch.compile(nn.DataParallel(model), backend="eager")
    capsule = capture(shared, 0)
    assert list(capsule.model) == ["0.weight", "0.bias"]
    assert open_capsule(capsule, subject_of(torch.compile(model, backend="eager"))).step == 0


def test_a_buffer_that_the_forward_makes_is_given_back(tmp_path):
    """A cache that the freshly built model does not have yet, or has in another size."""
    model = nn.Linear(1, 1)
    model.register_buffer("cache", torch.arange(5.0))
    path = write_capsule(capture(model, 0), tmp_path / "a")
    smaller = nn.Linear(1, 1)
    smaller.register_buffer("cache", torch.zeros(2))
    for other in (nn.Linear(1, 1), smaller):
        open_capsule(read_capsule(path), subject_of(other))
        assert other.cache.tolist() == [0, 1, 2, 3, 4]


def test_extra_state_is_named_and_not_given_back():
    """Giving it back would run the module's code on what a file holds."""

    class Counting(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

    model = nn.Sequential(Counting(1, 1))
    assert capture(model, 0).incomplete == ("model.0 (its extra state)",)


HINT = "; build it as it was in the training"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            nn.Linear(2, 4),
            "weight is float32[4, 2] in the subject and float32[3, 2] in the capsule",
        ),
        (
            nn.Linear(2, 3).double(),
            "weight is float64[3, 2] in the subject and float32[3, 2] in the",
        ),
        (nn.Linear(2, 3, bias=False), "bias of the capsule is not in the subject"),
        (nn.Sequential(nn.Linear(2, 3)), "0.weight is not in the capsule"),
        (nn.LazyLinear(3), "the subject's weight has no shape yet; call the model once"),
    ],
)
def test_a_model_that_does_not_fit(other, said):
    """One sentence that names the first parameter that differs."""
    with pytest.raises(CapsuleError) as caught:
        open_capsule(capture(nn.Linear(2, 3), 0), subject_of(other))
    assert said in str(caught.value)


def test_ties_that_do_not_fit():
    """A weight that was shared in the training has another gradient when it is not."""
    free = network()
    free[2].weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(CapsuleError) as caught:
        open_capsule(capture(network(), 0), subject_of(free))
    assert str(caught.value) == (
        "the capsule does not fit the subject: 2.weight is a tensor of its own in the subject and "
        "the same as 0.weight in the capsule" + HINT
    )


def test_a_buffer_that_the_capsule_lacks():
    """It would stand as the factory made it."""
    with pytest.raises(
        CapsuleError, match=r"^the capsule does not fit the subject: table is not in"
    ):
        open_capsule(capture(plain_network(), 0), subject_of(network()))


def plain_network():
    """The same network without its table."""
    net = network()
    del net.table
    return net


def test_parameters_of_the_optimizer_alone(tmp_path):
    """A trained weight of the loss belongs to no module, and comes again too."""
    model, weight = nn.Linear(1, 1), nn.Parameter(torch.tensor([2.5, 1.0]))
    optimizer = torch.optim.Adam([*model.parameters(), weight])
    path = write_capsule(capture(model, 0, optimizer=optimizer), tmp_path / "a")
    other, fresh = nn.Linear(1, 1), nn.Parameter(torch.zeros(2))
    own = torch.optim.Adam([*other.parameters(), fresh])
    open_capsule(read_capsule(path), subject_of(other, optimizer=own))
    assert fresh.tolist() == [2.5, 1.0]
    with pytest.raises(CapsuleError) as caught:
        open_capsule(
            read_capsule(path),
            subject_of(other, optimizer=torch.optim.Adam(other.parameters())),
        )
    assert str(caught.value) == (
        "the capsule does not fit the subject: beside the model, its optimizer held float32[2] and "
        "the subject's holds nothing"
    )


HOSTILE_STATES = [
    {"optimizer": {"state": {}, "param_groups": [{"params": 3}]}},
    {"optimizer": {"state": [], "param_groups": []}},
    {"scheduler": {"_schedulers": 3}},
    {"settings": Settings(scaler={"scale": "large"})},
]


@pytest.mark.parametrize("changes", HOSTILE_STATES)
def test_states_of_any_shape(changes):
    """What no optimizer, scheduler or scaler has written is refused, not met in the step."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    single = torch.optim.lr_scheduler.ConstantLR(optimizer)
    scheduler = torch.optim.lr_scheduler.ChainedScheduler([single])
    built = subject_of(model, optimizer=optimizer, scheduler=scheduler)
    with pytest.raises(CapsuleError, match="does not fit the subject"):
        open_capsule(dataclasses.replace(capture(model, 0), **changes), built)


def test_an_optimizer_that_does_not_fit():
    """Other groups of parameters."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    capsule = capture(model, 0, optimizer=optimizer)
    other = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
    with pytest.raises(CapsuleError, match="optimizer state of the capsule does not fit the subj"):
        open_capsule(capsule, subject_of(model, optimizer=other))


# --- generators and settings ---------------------------------------------------------------------


def test_generators(tmp_path):
    """The step draws the numbers that it drew."""
    random.gauss(0, 1)
    np.random.standard_normal()  # noqa: NPY002 - leaves half of a pair behind
    path = write_capsule(capture(nn.Linear(1, 1), 0), tmp_path / "a")
    drawn = random.gauss(0, 1), np.random.standard_normal(3), torch.rand(3)  # noqa: NPY002
    subject = open_capsule(read_capsule(path), subject_of(nn.Linear(1, 1)))
    subject.set_generators()
    again = random.gauss(0, 1), np.random.standard_normal(3), torch.rand(3)  # noqa: NPY002
    assert repr(again) == repr(drawn)


def test_generators_from_before_the_step():
    """What is given counts, not where they stand."""
    before = read_generators()
    torch.rand(5)
    assert capture(nn.Linear(1, 1), 0, generators=before).generators is before


def test_a_scaler_comes_again(tmp_path):
    """With its scale and its growth; a subject without one gets one."""
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    path = write_capsule(capture(nn.Linear(1, 1), 0, scaler=scaler), tmp_path / "a")
    capsule = read_capsule(path)
    own = torch.amp.GradScaler("cpu")
    for built in (subject_of(nn.Linear(1, 1)), subject_of(nn.Linear(1, 1), scaler=own)):
        assert open_capsule(capsule, built).scaler.state_dict() == scaler.state_dict()


def test_a_step_without_a_scaler_is_not_scaled():
    """The subject's own scaler is left out, and the report says so."""
    built = subject_of(nn.Linear(1, 1), scaler=torch.amp.GradScaler("cpu"))
    for scaler in (None, torch.amp.GradScaler("cpu", enabled=False)):
        capsule = capture(nn.Linear(1, 1), 0, scaler=scaler)
        assert open_capsule(capsule, built).scaler is None
        assert unused(capsule, built) == (
            "the subject's scaler is left out: the step of the capsule had none",
        )


def test_settings_are_applied_and_put_back(tmp_path):
    """Everything that decides over bits, for the time of a context."""
    model = nn.Linear(1, 1)
    before = read_settings(model)
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_float32_matmul_precision("medium")
        torch.set_default_dtype(torch.float64)
        torch.set_flush_denormal(True)
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.enable_flash_sdp(False)
        torch.set_num_threads(before.threads + 1)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            during = read_settings(model)
            path = write_capsule(capture(model, 0), tmp_path / "a")
    finally:
        torch.set_flush_denormal(False)
        with settings_applied(before):
            pass
        reset(before)
    assert read_settings(model) == before
    kept = read_capsule(path).settings
    assert kept == during != before
    with settings_applied(kept):
        assert read_settings(model) == kept
    assert read_settings(model) == before


def reset(settings):
    """Put settings back for good: what a context does on entering."""
    from nanhunt.capsule import switches

    switches._apply(settings)


def test_autocast_of_another_device_is_that_of_this_one():
    """A step under autocast on CUDA is replayed under autocast on the CPU."""
    settings = Settings(
        device="cuda", autocast=(("cpu", False, "bfloat16"), ("cuda", True, "float16"))
    )
    with settings_applied(settings, device="cpu"):
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") is torch.float16
    assert not torch.is_autocast_enabled("cpu")


def test_tensors_go_where_they_were(monkeypatch):
    """What was on the model's device follows it; what stayed on the CPU beside it stays there."""
    batch = {"lost": len, "x": torch.ones(2), "lengths": torch.ones(2)}
    devices = (("batch['lost']", "cuda:0"), ("batch['x']", "cuda:0"), ("batch['lengths']", "cpu"))
    model = nn.Linear(1, 1)
    capsule = capture(model, batch)
    settings = dataclasses.replace(capsule.settings, device="cuda")
    capsule = dataclasses.replace(capsule, settings=settings, devices=devices)
    opened = open_capsule(capsule, subject_of(model.to("meta"))).batches[0]
    assert (opened["x"].device.type, opened["lengths"].device.type) == ("meta", "cpu")
    opened = open_capsule(capsule, subject_of(nn.Linear(1, 1))).batches[0]
    assert (opened["x"].device.type, opened["lengths"].device.type) == ("cpu", "cpu")


# --- the file ------------------------------------------------------------------------------------


def test_the_file_is_one_of_safetensors(tmp_path):
    """Any reader of safetensors opens it and finds the tensors under their names."""
    weight = torch.randn(3, 2, dtype=torch.complex128)
    model = nn.Linear(2, 2)
    write_capsule(capture(model, {"w": weight, "t": base().t()}, step=3), tmp_path / "a.capsule")
    with safe_open(tmp_path / "a.capsule", "pt") as file:
        assert torch.equal(file.get_tensor("model.weight"), model.weight.detach())
        pairs = file.get_tensor("batch['w']")
        record = json.loads(file.metadata()["record"])
        assert [len(file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118
    assert torch.equal(torch.view_as_complex(pairs), weight)
    assert (record["step"], record["incomplete"]) == (3, ["tuple"])


def test_a_capsule_that_was_read_is_written_again(tmp_path):
    """And is the same file but for nothing."""
    first = write_capsule(capture(network(), [base().t(), Point(1, 2)]), tmp_path / "a")
    second = write_capsule(read_capsule(first), tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
