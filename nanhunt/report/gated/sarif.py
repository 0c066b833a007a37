"""The outcome of a gate as SARIF 2.1.0, for code scanning: the guilty line of the user's code.

OASIS Standard, "Static Analysis Results Interchange Format (SARIF) Version 2.1.0". Paths are
relative to the folder of the configuration, `SRCROOT`.
"""

import hashlib
import json
from importlib import metadata
from typing import Any
from urllib.parse import quote

from nanhunt.gate.table import CHECKS, PAGE, Check
from nanhunt.records import Outcome
from nanhunt.report.gated.rows import Row, place, rows_of, told

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
_INDEX = {check.id: index for index, check in enumerate(CHECKS)}


def render(outcome: Outcome) -> str:
    """The document."""
    run = {
        "tool": {"driver": _driver()},
        "automationDetails": {"id": "nanhunt/gate/"},
        "columnKind": "unicodeCodePoints",
        "originalUriBaseIds": {"SRCROOT": {"description": {"text": "the configuration's folder"}}},
        "invocations": [_invocation(outcome)],
        "results": [_result(row, outcome) for row in rows_of(outcome, "finding", "allowed")],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _driver() -> dict[str, Any]:
    try:
        version = metadata.version("nanhunt")
    except metadata.PackageNotFoundError:
        version = "0"
    return {
        "name": "nanhunt",
        "version": version,
        "rules": [_rule(check) for check in CHECKS],
    }


def _rule(check: Check) -> dict[str, Any]:
    more = f"`nanhunt explain {check.id}`, or {PAGE} of nanhunt, say more."
    words = check.slug.replace("-", " ").title().replace(" ", "")
    return {
        "id": check.id,
        "name": words,
        "shortDescription": {"text": f"{check.title[0].upper()}{check.title[1:]}."},
        "fullDescription": {"text": check.help},
        "help": {"text": f"{check.help} {more}", "markdown": f"{check.help} {more}"},
        "defaultConfiguration": {"level": "error"},
        "properties": {"tags": ["gradients", "numerical stability"], "precision": "very-high"},
    }


def _invocation(outcome: Outcome) -> dict[str, Any]:
    """Whether everything could be run, and what was not."""
    told_of = [f"{case} could not be run: {why}" for case, why in outcome.broken]
    unrun = [
        f"{row.first.check} was not run: {row.first.message} ({row.where})"
        for row in rows_of(outcome, "not run")
    ]
    notes = [{"level": "error", "message": {"text": text}} for text in told_of]
    notes += [{"level": "note", "message": {"text": text}} for text in unrun]
    return {
        "executionSuccessful": not outcome.broken,
        "exitCode": outcome.exit_code,
        "toolExecutionNotifications": notes,
    }


def _result(row: Row, outcome: Outcome) -> dict[str, Any]:
    one = row.first
    file, line = place(one, outcome.config)
    text = told(one) + (f" ({row.where})" if row.where else "")
    marks = "\n".join([one.check, one.case, one.name, *row.variants])
    result: dict[str, Any] = {
        "ruleId": one.check,
        "ruleIndex": _INDEX[one.check],
        "level": "error" if one.status == "finding" else "note",
        "message": {"text": text},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": quote(file), "uriBaseId": "SRCROOT"},
                    "region": {"startLine": max(line, 1)},
                }
            }
        ],
        "partialFingerprints": {"nanhunt/v1": hashlib.sha256(marks.encode()).hexdigest()[:32]},
    }
    if one.status == "allowed":
        result["suppressions"] = [{"kind": "external", "justification": one.reason}]
    return result
