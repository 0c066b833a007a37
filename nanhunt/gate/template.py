"""What `nanhunt init` writes: a configuration to start from, and a workflow that runs the gate."""

CONFIGURATION = """\
# What `nanhunt gate` replays and checks. Every key, every check: docs/gate.md and docs/checks.md.
[tool.nanhunt]
# A function that returns (model, batch, loss_fn) or a nanhunt.Subject.
subject = SUBJECT
batches = [0]
seeds = [0]
# One plain step each; leave out what your training never uses.
variants = ["native", "fp64", "fp32", "amp-bf16-net", "amp-fp16-net"]
# Weights or loss terms without which the step is to be finite as well.
ablations = []
# Gradient norms of a state that you found good: `nanhunt gate --update-baseline` writes it.
baseline = "nanhunt-baseline.json"
# Checks that may not be left out, such as "NH008" once there is a baseline.
require = []

[tool.nanhunt.thresholds]
norm = [1e-10, 1e4]    # of every group of parameters
ratio = 1e6            # between the largest and the smallest of them
baseline_factor = 10   # by which a norm may move
fp64 = 1e-3            # relative distance of FP32 gradients from FP64

# Options of the function.
# [tool.nanhunt.options]
# preset = "tiny"

# Several subjects; what they do not say themselves is as above.
# [[tool.nanhunt.subjects]]
# subject = "train.py:build"

# A finding that is known: it is let through until that day.
# [[tool.nanhunt.allow]]
# check = "NH004"
# name = "head.unused.*"
# reason = "the auxiliary head is trained in the second stage"
# until = 2030-01-31
"""

JOB = """\
name: gradients
on: [push, pull_request]
permissions:
  contents: read
  security-events: write # to upload the SARIF file
jobs:
  nanhunt:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.12"
          cache: pip
      - run: pip install torch --index-url https://download.pytorch.org/whl/cpu
      - run: pip install nanhunt -e .
      # Annotations and the job's summary come by themselves.
      - run: nanhunt gate --sarif nanhunt.sarif --junit nanhunt.xml
      - uses: github/codeql-action/upload-sarif@v3
        if: always()
        with:
          sarif_file: nanhunt.sarif
"""
