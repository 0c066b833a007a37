"""Rules over figures: each has a planted fault and a healthy twin that differs in little else."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from nanhunt.health import BY_SLUG, LIMITS, RULES, Limits, check, examine
from nanhunt.records import SANITISED, Figures

N = 400


def noise_of(i):
    """The noise of a step."""
    return random.Random(i)  # noqa: S311 - noise, no secret


def step(i, **changes):
    """A step of a healthy run: the loss falls, noise on everything, two groups."""
    noise = noise_of(i)
    plain = Figures(
        i,
        2.0 * math.exp(-i / 150) + 0.5 + noise.gauss(0, 0.05),
        stepped=True,
        why="",
        norms=(("body", 1.0 + noise.random()), ("head", 0.5 + noise.random())),
        nonfinite=0,
        rates=(1e-3,),
        updates=(("body", 1e-3), ("head", 2e-3)) if i % 10 == 0 else (),
    )
    return replace(plain, **changes)


def run(change=None, n=N):
    """A run whose steps are changed by `change(i, step) -> changes`."""
    return [replace(step(i), **(change(i) if change else {})) for i in range(n)]


def at(*steps, **changes):
    """A change of some steps only."""
    return lambda i: changes if i in steps else {}


def since(first, **changes):
    """A change of all steps from one on."""
    return lambda i: changes if i >= first else {}


def norms(body, head):
    """The norms of both groups."""
    return {"norms": (("body", body), ("head", head))}


def updates(body, head):
    """The updates of both groups, measured every tenth step."""
    return lambda i: {"updates": (("body", body), ("head", head))} if i % 10 == 0 else {}


LOST = {"stepped": False, "why": "nonfinite", "nonfinite": 3}
OVERFLOW = {"stepped": False, "why": "scaler", "nonfinite": 3}


def grown(i):
    """Gradients that grow from step 200 on, with the loss."""
    size = 1.2 ** max(0, i - 200)
    return norms(size, size) | ({"loss": 1.0 + size} if i >= 200 else {})


def saddle(i):
    """Gradients that grow as much while the loss falls to a new low."""
    size = 1e-4 * 1.2 ** min(max(0, i - 200), 50)
    return norms(size, size) | {"loss": 5.0 if i < 200 else 5.0 * 0.97 ** (i - 200)}


def flat(i):
    """A loss that stays where it is."""
    return {"loss": 2.3 + noise_of(i).gauss(0, 0.02)}


def slow(i):
    """A loss that falls by a tenth in all, in more noise than that."""
    return {"loss": 2.3 - 0.2 * i / N + noise_of(i).gauss(0, 0.2)}


def noisy(i):
    """A loss whose noise hides whether it falls."""
    return {"loss": 2.3 + noise_of(i).gauss(0, 2.0)}


def collapsed(i):
    """A loss scale that is halved until nothing is left of it."""
    return {"scale": 65536.0 / 2 ** max(0, min(i - 100, 24))}


def found(i):
    """A scale that is halved sixteen times at the start: a scaler that finds its scale."""
    return {"scale": 65536.0 / 2 ** min(i, 16)} | (OVERFLOW if i < 16 else {})


def ended(i):
    """A linear decay that is over at step 300."""
    return {"rates": (1e-3 * max(0.0, 1 - i / 300),), "scheduled": True}


def cosine(i):
    """A warm-up from 0 and a cosine down to 0."""
    rate = i / 20 if i < 20 else 0.5 * (1 + math.cos(math.pi * (i - 20) / (N - 21)))
    return {"rates": (1e-3 * rate,), "scheduled": True}


def decayed(i):
    """A scheduler with one milestone late in the run."""
    return {"rates": (1e-3 if i < 900 else 1e-4,), "scheduled": True}


FAULTS = {
    "nonfinite_loss": (run(at(7, 9, loss=None, **LOST | {"why": "loss"})), run()),
    "nonfinite_gradients": (run(at(7, **LOST)), run(at(7, **OVERFLOW))),
    "nonfinite_validation": (
        run(at(99, 199, validated=True)),
        run(at(99, 199, validated=True, validation=0.7)),
    ),
    "sanitised_gradients": (run(at(3, notes=(SANITISED,))), run(at(3, notes=("another",)))),
    "exploding_gradients": (run(grown), run(saddle)),
    "vanishing_gradients": (run(lambda i: norms(1e-9, 1.0)), run(lambda i: norms(1e-4, 1.0))),
    "dead_parameters": (
        run(since(300, **norms(0.0, 1.0))),
        run(at(*range(50, 150), **norms(0.0, 1.0))),
    ),
    "parameters_do_not_move": (run(updates(0.0, 1e-3)), run(updates(1e-5, 1e-3))),
    "update_ratio": (run(updates(0.9, 1e-3)), run(updates(0.05, 1e-3))),
    "loss_not_decreasing": (run(flat), run(slow)),
    "loss_spikes": (run(at(*range(300, 310), loss=6.0)), run(at(300, loss=6.0))),
    "skipped_in_a_row": (run(at(*range(100, 105), **LOST)), run(found)),
    "skipped_often": (run(at(*range(5, N, 9), **OVERFLOW)), run(at(*range(5, N, 50), **OVERFLOW))),
    "scale_collapse": (run(collapsed), run(found)),
    "scheduler_without_optimizer": (
        run(at(9, scheduled=True, **OVERFLOW)),
        run(at(9, scheduled=False, **OVERFLOW)),
    ),
    "optimizer_without_scheduler": (
        run(lambda i: {"scheduled": i % 4 != 0}),
        run(lambda i: {"scheduled": i % 50 == 49}),
    ),
    "rate_zero": (run(ended), run(cosine)),
    "rate_constant": (run(lambda i: {"scheduled": True}, n=1100), run(decayed, n=1100)),
    "clipped_always": (
        run(lambda i: {"clipped": 0.1}),
        run(lambda i: {"clipped": 0.1} if i < 60 or i % 5 == 0 else {}),
    ),
}  # fmt: skip


def slugs(figures):
    """The names of the symptoms."""
    return [symptom.slug for symptom in examine(figures)]


def test_every_rule_is_tried():
    """No rule without a fault; names are unique, and the order is the table's."""
    assert list(FAULTS) == list(BY_SLUG) == [rule.slug for rule in RULES]


@pytest.mark.parametrize("slug", FAULTS)
def test_fault_and_twin(slug):
    """The rule finds its fault with what was measured, and neither it nor another its twin."""
    fault, twin = FAULTS[slug]
    (symptom,) = [each for each in examine(fault) if each.slug == slug]
    rule = BY_SLUG[slug]
    assert (symptom.title, symptom.advice) == (rule.title, rule.advice)
    assert symptom.evidence
    assert all(symptom.evidence)
    assert 0 <= symptom.first <= symptom.last < len(fault)
    assert slugs(twin) == []


ALONE = {
    "exploding_gradients": ["exploding_gradients", "loss_spikes"],
    "nonfinite_loss": ["nonfinite_loss", "nonfinite_gradients"],
    "skipped_in_a_row": ["nonfinite_gradients", "skipped_in_a_row"],
}


@pytest.mark.parametrize("slug", FAULTS)
def test_a_fault_has_no_other_symptoms(slug):
    """What is found besides is what the fault brings with it."""
    assert slugs(FAULTS[slug][0]) == ALONE.get(slug, [slug])


def symptom_of(figures, slug):
    """One of the symptoms of a run."""
    return next(each for each in examine(figures) if each.slug == slug)


EVIDENCE = {
    "nonfinite_loss": (7, 9, ("in 2 of 400 steps",)),
    "nonfinite_gradients": (7, 7, ("in 1 of 400 steps",)),
    "nonfinite_validation": (99, 199, ("2 of 2 validation losses",)),
    "sanitised_gradients": (3, 3, ("noted in 1 of 400 steps",)),
    "vanishing_gradients": (384, 399, ("body: ‖g‖ 1e-09, 1e-09 of the largest group's",)),
    "dead_parameters": (300, 399, ("body: ‖g‖ is 0 since step 300",)),
    "parameters_do_not_move": (
        200,
        390,
        ("body: ‖Δθ‖/‖θ‖ at most 0 in 20 measured steps",),
    ),
    "update_ratio": (200, 390, ("body: ‖Δθ‖/‖θ‖ 0.9 (median); usual is 1e-3",)),
    "skipped_in_a_row": (100, 104, ("5 in a row", "gradients not finite: 5")),
    "scale_collapse": (117, 399, ("from 65536 down to 0.00390625",)),
    "scheduler_without_optimizer": (9, 9, ("in 1 of the 1 steps that the optimizer did not make",)),
    "rate_zero": (300, 399, ("100 steps in a row",)),
    "clipped_always": (200, 399, ("200 of the last 200 steps, scaled by 0.1 (median)",)),
}


@pytest.mark.parametrize("slug", EVIDENCE)
def test_evidence(slug):
    """The steps and the sentences, whole."""
    found = symptom_of(FAULTS[slug][0], slug)
    assert (found.first, found.last, found.evidence) == EVIDENCE[slug]


@pytest.mark.parametrize("n", [0, 1, 3, 12])
def test_few_steps_tell_nothing(n):
    """Rules over a course say why they cannot be judged; nothing is called fine by them."""
    checkup = check(run(n=n))
    assert checkup.symptoms == ()
    unknown = dict(checkup.unknown)
    assert {"loss_not_decreasing", "loss_spikes", "dead_parameters", "update_ratio"} <= set(unknown)
    assert all(unknown.values())
    assert set(unknown).isdisjoint(checkup.absent)
    assert len(unknown) + len(checkup.absent) == len(RULES)


def test_noise_is_no_symptom():
    """Where the noise is as large as the loss, a fall can neither be seen nor ruled out."""
    checkup = check(run(noisy))
    assert checkup.symptoms == ()
    assert "too noisy" in dict(checkup.unknown)["loss_not_decreasing"]


def test_wandering_is_no_symptom():
    """A loss that rises, and not without end, may be one of two that play."""
    checkup = check(run(lambda i: {"loss": 1.4 - 0.4 * math.exp(-i / 100)}))
    assert checkup.symptoms == ()
    assert "wanders" in dict(checkup.unknown)["loss_not_decreasing"]


def test_a_loss_that_doubles_does_not_decrease():
    """Gradient ascent, or a rate that is far too large."""
    assert slugs(run(lambda i: {"loss": 1.0 + i / 100})) == ["loss_not_decreasing"]


def test_raised_steps_have_no_loss():
    """A step that raised is no non-finite loss."""
    raised = {"loss": None, "stepped": False, "why": "raised", "norms": ()}
    assert slugs(run(at(50, **raised))) == []


def test_explosion_into_a_lost_step():
    """A few steps are enough where the last finite norm is far above all before."""
    figures = run(n=8)
    figures[6] = replace(figures[6], **norms(1e5, 1e5))
    figures[7] = replace(figures[7], loss=None, stepped=False, why="loss", nonfinite=4)
    assert slugs(figures) == ["nonfinite_loss", "nonfinite_gradients", "exploding_gradients"]
    figures[6] = step(6)
    assert slugs(figures) == ["nonfinite_loss", "nonfinite_gradients"]


def test_a_satisfied_loss_is_not_dead():
    """Gradients of 0 everywhere are well where the loss fell and stayed low; else not."""
    assert slugs(run(since(300, loss=0.0, **norms(0.0, 0.0)))) == []
    assert slugs(run(since(300, loss=2.5, **norms(0.0, 0.0)))) == ["dead_parameters"]


def test_a_finished_run_does_not_vanish():
    """Tiny gradients are well at the end of a fall, and a symptom without one."""
    tiny = norms(1e-9, 1e-9)
    assert slugs(run(since(300, loss=1e-6, **tiny))) == []
    assert "vanishing_gradients" in slugs(run(lambda i: {"loss": 2.3} | tiny))


def test_updates_count_where_the_rate_is_at_work():
    """The end of a cosine, in which nothing moves, says nothing."""

    def late(i):
        changes = {"rates": (1e-3 if i < 200 else 1e-9,)}
        return changes | ({"updates": (("body", 0.0),)} if i >= 200 else {})

    assert slugs(run(late)) == []


def test_a_leap_that_stays():
    """Ten times as far as the loss ever moved is a departure; a term switched on is none."""
    assert slugs(run(since(300, loss=90.0))) == ["loss_spikes"]
    assert slugs(run(since(300, loss=4.0))) == []


def test_a_leap_that_is_worse_for_good():
    """A run that lost what it had learnt in a few steps; a term that is switched on is learnt."""

    def lost(i):
        return {"loss": 40.0} if 300 <= i < 304 else {"loss": 2.4} if i >= 304 else {}

    assert slugs(run(lost)) == ["loss_spikes"]
    assert symptom_of(run(lost), "loss_spikes").first == 300
    assert slugs(run(lambda i: {"loss": 2.0 * 0.98 ** (i - 300) + 1.5} if i >= 300 else {})) == []


def test_figures_that_hold_nan():
    """Where somebody hands a NaN over in place of None, it counts as one."""
    figures = run(lambda i: {"loss": math.nan} | norms(math.inf, 1.0) if i == 7 else {})
    assert slugs(figures) == ["nonfinite_loss", "nonfinite_gradients"]
    assert slugs(run(at(7, rates=(math.nan,), updates=(("body", math.inf),)))) == []


def test_leap_after_a_restart():
    """The loss rises when the learning rate does."""
    spike = at(*range(300, 310), loss=6.0)
    assert slugs(run(lambda i: spike(i) | {"rates": (1e-3 if i < 299 else 1e-2,)})) == []


def test_scheduler_that_is_never_stepped():
    """A thousand steps without it; fewer may be one epoch."""
    forgotten = run(lambda i: {"scheduled": False}, n=1000)
    assert slugs(forgotten) == ["optimizer_without_scheduler"]
    checkup = check(forgotten[:400])
    assert checkup.symptoms == ()
    assert "once an epoch" in dict(checkup.unknown)["optimizer_without_scheduler"]


def test_limits_can_be_moved():
    """Every threshold is in one place, and may be another."""
    figures = run(at(100, 101, **LOST))
    assert "skipped_in_a_row" not in slugs(figures)
    strict = examine(figures, limits=Limits(skipped=2))
    assert "skipped_in_a_row" in [each.slug for each in strict]
    assert replace(LIMITS) == Limits()


def test_numbers_of_steps_are_those_of_the_figures():
    """Positions do not count: a log may begin anywhere."""
    figures = [replace(f, step=1000 + f.step) for f in FAULTS["skipped_in_a_row"][0]]
    assert examine(figures)[1].first == 1100


def test_documented():
    """docs/health.md has a section for each symptom, in order, with what `explain` says."""
    text = (Path(__file__).parents[2] / "docs" / "health.md").read_text(encoding="utf-8")
    heads = [line[4:] for line in text.splitlines() if line.startswith("### ")]
    assert heads == [rule.slug for rule in RULES]
    words = " ".join(text.split())
    for rule in RULES:
        assert all(" ".join(part.split()) in words for part in (rule.title, rule.when, rule.advice))
