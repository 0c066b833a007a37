"""Reports made by hand, one for each thing that a report can say."""

import math
from dataclasses import replace

import pytest

from nanhunt.records import (
    Ablation,
    Finding,
    Frame,
    Group,
    Pace,
    Rank,
    Report,
    Reproduction,
    Run,
    Step,
    Term,
)

VERSIONS = (("nanhunt", "0.1.0"), ("torch", "2.13.0+cpu"), ("python", "3.11.9"))
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def unset_columns(monkeypatch):
    """The width of the terminal that runs the tests is no part of them."""
    monkeypatch.delenv("COLUMNS", raising=False)


def groups(backbone, head, *, nonfinite=(0, 0)):
    """The gradients of the two groups of the incident's model."""
    return (Group("backbone", backbone, nonfinite[0], 79), Group("head", head, nonfinite[1], 6))


EIGH = Finding(
    phase="backward",
    op="aten::linalg_eigh",
    node="LinalgEighBackward0",
    formula_op="aten::div_",
    file="ris_model/losses.py",
    line=214,
    function="align",
    source="    evals, evecs = torch.linalg.eigh(r_hat + loading * eye)\n",
    terms=("align",),
    cause="degenerate_decomposition",
    dtype="complex64",
    evidence=(
        "63 of 64 samples: bit-identical eigenvalues, up to 7 of 144 in one matrix",
        "smallest gap 0; largest eigenvalue 1.204; 5 values stand above the floor of 0.0001",
        "first non-finite at sample 0, row 17, column 18: 0 / 0",
    ),
    explanation=(
        "The loss uses eigenvectors, and their backward divides by the differences of the"
        " eigenvalues: two that are equal give 0/0."
    ),
    recipes=("gap_projector", "values_only"),
    path=(
        Step("aten::div_", "LinalgEighBackward0", "", Frame("ris_model/losses.py", 214, "align")),
        Step("aten::mul", "MulBackward0", "", Frame("ris_model/covariance.py", 88, "blend")),
        Step("aten::bmm", "BmmBackward0", "", Frame("ris_model/covariance.py", 88, "blend")),
        Step("aten::add", "AddBackward0", "", Frame("ris_model/covariance.py", 61, "normalise")),
        Step("aten::mm", "AddmmBackward0", "network.factor_head.1", None),
        Step("aten::mm", "AddmmBackward0", "network.factor_head.0", None),
        Step("aten::native_layer_norm_backward", None, "network.backbone.norm", None),
        Step("aten::mm", "AddmmBackward0", "network.backbone.blocks.5.mlp.2", None),
    ),
    poisoned=(("head", 6, 6), ("backbone", 58, 79)),
)
POISONED = groups(NAN, NAN, nonfinite=(58, 6))
NATIVE = Run(
    "native",
    loss=4.912031,
    terms=(Term("align", 0.00213, True, 31, 44), Term("gap", 0.0, False)),
    groups=POISONED,
    culprit="aten::linalg_eigh",
    culprit_dtype="complex64",
    culprit_line="ris_model/losses.py:214",
    ops=4121,
    seconds=1.25,
)

ABLATIONS = (
    Ablation(
        ("lam_gap",),
        "without",
        requested=True,
        finite=False,
        took_effect=True,
        weight_before=0.012,
        weight_after=0.0,
        ops_before=(12, 19),
        ops_after=(0, 0),
        loss=4.9001,
        groups=POISONED,
    ),
    Ablation(
        ("lam_align",),
        "without",
        requested=True,
        finite=True,
        took_effect=True,
        weight_before=0.002,
        weight_after=0.0,
        ops_before=(17, 27),
        ops_after=(0, 0),
        loss=4.90993,
        groups=groups(14.0634, 8.2291),
    ),
    Ablation(
        ("lam_subspace_align",),
        "without",
        requested=True,
        finite=False,
        took_effect=False,
        weight_before=0.0,
        weight_after=0.0,
        loss=4.912031,
        groups=POISONED,
    ),
    Ablation(("lam_gap",), "alone", False, True, loss=0.0121, groups=groups(0.2, 0.1)),
)


@pytest.fixture
def incident_report():
    """A finite loss with non-finite gradients, found, explained and cured."""
    healed = {"groups": groups(14.0634, 8.2291), "culprit": None, "culprit_dtype": None}
    healed |= {"culprit_line": None}
    fp16 = {"notes": ("fp16 (emulated accumulation)",), "scale": 65536.0}
    return Report(
        "ris:incident",
        0,
        "culprit",
        samples=64,
        versions=VERSIONS,
        threads=2,
        command="nanhunt replay ris:incident --ablate lam_gap --ablate lam_align",
        headline="the loss is finite (4.912); 64 of 85 gradients are not",
        culprits=(EIGH,),
        runs=(
            NATIVE,
            replace(NATIVE, variant="fp64", loss=4.912028, culprit_dtype="complex128"),
            replace(NATIVE, variant="fp32"),
            replace(NATIVE, variant="amp-bf16-net", loss=4.915112),
            replace(NATIVE, variant="amp-fp16-net", loss=4.911237, **fp16),
            replace(NATIVE, ablated=("lam_align",), loss=4.90993, **healed),
            replace(NATIVE, variant="fp64", ablated=("lam_align",), loss=4.90992, **healed),
            Run("fp16", raised="RuntimeError: no kernel for 'ComplexHalf'\n[stack of 40 lines]"),
        ),
        ablations=ABLATIONS,
        precision="not a precision fault: the op ran in complex128 too and failed there",
        twins=(("lam_align", "lam_subspace_align"),),
        weights=(("lam_align", 0.002), ("lam_gap", 0.012), ("lam_subspace_align", 0.0)),
        deterministic=True,
        notes=("term gap is exactly 0 and has no graph: it trains nothing",),
        not_checked=("CUDA", "compiled mode", "other batches (--batch 0:32)"),
        seconds=31.4,
    )


@pytest.fixture
def healthy_report():
    """Everything finite, in every variant."""
    fine = Run("native", loss=3.843037, groups=groups(14.0634, 8.2291))
    return Report(
        "ris",
        3,
        "healthy",
        samples=64,
        versions=VERSIONS,
        threads=2,
        headline="the loss (3.843) and all 85 gradients are finite",
        runs=(fine, replace(fine, variant="fp64"), replace(fine, variant="amp-bf16-net")),
        notes=("smallest margin: 1.8 below the largest fp16 number, at loss scale 65536",),
        not_checked=("CUDA", "compiled mode", "other batches (--batch 0:32)"),
        seconds=12.25,
    )


@pytest.fixture
def at_risk_report():
    """Finite as it is, infinite under fp16."""
    fine = Run("native", loss=2.5, groups=groups(1.5, 0.25))
    overflow = Finding(
        phase="forward",
        op="aten::exp",
        file="examples/contrast.py",
        line=41,
        function="contrast",
        source="return torch.exp(logits)",
        module="network.head",
        cause="overflow_low_precision",
        dtype="float16",
        evidence=("3 of 640 results are inf, their arguments between 11.1 and 12.4",),
        explanation="exp(x) is beyond 65504, the largest float16, for every x above 11.09.",
        poisoned=(("head", 6, 6),),
    )
    half = Run(
        "amp-fp16",
        loss=INF,
        groups=groups(0.0, NAN, nonfinite=(0, 6)),
        culprit="aten::exp",
        culprit_dtype="float16",
        culprit_line="examples/contrast.py:41",
        scale=65536.0,
    )
    return Report(
        "examples/contrast.py:build",
        0,
        "at_risk",
        versions=VERSIONS,
        device="cuda:0",
        headline="finite natively; non-finite in amp-fp16",
        culprits=(overflow,),
        runs=(fine, replace(fine, variant="fp64"), half),
        precision="a precision fault: finite in float32 and float64, inf in float16",
        not_checked=("compiled mode",),
    )


@pytest.fixture
def unexplained_report():
    """Non-finite, and no op that made it; every ablation fails in its own way."""
    lost = Run("native", loss=NAN, groups=(Group("all", NAN, 9, 12, 3),), stepped_nonfinite=9)
    gone = {"requested": True, "finite": False, "loss": NAN, "groups": lost.groups}
    return Report(
        "train:step",
        7,
        "unexplained",
        samples=8,
        versions=VERSIONS,
        headline="the loss is nan; 9 of 12 gradients are not finite",
        runs=(lost,),
        ablations=(
            Ablation(("aux",), "without", **gone, took_effect=True, ops_before=(3, 5)),
            Ablation(("mixup", "cutmix"), "without", **gone),
            Ablation(("kl",), "without", **gone | {"raised": "KeyError: 'kl'"}),
        ),
        deterministic=False,
        notes=("the custom op my_ext.fused_loss was not looked into",),
        not_checked=("my_ext.fused_loss", "CUDA"),
    )


@pytest.fixture
def double_report(incident_report):
    """Two culprits at once, seven groups of parameters, nothing ablated."""
    names = ("stem", "stage1", "stage2", "stage3", "stage4", "neck", "classifier")
    many = tuple(Group(name, float(i), 0, 4) for i, name in enumerate(names))
    many = (Group("embedding", INF, 1, 2), *many)
    root = Finding(
        phase="forward",
        op="aten::log",
        dtype="float32",
        occurrence=3,
        module="head.entropy",
        terms=("entropy", "kl"),
        explanation="The logarithm of 0 is -inf.",
        poisoned=(("embedding", 1, 2),),
        path=(Step("aten::log", None, "", None), Step("aten::mul", None, "head.entropy", None)),
    )
    return replace(
        incident_report,
        headline="the loss is inf; 1 of 30 gradients is not finite",
        culprits=(root, EIGH),
        runs=(replace(NATIVE, loss=-INF, groups=many, culprit_line=None),),
        ablations=(),
        twins=(),
        precision="",
    )


@pytest.fixture
def course_report(incident_report):
    """The twelfth step of many, which read what the one before had left."""
    early = Finding(
        phase="forward",
        op="aten::log",
        file="examples/course.py",
        line=88,
        function="note",
        source="self.noted.copy_((x.min() - 0.2).log())",
        module="norm",
        cause="domain_error",
        dtype="float32",
        evidence=("log returned 1 NaN of 1 elements []", "self: -0.2 there"),
        explanation="log is real for x > 0 only.",
        step=10,
        poisoned=(("head", 6, 6),),
    )
    taken = [Pace(i, 4.0 - i / 4, 20.0 + i, 1.0 + i / 16, skipped=i == 6) for i in range(11)]
    lost = replace(NATIVE, loss=NAN, culprit="aten::log", culprit_line="examples/course.py:88")
    return replace(
        incident_report,
        subject="examples/course.py:build",
        batch=11,
        command="nanhunt replay examples/course.py:build --steps 40",
        headline="the loss is nan",
        culprits=(early,),
        runs=(lost,),
        ablations=(),
        precision="",
        twins=(),
        weights=(),
        steps=40,
        pace=(*taken, Pace(11, NAN, NAN, 1.6875)),
        repro=Reproduction(
            "course-repro",
            works=True,
            shown="the result: 1 of 1 elements NaN or infinite, first [nan]",
            operands=(("self", (), ()),),
            bytes=812,
            bytes_before=4,
        ),
        notes=(),
    )


@pytest.fixture
def hostile_report(incident_report):
    """Names that look like markup, control the terminal, or are far too long."""
    nasty = "[red]x[/red]\x1b[31m\r\nnext\tline \u202e" + "very_long_name." * 12
    finding = replace(
        EIGH,
        op=nasty,
        node=nasty,
        formula_op=nasty,
        file=nasty,
        function=nasty,
        source=nasty,
        module=nasty,
        terms=(nasty, "[/]"),
        cause=nasty,
        dtype=nasty,
        evidence=(nasty, "", "\ud800"),
        explanation=nasty,
        recipes=(nasty,),
        path=(Step(nasty, nasty, nasty, None), Step(nasty, None, "", Frame(nasty, 1, nasty))),
        poisoned=((nasty, 1, 2),),
    )
    run = Run(
        nasty,
        (nasty,),
        loss=NAN,
        groups=(Group(nasty, NAN, 1, 2, 1),),
        culprit=nasty,
        culprit_dtype=nasty,
        culprit_line=nasty,
        notes=(nasty,),
    )
    ablation = Ablation((nasty,), "without", requested=True, finite=True)
    return replace(
        incident_report,
        subject=nasty,
        versions=((nasty, nasty), ("torch", nasty)),
        device=nasty,
        headline=nasty,
        culprits=(finding,),
        runs=(run, replace(run, variant="native", ablated=()), replace(run, raised=nasty)),
        ablations=(ablation, replace(ablation, finite=False), replace(ablation, raised=nasty)),
        precision=nasty,
        twins=((nasty, nasty),),
        rank=1,
        ranks=(Rank(0, "finite"), Rank(1, "culprit", nasty), Rank(2, "missing")),
        repro=Reproduction(nasty, works=True, operands=((nasty, (3,), (1,)),), note=nasty),
        notes=(nasty,),
        not_checked=(nasty,),
    )


@pytest.fixture(
    params=["incident", "healthy", "at_risk", "unexplained", "double", "course", "hostile"]
)
def any_report(request):
    """Each of the reports in turn."""
    return request.getfixturevalue(f"{request.param}_report")


VALUES = (None, True, -1, 2**70, 1e308, "", "nan", "\x00", [], {}, [[]], {"a": None}, [None] * 3)


def damaged(data, rng):
    """The data with one value somewhere in it replaced or lost."""
    node, keys = data, list(data)
    while True:
        key = rng.choice(keys)
        child = node[key]
        if not child or not isinstance(child, dict | list) or rng.random() < 0.2:
            break
        node, keys = child, list(child) if isinstance(child, dict) else range(len(child))
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice(VALUES)
    return data


@pytest.fixture
def damage():
    """A function that replaces or removes one value somewhere in what JSON held."""
    return damaged
