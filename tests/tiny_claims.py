"""A hypothesis file about a tiny model, put together from claims of known outcome."""

HEAD = """
schema = 1
id = "claims"
title = "Claims on a tiny model"
version = 1
rationale = "exercises every outcome"
tags = ["tiny-claims"]
"""

HOLDS = """
[[expect]]
id = "holds"
metric = "top1_energy"
scope = "C"
op = ">="
threshold = 0.0
origin = "always true"
"""

FAILS = """
[[expect]]
id = "fails"
metric = "top1_energy"
scope = "C"
op = "<="
threshold = 0.001
origin = "never true"
"""

NO_SUCH_PHASE = """
[[expect]]
id = "no-such-phase"
metric = "intra_cosine"
scope = "B"
op = ">="
threshold = 0.5
origin = "a phase that 12 layers are too few for"
"""

AGREE = """
[[expect]]
id = "agree"
metric = "intra_cosine"
scope = "C"
op = ">="
threshold = 0.0
origin = "always true, and about directions"
"""

ABOVE_ITS_CONTROL = """
[[expect]]
id = "above-its-control"
metric = "top1_energy"
scope = "C"
op = ">="
than = { null = "random-weights" }
origin = "needs the record of the control"
"""

CLAIMS = HEAD + HOLDS + FAILS + NO_SUCH_PHASE
"""Claims with a verdict of each kind."""

NO_FAILURE = HEAD + HOLDS + AGREE
"""Claims for runs in which the verdict does not matter."""
