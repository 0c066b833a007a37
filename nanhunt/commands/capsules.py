"""What a command examines: a subject by its name, or the step of a capsule."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nanhunt.errors import CapsuleError, SubjectError, UsageError
from nanhunt.records import Provenance, Report, Sameness

SUFFIX = ".capsule"
_SAID: dict[Sameness, str] = {
    "equal to the bit": "loss and gradients of the native replay equal the original's to the bit",
    "differs": "loss and gradients of the native replay differ from the original's",
    "not comparable": "its loss and gradients are not comparable with the original's",
    "not compared": "its loss and gradients were not compared with the original's",
}


@dataclass(frozen=True, slots=True)
class Opened:
    """The subject, the spec of its factory, and where its step came from."""

    subject: Any
    spec: str
    remark: str = ""
    capsule: Provenance | None = None
    notes: tuple[str, ...] = ()

    def told(self, report: Report) -> Report:
        """The report with its subject named, and what is to be said of the capsule."""
        named = report.subject if self.subject.name else self.spec
        notes = (*self.notes, *report.notes)
        return replace(report, subject=named, capsule=self.capsule, notes=notes)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the words of a command name: `factory` is its `--subject`."""

    name: str | None
    factory: str | None = None
    trust: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: str = "cpu"

    @property
    def is_capsule(self) -> bool:
        """Whether the name is that of a capsule."""
        return self.name is not None and self.name.endswith(SUFFIX)

    def check(self, batch: int | None, steps: int | None) -> None:
        """Refuse words that do not go together."""
        if not self.is_capsule and (self.factory is not None or self.trust):
            word = "--trust" if self.factory is None else f"--subject {self.factory}"
            raise UsageError(f"{word} goes with a capsule, as in nanhunt replay FILE{SUFFIX}")
        for word, value in (("batch", batch), ("steps", steps)):
            if self.is_capsule and value is not None:
                raise UsageError(
                    f"--{word} {value} with {self.name}: a capsule holds the one batch of one "
                    f"step; leave --{word} out"
                )

    def load(self, spec: str | None, *, further: int = 0) -> Any:
        """Build a subject, from a later seed if asked to."""
        from nanhunt.loading import load

        seed = self.seed + further
        return load(spec, options=self.options, seed=seed, device=self.device)

    @contextlib.contextmanager
    def opened(self, progress: Callable[[str], object]) -> Iterator[Opened]:
        """The subject, under the settings of its capsule while the context lasts."""
        progress("subject")
        if not self.is_capsule:
            loaded = self.load(self.name)
            yield Opened(loaded.subject, loaded.spec, loaded.remark)
            return
        from nanhunt.capsule import open_capsule, read_capsule, settings_applied, unused

        path = Path(self.name or "")
        capsule = read_capsule(path)
        spec = self.factory or _trusted(path, capsule.subject, trust=self.trust)
        loaded = self.load(spec)
        try:
            subject = open_capsule(capsule, loaded.subject)
        except CapsuleError as error:
            raise CapsuleError(f"{path} with {spec}: {error}") from None
        with settings_applied(capsule.settings, device=self.device.partition(":")[0]):
            progress("the original's bits")
            with _blamed(capsule.incomplete, path):
                origin = _compare(capsule, subject, path, self.device.partition(":")[0])
                notes = (*_notes(origin), *unused(capsule, loaded.subject))
                yield Opened(subject, spec, loaded.remark, origin, notes)


def _trusted(path: Path, spec: str, *, trust: bool) -> str:
    """The factory that a capsule names, where the user says that it may be imported."""
    if not spec:
        raise UsageError(f"{path} names no factory; give --subject package.module:factory")
    if not trust:
        raise UsageError(
            f"{path} names the factory {spec!r}, and nothing that a file names is imported by "
            f"itself; give --trust to import it, or --subject package.module:factory"
        )
    return spec


@contextlib.contextmanager
def _blamed(incomplete: tuple[str, ...], path: Path) -> Iterator[None]:
    """Where the step cannot run, say what its capsule lacks."""
    try:
        yield
    except SubjectError as error:
        if not incomplete:
            raise
        raise SubjectError(f"{error}; {path} is incomplete: {_listed(incomplete)}") from error


def _compare(capsule: Any, subject: Any, path: Path, device: str) -> Provenance:
    """Whether loss and gradients come again to the bit, where that can be told."""
    from nanhunt.capsule import read_machine, tell_difference

    origin = Provenance(
        file=str(path),
        step=capsule.step,
        rank=capsule.rank,
        device=capsule.settings.device,
        incomplete=capsule.incomplete,
        saved=capsule.note,
    )
    if not capsule.fingerprint:
        return replace(origin, why="the capsule does not hold the original's fingerprint")
    difference = tell_difference(capsule.machine, read_machine(device))
    if difference:
        return replace(origin, bits="not comparable", why=difference)
    from nanhunt.replay import draw_batch, find_fingerprints

    found = find_fingerprints(subject, draw_batch(subject, 0))
    is_same = capsule.fingerprint in found
    return replace(origin, bits="equal to the bit" if is_same else "differs")


def _notes(origin: Provenance) -> Iterator[str]:
    """What the report says of the capsule."""
    why = f": {origin.why}" if origin.why else ""
    rank = f" of rank {origin.rank}" if origin.rank else ""
    yield f"{origin.file} holds step {origin.step}{rank}; {_SAID[origin.bits]}{why}"
    if origin.incomplete:
        yield f"the capsule is incomplete: {_listed(origin.incomplete)}"
    if origin.saved:
        yield f"saved with the capsule: {origin.saved}"


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
