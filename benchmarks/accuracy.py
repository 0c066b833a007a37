"""How often nanhunt is right about a folder of programs whose faults are known.

`python benchmarks/accuracy.py --cases FOLDER` asks nanhunt about every case of the folder, each in
a process of its own, and scores what it names: phase, op or node, line, cause, and the false alarms
on healthy programs. `--rivals` asks the other ways of `rivals.py` the same; `--proof` also counts
what nanhunt proves about the faults (`proof.py`).

`answer` sees a `Program`, which holds nothing of what is known about the case; `judge` gets the
truth afterwards. What a case file must hold is in `protocol.py`.
"""

import argparse
import ast
import dataclasses
import importlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
from proof import PROVED, proved_in, subject_of, unproved_of, with_proof
from protocol import Answer, Named, Program, cases_in, isolated, truth_of
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rivals import RIVALS

import nanhunt
from nanhunt.places import readable_path

DATA = ("input", "parameter", "buffer", "optimizer state")


def ask_nanhunt(program: Program) -> tuple[Named, ...]:
    """The culprits of nanhunt's report."""
    report = nanhunt.hunt(subject_of(program), steps=program.steps, precisions=(), budget=0)
    file = readable_path(str(program.path))
    return tuple(
        Named(
            phase=found.phase,
            op=found.op,
            node=found.node,
            line=found.line if found.file == file else None,
            cause=found.cause,
            where=found.where,
            occurrence=found.occurrence,
            module=found.module,
        )
        for found in report.culprits
    )


TOOLS: Mapping[str, Callable[[Program], tuple[Named, ...]]] = {"nanhunt": ask_nanhunt, **RIVALS}


def answer(path: Path, tool: str = "nanhunt") -> Answer:
    """What a tool says of the program in a file; it is given nothing else of the case."""
    program = Program.of(path)
    start = time.perf_counter()
    named = TOOLS[tool](program)
    return Answer(named, time.perf_counter() - start)


@dataclass(frozen=True, slots=True)
class Match:
    """In which respects one named culprit is the true one; `also` is the op's other answers."""

    phase: bool
    op: bool
    also: bool
    line: bool
    cause: bool
    execution: bool | None

    @property
    def is_strict(self) -> bool:
        """Whether it is right without the other answers that the case accepts."""
        return self.phase and self.op and self.line

    @property
    def is_hit(self) -> bool:
        """Whether it is right."""
        return self.also or self.is_strict


@dataclass(frozen=True, slots=True)
class Verdict:
    """The score of one answer; None where the case does not ask."""

    main: Match | None
    alarm: bool = False
    decoy: bool = False
    all_culprits: bool | None = None


def judge(case: Mapping[str, Any], said: Answer, source: str) -> Verdict:
    """Score an answer.

    Args:
        case: what is true: the `CASE` of the file.
        said: what the tool named; its first culprit is compared with the main one.
        source: the text of the case, whose marks say which line is guilty.
    """
    if case["phase"] == "none":
        return Verdict(None, alarm=bool(said.named))
    truths = [
        {"phase": case["phase"], "marker": f"CULPRIT{place}" if place > 1 else "CULPRIT", **truth}
        for place, truth in enumerate(case.get("culprits") or [case], start=1)
    ]
    truths[0] = {**case, **truths[0]}
    first = said.named[0] if said.named else Named("nothing")
    main = matched(truths[0], first, source)
    every = [any(matched(truth, named, source).is_hit for named in said.named) for truth in truths]
    decoys = {plain_op(decoy) for decoy in case.get("decoys", ())}
    return Verdict(
        main,
        decoy=not main.is_hit and first.op is not None and plain_op(first.op) in decoys,
        all_culprits=all(every) if len(truths) > 1 else None,
    )


def matched(truth: Mapping[str, Any], named: Named, source: str) -> Match:
    """Compare one named culprit with one true one."""
    phase = named.phase == truth["phase"]
    op = _is_op(truth["op"], named) or _is_node(truth.get("node"), named)
    line = _is_place(truth, named, source)
    also = any(_is_also(other, named, phase=phase, line=line) for other in truth.get("also", ()))
    asked = [key for key in ("occurrence", "module") if truth.get(key) is not None]
    execution = all(getattr(named, key) == truth[key] for key in asked) if asked else None
    cause = named.cause is not None and named.cause == truth.get("cause")
    return Match(phase, op, also, line, cause, execution)


def plain_op(name: str) -> str:
    """An op's name without namespace, overload, outer underscores, `native_` and `_forward`."""
    name = name.removeprefix("aten.").rsplit(":", maxsplit=1)[-1].split(".", maxsplit=1)[0]
    return name.strip("_").removeprefix("native_").removesuffix("_forward")


def plain_node(name: str) -> str:
    """An autograd node's name without the number of its overload."""
    return name.rstrip("0123456789")


def _is_op(true: str, named: Named) -> bool:
    return named.op is not None and plain_op(named.op) == plain_op(true)


def _is_node(true: str | None, named: Named) -> bool:
    return None not in (true, named.node) and plain_node(str(named.node)) == plain_node(str(true))


def _is_place(truth: Mapping[str, Any], named: Named, source: str) -> bool:
    if truth["phase"] == "data" or truth["op"] in DATA:
        # No call of the step made it: what counts is which tensor it is, where that is told.
        is_there = _is_within(named.where, truth.get("where"))
        return named.phase == truth["phase"] and is_there
    is_update = truth["phase"] == "optimizer"
    if is_update and not _has_step(source) and named.line is None:
        return named.phase == "optimizer"  # the tool itself called it: the case has no line for it
    return named.line in marked(source, truth["marker"], needed=not is_update)


def _is_within(named: str | None, true: str | None) -> bool:
    """Whether a tensor that was named is the true one, or one inside of it, as far as is told."""
    if named is None or true is None:
        return True
    return named == true or named.startswith((f"{true}[", f"{true}."))


def _is_also(other: str, named: Named, *, phase: bool, line: bool) -> bool:
    if other.startswith(("batch[", "param:", "buffer:")):
        return named.phase == "data" and _is_within(named.where, other)
    if other == "optimizer":
        return named.phase == other
    return phase and line and _is_op(other, named)


def marked(source: str, marker: str, *, needed: bool = True) -> list[int]:
    """The lines that end in a mark.

    Raises:
        ValueError: there is none although the case needs it.
    """
    mark = re.compile(rf"#\s*{re.escape(marker)}\s*$")
    lines = [at for at, line in enumerate(source.splitlines(), start=1) if mark.search(line)]
    if needed and not lines:
        raise ValueError(f"no line of the case ends in '# {marker}'")
    return lines


def _has_step(source: str) -> bool:
    steps = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    return any(step.name == "train_step" for step in steps)


def scored(path: Path, tool: str, limit: float) -> dict[str, Any]:
    """The row of one case: what was said, and how right it is."""
    said, error = isolated(answer, path, tool, limit=limit)
    case, unreadable = isolated(truth_of, path, limit=limit)
    said = said or Answer(error=error)
    verdict = None
    if case is not None:
        try:
            verdict = judge(case, said, path.read_text(encoding="utf-8"))
        except (KeyError, TypeError, ValueError) as wrong:
            unreadable = f"{type(wrong).__name__}: {wrong}"
    return _row(path, case, said, verdict, unreadable)


def _row(
    path: Path,
    case: Mapping[str, Any] | None,
    said: Answer,
    verdict: Verdict | None,
    unreadable: str | None,
) -> dict[str, Any]:
    named = said.named[0] if said.named else None
    told = dataclasses.asdict(named or Named("none"))
    main = verdict.main if verdict else None
    return {
        "id": str(case["id"]) if case else path.stem,
        **told,
        "named": len(said.named),
        "true": case and {key: case.get(key) for key in ("phase", "op", "node", "cause", "where")},
        "hit": main and main.is_hit,
        "strict_hit": main and main.is_strict,
        "phase_hit": main and main.phase,
        "op_hit": main and main.op,
        "line_hit": main and main.line,
        "cause_hit": main and main.cause,
        "alarm": bool(verdict and verdict.alarm),
        "decoy": bool(verdict and verdict.decoy),
        "all_culprits": verdict and verdict.all_culprits,
        "execution": main and main.execution,
        "seconds": round(said.seconds, 3),
        "error": unreadable or said.error,
    }


COUNTED = {
    "hits": "hit",
    "strict_hits": "strict_hit",
    "phase": "phase_hit",
    "op": "op_hit",
    "line": "line_hit",
    "cause_hits": "cause_hit",
    "all_culprits": "all_culprits",
    "execution": "execution",
}


def totals_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts over the cases; those that ask for all culprits or an execution are counted too."""
    faults = sum(row["hit"] is not None for row in rows)
    controls = sum(row["true"] is not None and row["true"]["phase"] == "none" for row in rows)
    return {
        "cases": len(rows),
        "faults": faults,
        "controls": controls,
        **{name: sum(bool(row[key]) for row in rows) for name, key in COUNTED.items()},
        "all_culprits_of": sum(row["all_culprits"] is not None for row in rows),
        "execution_of": sum(row["execution"] is not None for row in rows),
        "alarms": sum(row["alarm"] for row in rows),
        "decoys": sum(row["decoy"] for row in rows),
        "errors": sum(row["error"] is not None for row in rows),
        **{name: sum(bool(row.get(name)) for row in rows) for name in proved_in(rows)},
        "median_seconds": median(row["seconds"] for row in rows) if rows else 0.0,
    }


def table_of(results: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One line for each tool: how many are right, of how many."""
    lines = {}
    for tool, result in results.items():
        t = result["totals"]
        lines[tool] = {
            "hits": f"{t['hits']}/{t['faults']}",
            "strict": t["strict_hits"],
            **{name: t[name] for name in ("phase", "op", "line")},
            "cause": t["cause_hits"],
            "alarms": f"{t['alarms']}/{t['controls']}",
            "decoys": t["decoys"],
            "all culprits": f"{t['all_culprits']}/{t['all_culprits_of']}",
            "execution": f"{t['execution']}/{t['execution_of']}",
            "errors": t["errors"],
            **{name: f"{t[name]}/{t['faults']}" for name in PROVED if name in t},
            "median s": f"{t['median_seconds']:.2f}",
        }
    return pd.DataFrame(lines).T.rename_axis("tool")


def printed(console: Console, frame: pd.DataFrame) -> None:
    """Print a frame as a table, if it has rows."""
    if frame.empty:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (frame.index.name, *frame.columns):
        table.add_column(str(name), overflow="fold")
    for row in frame.itertuples():
        table.add_row(*(escape(str(value)) for value in row))
    console.print(table)


def sentence(row: Mapping[str, Any]) -> str:
    """What was answered, in one line."""
    if row["error"]:
        return str(row["error"])
    if not row["named"]:
        return "nothing"
    at = f":{row['line']}" if row["line"] is not None else row["where"] or ""
    named = [row["phase"], row["op"] or row["module"], row["node"], at]
    return " ".join(str(word) for word in named if word)


def misses_of(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The cases that were got wrong: what is true, and what was said instead."""
    wrong = [r for r in rows if r["alarm"] or r["error"] or r["hit"] is False]
    true = [row["true"] or {} for row in wrong]
    return pd.DataFrame(
        {
            "true": [" ".join(str(t.get(k) or "") for k in ("phase", "op", "node")) for t in true],
            "said": [sentence(row) for row in wrong],
            "": ["alarm" if r["alarm"] else "decoy" if r["decoy"] else "" for r in wrong],
        },
        index=pd.Index([row["id"] for row in wrong], name="miss"),
    )


def other_causes_of(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The hits for which another cause was given."""
    wrong = [row for row in rows if row["hit"] and not row["cause_hit"]]
    causes = {row["id"]: {"true": row["true"]["cause"], "said": str(row["cause"])} for row in wrong}
    return pd.DataFrame(causes).T.rename_axis("another cause")


def run(
    files: Sequence[Path], tools: Sequence[str], limit: float, *, proof: bool = False
) -> dict[str, Any]:
    """Every tool on every case: `{tool: {"cases": [...], "totals": {...}}}`."""
    rows = {tool: [scored(file, tool, limit) for file in files] for tool in tools}
    if proof:
        pairs = zip(rows["nanhunt"], files, strict=True)
        rows["nanhunt"] = [with_proof(row, file, limit) for row, file in pairs]
    return {tool: {"cases": rows[tool], "totals": totals_of(rows[tool])} for tool in tools}


def main() -> None:
    """Print the tables, and write the scores as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=Path, required=True, help="a folder of case files")
    parser.add_argument("--json", type=Path, help="write every score to this file")
    parser.add_argument("--rivals", nargs="*", metavar="NAME", help="ask others too, or all others")
    parser.add_argument("--proof", action="store_true", help="count what is proved as well")
    parser.add_argument("--only", nargs="+", default=(), metavar="ID", help="these cases")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one case")
    chosen = parser.parse_args()
    try:
        files = cases_in(chosen.cases, tuple(chosen.only))
    except ValueError as error:
        parser.error(str(error))
    rivals = list(RIVALS) if chosen.rivals == [] else chosen.rivals or []
    if unknown := sorted(set(rivals) - set(RIVALS)):
        parser.error(f"no rival called {', '.join(unknown)}; there are {', '.join(RIVALS)}")
    # nanhunt imports it when it first replays; imported here, every child is forked with it.
    importlib.import_module("torch._dynamo")
    results = run(files, ["nanhunt", *rivals], chosen.limit, proof=chosen.proof)
    console = Console()
    # A pipe has no width of its own; rich would fold every name at 80 columns.
    console = console if console.is_terminal else Console(width=140)
    printed(console, table_of(results))
    printed(console, misses_of(results["nanhunt"]["cases"]))
    printed(console, other_causes_of(results["nanhunt"]["cases"]))
    for name in ("fix", "repro"):
        printed(console, unproved_of(results["nanhunt"]["cases"], name))
    if chosen.json:
        others = {tool: result for tool, result in results.items() if tool != "nanhunt"}
        document = {**results["nanhunt"], **({"rivals": others} if others else {})}
        chosen.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
