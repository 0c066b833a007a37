"""`nanhunt replay FILE.capsule`: the same culprit as in place, here and elsewhere."""

import dataclasses
import json
import sys

import pytest
import torch
from torch import nn

from nanhunt import cli, hunt, store
from nanhunt.capsule import capture, open_capsule, read_capsule, write_capsule
from nanhunt.commands import capsules
from nanhunt.loading import load
from nanhunt.replay import draw_batch, find_fingerprints
from nanhunt.replay.ends import fingerprint
from nanhunt.subject import Subject

FACTORIES = """
from dataclasses import dataclass

import torch
from torch import nn

@dataclass
class Batch:
    x: torch.Tensor
    tags: list

    def halved(self):
        return self.x / 2


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.inner = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.inner(x)))


def loss_fn(model, batch):
    y = model(batch.halved())
    return (y - y.detach()).pow(2).sum(1).sqrt().mean() + y.pow(2).mean()


def bare(width=4):
    return Net(width), None, loss_fn


def scaled():
    from nanhunt.subject import Subject

    net = Net()
    return Subject(net, [None], loss_fn, optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
                   scaler=torch.amp.GradScaler("cpu"))
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A file of factories, imported as the command line does it."""
    file = tmp_path / "capsule_factories.py"
    file.write_text(FACTORIES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield file
    sys.modules.pop("nanhunt_subject_capsule_factories", None)


def trained(spec, steps=3):
    """A plain loop until its gradients fail; the loop knows nothing of nanhunt."""
    subject = load(spec).subject
    batch_type = sys.modules["nanhunt_subject_capsule_factories"].Batch
    model, loss_fn = subject.model, subject.loss_fn
    optimizer = subject.optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(3)
    for step in range(steps):
        batch = batch_type(torch.randn(8, 3).t().contiguous().t(), ["a"] * 8)
        optimizer.zero_grad()
        held = capture(
            model, batch, optimizer=optimizer, scaler=subject.scaler, step=step, subject=spec
        )
        if step == steps - 1:
            path = write_capsule(held, "early.capsule")
        loss = loss_fn(model, batch)
        scaler = subject.scaler or torch.amp.GradScaler("cpu", enabled=False)
        scaler.scale(loss).backward()
        if step == steps - 1:
            return loss, model, scaler, path, optimizer
        for parameter in model.parameters():  # a loop that sanitises goes on
            parameter.grad = torch.nan_to_num(parameter.grad, 0.0, 0.0, 0.0) / scaler.get_scale()
        optimizer.step()
    raise AssertionError


def kept(spec, **changes):
    """A capsule with the fingerprint of the loop's own failing step."""
    loss, model, _, path, _ = trained(spec)
    assert any(not p.grad.isfinite().all() for p in model.parameters())
    print_ = fingerprint(loss.detach(), model)
    capsule = dataclasses.replace(
        read_capsule(path), loss=float(loss.detach()), fingerprint=print_, **changes
    )
    return write_capsule(capsule, path.with_name("kept.capsule"))


def run(capsys, monkeypatch, *words):
    """Run the command line: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["nanhunt", "replay", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    captured = capsys.readouterr()
    return left.value.code, captured.out, captured.err


ONE = "a capsule holds the one batch of one step"
GIVE = "give a file that nanhunt wrote"
QUICK = ("--quick", "--precision", "native", "--json", "report.json", "--exit-code")


def test_the_step_of_a_loop_comes_again_to_the_bit(code, capsys, monkeypatch):
    """Model, BatchNorm, dropout, strides and a data class: a capsule is enough for a bare tuple."""
    path = kept(f"{code.name}:bare")
    exit_code, out, _ = run(capsys, monkeypatch, path, "--trust", *QUICK)
    report = store.load("report.json")
    assert (exit_code, report.verdict) == (1, "culprit")
    assert report.capsule.bits == "equal to the bit"
    assert (report.capsule.step, report.capsule.file) == (2, "kept.capsule")
    assert "kept.capsule holds step 2; loss and gradients of the native replay" in out
    in_place = hunt(
        open_capsule(read_capsule(path), load(f"{code.name}:bare").subject), precisions=()
    )
    for one, other in zip(report.culprits, in_place.culprits, strict=True):
        assert one == other
    assert report.culprits[0].op == "aten::sqrt"
    assert report.culprits[0].step == 2


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_scaled_step_comes_again_to_the_bit(code, capsys, monkeypatch, unscaled):
    """Whether the loop looked at its gradients before or after the scaler divided them."""
    loss, model, scaler, path, optimizer = trained(f"{code.name}:scaled")
    if unscaled:
        scaler.unscale_(optimizer)
    capsule = dataclasses.replace(read_capsule(path), fingerprint=fingerprint(loss.detach(), model))
    write_capsule(capsule, path)
    run(capsys, monkeypatch, path, "--subject", f"{code.name}:scaled", *QUICK)
    assert store.load("report.json").capsule.bits == "equal to the bit"


def test_another_gradient_is_exit_code_3(code, capsys, monkeypatch):
    """On the same machine and build, what does not come again is not the step that failed."""
    path = kept(f"{code.name}:bare")
    write_capsule(dataclasses.replace(read_capsule(path), fingerprint="0" * 32), path)
    exit_code, out, _ = run(capsys, monkeypatch, path, "--trust", *QUICK)
    assert exit_code == 3
    assert "loss and gradients of the native replay differ from" in out
    assert store.load("report.json").capsule.bits == "differs"
    exit_code, _, _ = run(capsys, monkeypatch, path, "--trust", *QUICK[:-1])
    assert exit_code == 0


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("torch", "2.9.9", "other torch, 2.9.9, here "),
        ("build", "abc", "other build of torch"),
        ("processor", "Z80", "other processor, Z80, here "),
    ],
)
def test_another_machine_is_not_comparable(code, capsys, monkeypatch, name, value, why):
    """The culprit is the same; bits are not compared."""
    path = kept(f"{code.name}:bare")
    capsule = read_capsule(path)
    machine = tuple((key, value if key == name else known) for key, known in capsule.machine)
    write_capsule(dataclasses.replace(capsule, machine=machine, fingerprint="0" * 32), path)
    exit_code, _, _ = run(capsys, monkeypatch, path, "--trust", *QUICK)
    report = store.load("report.json")
    assert (exit_code, report.capsule.bits) == (1, "not comparable")
    assert report.capsule.why.startswith(why)
    assert report.culprits[0].op == "aten::sqrt"


def test_a_capsule_of_a_gpu_on_the_cpu(code, capsys, monkeypatch):
    """Its device is in the record only: the step runs here, and the culprit is the same."""
    path = kept(f"{code.name}:bare")
    capsule = read_capsule(path)
    generators = dataclasses.replace(
        capsule.generators, devices=(torch.zeros(16, dtype=torch.uint8),)
    )
    settings = dataclasses.replace(
        capsule.settings, device="cuda", autocast=(("cpu", False, "bfloat16"),)
    )
    machine = (*capsule.machine[:-1], ("device", "cuda NVIDIA H100"))
    made = dataclasses.replace(
        capsule,
        settings=settings,
        generators=generators,
        machine=machine,
        devices=(("batch.x", "cuda:0"),),
    )
    write_capsule(made, path)
    exit_code, _, _ = run(capsys, monkeypatch, path, "--trust", *QUICK)
    report = store.load("report.json")
    assert (exit_code, report.culprits[0].op) == (1, "aten::sqrt")
    assert report.capsule.bits == "not comparable"
    assert report.capsule.why == "other device, cuda NVIDIA H100, here cpu"
    assert report.capsule.device == "cuda"


def test_the_incident_in_a_capsule(tmp_path, capsys, monkeypatch):
    """The system of the case report: the same culprit as without a capsule."""
    monkeypatch.chdir(tmp_path)
    options = {"preset": "tiny"}
    subject = load("ris:incident", options=options).subject
    batch = draw_batch(subject, 0)
    subject.set_generators()
    capsule = capture(subject.model, batch, optimizer=subject.optimizer, subject="ris:incident")
    placed = dataclasses.replace(subject, generators=capsule.generators)
    (digest,) = find_fingerprints(placed, batch)
    write_capsule(dataclasses.replace(capsule, fingerprint=digest), "incident.capsule")
    words = ("incident.capsule", "--trust", "--set", "preset=tiny", *QUICK)
    exit_code, _, _ = run(capsys, monkeypatch, *words)
    report = store.load("report.json")
    assert (exit_code, report.capsule.bits) == (1, "equal to the bit")
    assert report.capsule.incomplete == ()
    assert report.culprits == hunt(subject, precisions=(), budget=0).culprits
    exit_code, _, err = run(capsys, monkeypatch, "incident.capsule", "--trust")
    assert exit_code == 2
    assert err.startswith("nanhunt: incident.capsule with ris:incident: the capsule does not fit")
    assert " is " in err
    assert "in the subject and " in err


def test_a_model_that_does_not_fit_is_one_sentence(code, capsys, monkeypatch):
    """It names the first parameter that differs."""
    path = kept(f"{code.name}:bare")
    words = (path, "--subject", f"{code.name}:bare", "--set", "width=5")
    exit_code, _, err = run(capsys, monkeypatch, *words)
    assert exit_code == 2
    assert err == (
        f"nanhunt: kept.capsule with {code.name}:bare: the capsule does not fit the subject: "
        "inner.weight is float32[5, 3] in the subject and float32[4, 3] in the capsule; build it "
        "as it was in the training\n"
    )


def test_what_a_file_names_is_not_imported_by_itself(code, capsys, monkeypatch):
    """Only with --trust, or when the user names a factory."""
    path = kept(f"{code.name}:bare")
    sys.modules.pop("nanhunt_subject_capsule_factories")
    exit_code, _, err = run(capsys, monkeypatch, path)
    assert exit_code == 2
    assert err == (
        f"nanhunt: kept.capsule names the factory '{code.name}:bare', and nothing that a file "
        "names is imported by itself; give --trust to import it, or "
        "--subject package.module:factory\n"
    )
    assert "nanhunt_subject_capsule_factories" not in sys.modules


def test_a_capsule_without_a_factory(capsys, monkeypatch, tmp_path):
    """There is nothing to trust."""
    monkeypatch.chdir(tmp_path)
    write_capsule(capture(nn.Linear(1, 1), 0), "a.capsule")
    for words in (("a.capsule",), ("a.capsule", "--trust")):
        exit_code, _, err = run(capsys, monkeypatch, *words)
        assert exit_code == 2
        assert err == (
            "nanhunt: a.capsule names no factory; give --subject package.module:factory\n"
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("a.capsule", "--batch", "0"),
            f"--batch 0 with a.capsule: {ONE}; leave --batch out",
        ),
        (
            ("a.capsule", "--steps", "3"),
            f"--steps 3 with a.capsule: {ONE}; leave --steps out",
        ),
        (
            ("ris:incident", "--trust"),
            "--trust goes with a capsule, as in nanhunt replay FILE.capsule",
        ),
        (
            ("ris:incident", "--subject", "a:b"),
            "--subject a:b goes with a capsule, as in nanhunt replay FILE.capsule",
        ),
        (
            ("none.capsule", "--trust"),
            f"none.capsule: cannot be read (no such file or directory); {GIVE}",
        ),
    ],
)  # fmt: skip
def test_words_that_do_not_go_together(capsys, monkeypatch, tmp_path, words, said):
    """Each is refused with one sentence."""
    monkeypatch.chdir(tmp_path)
    assert run(capsys, monkeypatch, *words) == (2, "", f"nanhunt: {said}\n")


def test_an_incomplete_capsule_says_so(code, capsys, monkeypatch):
    """In the report; and in the refusal where the step needs what is missing."""
    path = kept(f"{code.name}:bare")
    capsule = read_capsule(path)
    write_capsule(dataclasses.replace(capsule, incomplete=("batch.extra (Thing)",)), path)
    _, out, _ = run(capsys, monkeypatch, path, "--trust", *QUICK)
    assert "the capsule is incomplete: batch.extra (Thing)" in out
    assert store.load("report.json").capsule.incomplete == ("batch.extra (Thing)",)
    write_capsule(dataclasses.replace(capsule, batch=len), path)
    exit_code, _, err = run(capsys, monkeypatch, path, "--trust")
    assert exit_code == 2
    assert err.endswith("kept.capsule is incomplete: batch (builtin_function_or_method)\n")


def test_settings_last_for_the_whole_investigation_only(code, capsys, monkeypatch):
    """The replay runs with the threads of the training; afterwards they are as before."""
    path = kept(f"{code.name}:bare")
    capsule = read_capsule(path)
    before = torch.get_num_threads()
    settings = dataclasses.replace(capsule.settings, threads=before + 1)
    write_capsule(dataclasses.replace(capsule, settings=settings), path)
    run(capsys, monkeypatch, path, "--trust", *QUICK)
    assert store.load("report.json").threads == before + 1
    assert torch.get_num_threads() == before


def test_the_report_says_where_it_came_from(code, capsys, monkeypatch):
    """As additional fields of the same schema, and in the command that repeats it."""
    path = kept(f"{code.name}:bare", note="sqrt, in its backward", rank=3)
    _, out, _ = run(capsys, monkeypatch, path, "--trust", *QUICK)
    with open("report.json", encoding="utf-8") as file:  # noqa: PTH123 - a name in the folder
        saved = json.load(file)
    assert (saved["schema"], saved["command"].split()[:4]) == (
        1,
        ["nanhunt", "replay", "kept.capsule", "--trust"],
    )
    assert saved["capsule"] == {
        "file": "kept.capsule",
        "step": 2,
        "rank": 3,
        "bits": "equal to the bit",
        "why": "",
        "device": "cpu",
        "incomplete": [],
        "saved": "sqrt, in its backward",
    }
    assert "saved with the capsule: sqrt, in its backward" in out


def test_repro_runs_a_capsule_again(code, capsys, monkeypatch):
    """`nanhunt repro REPORT` repeats the command of the report, capsule and all."""
    path = kept(f"{code.name}:bare")
    run(capsys, monkeypatch, path, "--trust", *QUICK)
    monkeypatch.setattr(sys, "argv", ["nanhunt", "repro", "report.json"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0


def test_without_a_fingerprint_nothing_is_compared(code):
    """And that is said."""
    loaded = load(f"{code.name}:bare").subject
    capsule = capture(loaded.model, None)
    origin = capsules._compare(capsule, Subject.of(loaded), code, "cpu")
    assert (origin.bits, origin.why) == (
        "not compared",
        "the capsule does not hold the original's fingerprint",
    )
