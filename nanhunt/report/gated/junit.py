"""The outcome of a gate as JUnit XML: one test suite per case, one test per check and variant."""

from xml.etree import ElementTree as ET  # nothing is parsed with it

from nanhunt.gate.table import BY_ID
from nanhunt.records import Checked, Outcome
from nanhunt.report.gated.rows import told
from nanhunt.report.layout import clean


def render(outcome: Outcome) -> str:
    """The document."""
    cases: dict[str, list[Checked]] = {}
    for one in outcome.checked:
        cases.setdefault(one.case or outcome.config, []).append(one)
    suites = ET.Element("testsuites", name="nanhunt gate")
    for case, checked in cases.items():
        suites.append(_suite(case, checked))
    for case, why in outcome.broken:
        suites.append(_broken(case, why))
    for key in ("tests", "failures", "errors", "skipped"):
        suites.set(key, str(sum(int(suite.get(key, "0")) for suite in suites)))
    suites.set("time", f"{outcome.seconds:.3f}")
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _suite(case: str, checked: list[Checked]) -> ET.Element:
    failures = sum(one.status == "finding" for one in checked)
    skipped = sum(one.status == "not run" for one in checked)
    suite = _empty(case, tests=len(checked), failures=failures, skipped=skipped)
    for one in checked:
        title = " · ".join(filter(None, [one.check, BY_ID[one.check].slug, one.variant, one.name]))
        test = ET.SubElement(suite, "testcase", classname=clean(case), name=clean(title))
        if one.file and one.line:
            test.set("file", clean(one.file))
            test.set("line", str(one.line))
        if one.status == "finding":
            body = ET.SubElement(test, "failure", type=one.check, message=clean(told(one)))
            body.text = clean(f"{one.file}:{one.line}" if one.file else one.message)
        elif one.status == "not run":
            ET.SubElement(test, "skipped", message=clean(one.message))
        elif one.status == "allowed":
            output = ET.SubElement(test, "system-out")
            output.text = clean(f"allowed: {one.reason}: {one.message}")
    return suite


def _broken(case: str, why: str) -> ET.Element:
    suite = _empty(case, tests=1, errors=1)
    test = ET.SubElement(suite, "testcase", classname=clean(case), name="the step runs")
    ET.SubElement(test, "error", type="NanhuntError", message=clean(why))
    return suite


def _empty(case: str, **counts: int) -> ET.Element:
    numbers = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0, **counts}
    texts = {key: str(value) for key, value in numbers.items()}
    return ET.Element("testsuite", {"name": clean(case), **texts})
