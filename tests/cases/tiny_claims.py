"""Two claims that always hold, about layers and about directions, for runs in which the verdict does not matter."""

CLAIMS = """
schema = 1
id = "claims"
title = "Claims about a tiny model"
version = 1
rationale = "Figures of layers and of directions."

[[expect]]
id = "positive"
metric = "top1_energy"
scope = "C"
op = ">="
threshold = 0.0
origin = "always true"

[[expect]]
id = "agree"
metric = "intra_cosine"
scope = "C"
op = ">="
threshold = 0.0
origin = "always true"
"""
