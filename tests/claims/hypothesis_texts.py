"""The text of a good hypothesis file, and edits of it: those that are right, and those that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from delta_suite.claims.loader import load_hypothesis
from delta_suite.errors import HypothesisFileError
from delta_suite.metrics.registry import METRICS

# The slips below give line numbers of this text.
GOOD = '''\
schema = 1
id = "phase-c"
title = "Phase C"
version = 3
rationale = """
[[expect]]
id = "not a table"
"""
tags = ["phase-c", "deep"]

[[expect]]
id = "direction"
metric = "intra_cosine"
scope = "C"
op = ">="
threshold = 0.5
origin = "made up"

[[expect.xfail]]
models = ["gemma3-*", "gpt2"]
reason = "sinks"

[[expect]]
id = "rank"
metric = "effective_rank"
scope = "layers:8-15"
over = "each"
mostly = 0.8
op = "<"
than = { scope = "model", times = 2 }
severity = "warn"
rationale = "why not"
origin = "made up"
'''


ALSO_GOOD = [
    ("", ""),
    ("0.5", "1"),
    ("threshold = 0.5", 'than.scope = "E"'),
    ("threshold = 0.5", 'than = { scope = "C", metric = "cross_cosine" }'),
    ('"intra_cosine"\nscope = "C"', '"gamma"\nscope = "layer:3"'),
    ('"intra_cosine"\nscope = "C"', '"adjacent_cosine"\nscope = "layer:3"'),
    ('"intra_cosine"\nscope = "C"', '"boundary_p"\nscope = "model"'),
    ('"C"', '"layers:3-9"'),
    ('"C"', '"some_Phase1"'),
    ('"intra_cosine"', '"capture_fraction"\nover = "median"'),
    ('"intra_cosine"', '"block_effective_rank"\nover = "mean"'),
    ('tags = ["phase-c", "deep"]', "tags = []"),
    ("mostly = 0.8\n", ""),
    ('over = "each"\nmostly = 0.8', "mostly = 1"),
    ('"intra_cosine"\nscope = "C"', '"gamma"\nscope = "depth:0.5-1"'),
    ('"intra_cosine"', '"gamma"\nover = "trend"'),
    ('"intra_cosine"\nscope = "C"', '"gamma"\nscope = "model"\nover = "correlation"\nwith = "effective_rank"'),
    ('over = "each"\nmostly = 0.8', 'over = "peak"'),
    (
        'over = "each"\nmostly = 0.8\nop = "<"\nthan = { scope = "model", times = 2 }',
        'over = "valley"\nop = "<"\nthan = { null = "random-weights" }',
    ),
    ('scope = "model", times = 2', 'scope = "layers:8-15"'),
    ('scope = "model", times = 2', 'scope = "C", plus = -0.2'),
    ('scope = "model", times = 2', 'scope = "C", metric = "shared_fraction"'),
    ('scope = "model", times = 2', 'null = "window", quantile = 0.9'),
    ('scope = "model", times = 2', 'null = "random-weights", scope = "C", metric = "stable_rank", times = 2'),
]
"""Edits of GOOD that are right: old text and new."""


class Slip(NamedTuple):
    """One wrong edit of GOOD, and the loader's message."""

    old: str
    new: str
    says: str
    expressible: bool = True
    """Whether the JSON Schema refuses it too: it knows keys, types and words, and no rules between keys."""


CLAIMS = GOOD[GOOD.index('\n[[expect]]\nid = "direction') :]
SCOPES = (
    "name a phase (C), one layer (layer:3), a range of layers (layers:8-15), a share of the depth (depth:0.5-1) "
    "or all layers (model)"
)
HEAD_KEYS = "schema, id, title, version, rationale, tags, expect"
CLAIM_KEYS = (
    "id, metric, scope, variant, write, over, with, mostly, op, threshold, than, severity, rationale, origin, xfail"
)
ID_RULE = "write it in small letters, digits and hyphens, beginning with a letter or digit"
MARKER_RULE = "a pytest marker has letters, digits, hyphens and underscores, and begins with a letter"
TAKEN = "already means something to pytest or its plugins: choose another word"
ORIGIN = "where the threshold or the comparison comes from"
SEVERAL = "is one: name a phase, model, or a range of layers"
NO_LIMIT = "which nothing can be compared with: write a finite number"
BOTH = "threshold and than are both given, and a claim compares with one: remove the other"

NO_SINKS = 'what attention and mlp write is measured without sinks: add variant = "sink_free" or "centred"'
OF_BLOCKS = "is measured of whole blocks alone, as attention and mlp have spectra and directions"

# fmt: off
SLIPS = [
    # figures of a profile
    Slip('"layers:8-15"', '"depth:0.8-0.5"', "26: scope 'depth:0.8-0.5' runs backwards: write 'depth:0.5-0.8'", False),
    Slip('"layers:8-15"', '"depth:0.5-0.5"', "26: scope 'depth:0.5-0.5' holds no layer: a layer is in it from the "
         "first share on and before the second", False),
    Slip('"layers:8-15"', '"depth:0.5-1.5"', f'26: scope is "depth:0.5-1.5": {SCOPES}'),
    Slip('"intra_cosine"', '"intra_cosine"\nover = "trend"', '14: over = "trend" follows a metric of single layers, '
         "and intra_cosine is one of a phase: name another", False),
    Slip('"layers:8-15"\nover = "each"\nmostly = 0.8', '"layer:8"\nover = "peak"',
         "27: a peak is taken over several layers, and 'layer:8' is one: name a phase, model, or a range", False),
    Slip('over = "each"\nmostly = 0.8', 'over = "correlation"',
         '23: over = "correlation" is one metric with another over the layers: add with = "<metric>"', False),
    Slip('over = "each"\nmostly = 0.8', 'over = "trend"\nwith = "gamma"',
         '28: with names the other metric of a correlation: add over = "correlation", or remove with', False),
    Slip('over = "each"\nmostly = 0.8', 'over = "correlation"\nwith = "effective_rank"',
         "28: effective_rank is correlated with itself: name another metric", False),
    Slip('over = "each"\nmostly = 0.8', 'over = "correlation"\nwith = "gama"',
         "28: unknown metric 'gama': did you mean 'gamma'?"),
    Slip('over = "each"\nmostly = 0.8\nop = "<"\nthan = { scope = "model", times = 2 }',
         'over = "trend"\nop = "<"\nthan = { null = "lag" }',
         '29: null = "lag" is not formed of a trend: use random-weights or window', False),
    # keys
    Slip("threshold", "treshold", "16: unknown key 'treshold': did you mean 'threshold'?"),
    Slip("title", "Title", "3: unknown key 'Title': did you mean 'title'?"),
    Slip("version = 3", "version = 3\n\nzzz = 1", f"6: unknown key 'zzz': use one of {HEAD_KEYS}"),
    Slip('scope = "model",', 'scop = "model",', "30: unknown key 'scop': did you mean 'scope'?"),
    Slip("reason", "raison", "21: unknown key 'raison': did you mean 'reason'?"),
    Slip("schema = 1", "line = 1\nschema = 1", f"1: unknown key 'line': use one of {HEAD_KEYS}"),
    Slip('"direction"', '"direction"\nline = 3', f"13: unknown key 'line': use one of {CLAIM_KEYS}"),
    Slip("severity", "tags = []\nseverity",
         "31: 'tags' is a key of the head of the file, not of [[expect]]: move it there"),
    Slip("reason", 'severity = "warn"\nreason',
         "21: 'severity' is a key of [[expect]], not of [[expect.xfail]]: move it there"),
    Slip("schema = 1", 'op = ">"\nschema = 1',
         "1: 'op' is a key of [[expect]], not of the head of the file: move it there"),
    Slip("severity", "times = 2\nseverity", "31: 'times' is a key of than, not of [[expect]]: move it there"),
    Slip('origin = "made up"\n\n', "\n", f"11: missing key 'origin' in [[expect]]: add it ({ORIGIN})"),
    Slip("schema = 1\n", "",
         "1: missing key 'schema' in the head of the file: add it (the version of the file format, 1)"),
    Slip('reason = "sinks"', "",
         "19: missing key 'reason' in [[expect.xfail]]: add it (why the claim is expected to fail there)"),
    Slip('scope = "model", ', 'null = "windows", ', "30: unknown null 'windows': did you mean 'window'?"),
    Slip('scope = "model", ', "null = 1, ", '30: null must be a string, "...", not 1'),
    Slip('scope = "model", ', "",
         '30: than names no other side: add scope = "E", or null = "window"', False),
    Slip(CLAIMS, "",
         "1: missing key 'expect' in the head of the file: add it (at least one [[expect]] table, each a claim)"),
    Slip(CLAIMS, "\nexpect = []", "11: expect is empty: give at least one"),
    # words
    Slip("intra_cosine", "intra_cosin", "13: unknown metric 'intra_cosin': did you mean 'intra_cosine'?"),
    Slip("intra_cosine", "qqq", f"13: unknown metric 'qqq': use one of {', '.join(METRICS)}"),
    Slip("severity", 'variant = "row"\nseverity', "31: unknown variant 'row': did you mean 'raw'?"),
    Slip('">="', '"=>"', "15: unknown op '=>': did you mean '>='?"),
    Slip('">="', '"=="', "15: unknown op '==': use one of >=, <=, >, <"),
    Slip('">="', "1", "15: op must be one of >=, <=, >, <, not 1"),
    Slip('"each"', '"every"',
         "27: unknown over 'every': use one of mean, median, min, max, each, trend, peak, valley, correlation"),
    Slip('"warn"', '"warning"', "31: unknown severity 'warning': did you mean 'warn'?"),
    Slip("times = 2 }", 'metric = "gama" }', "30: unknown metric 'gama': did you mean 'gamma'?"),
    Slip('"C"', '"layers:8..15"', f'14: scope is "layers:8..15": {SCOPES}'),
    Slip('"C"', '"layer:03"', f'14: scope is "layer:03": {SCOPES}'),
    Slip('"C"', '"layers:15-8"', "14: scope 'layers:15-8' runs backwards: write 'layers:8-15'", False),
    Slip('"direction"', '"Phase C"', f'12: id is "Phase C": {ID_RULE}'),
    Slip('"phase-c"\n', '"-c"\n', f'2: id is "-c": {ID_RULE}'),
    Slip('"deep"', '\n"not so deep"', f'10: item 2 of tags is "not so deep": {MARKER_RULE}'),
    Slip('"deep"', '"hypothesis"', f"9: tag 'hypothesis' {TAKEN}"),
    Slip('"deep"', '"skip"', f"9: tag 'skip' {TAKEN}"),
    Slip('"made up"\n\n', '" "\n\n', '17: origin is " ": write at least a word'),
    Slip('"sinks"', '""', '21: reason is "": write at least a word'),
    # types and numbers
    Slip("schema = 1", "schema = 2",
         "1: schema = 2 cannot be read here, only schema = 1: a higher one needs a newer delta-suite"),
    Slip("schema = 1", "schema = true", "1: schema must be a whole number, not true"),
    Slip("version = 3", "version = 3.0", "4: version must be a whole number, not 3.0"),
    Slip("version = 3", "version = 0", "4: version is 0, and must be greater than or equal to 1"),
    Slip("0.5", '"0.5"', '16: threshold must be a number, not "0.5"'),
    Slip("0.5", "false", "16: threshold must be a number, not false"),
    Slip("0.5", "nan", f"16: threshold is nan, {NO_LIMIT}", False),
    Slip("0.5", "-inf", f"16: threshold is -inf, {NO_LIMIT}"),
    Slip("times = 2", "times = inf", f"30: times is inf, {NO_LIMIT}"),
    Slip("times = 2", "times = 0", "30: times is 0, and must be greater than 0"),
    Slip("times = 2", 'plus = "2"', '30: plus must be a number, not "2"'),
    Slip("times = 2", "plus = inf", f"30: plus is inf, {NO_LIMIT}"),
    Slip("mostly = 0.8", "mostly = 80", "28: mostly is 80, and must be less than or equal to 1"),
    Slip("mostly = 0.8", "mostly = 0.0", "28: mostly is 0.0, and must be greater than 0"),
    Slip('"Phase C"', "1979-05-27 07:32:00", '3: title must be a string, "...", not a date or time'),
    Slip('["gemma3-*", "gpt2"]', '"gpt2"', '20: models must be an array, [...], not "gpt2"'),
    Slip('["gemma3-*", "gpt2"]', "[]", "20: models is empty: give at least one"),
    Slip('"gpt2"]', "2]", '20: item 2 of models must be a string, "...", not 2'),
    Slip('["phase-c", "deep"]', "{ a = 1 }", "9: tags must be an array, [...], not a table"),
    Slip("[[expect.xfail]]", "[expect.xfail]",
         "19: xfail is one table, and must be an array of them: write its header as [[expect.xfail]]"),
    Slip('than = { scope = "model", times = 2 }', 'than = "model"', '30: than must be a table, not "model"'),
    Slip(CLAIMS, "\nexpect = [\n1]", "12: item 1 of expect must be a table, not 1"),
    # between keys
    Slip("threshold = 0.5\n", "",
         '11: nothing to compare with: add threshold = <number>, or than = { scope = "E" }', False),
    Slip("severity", "threshold = 1\nseverity", f"30: {BOTH}", False),
    Slip("severity", "threshold = nan\nseverity", f"30: {BOTH}\n31: threshold is nan, {NO_LIMIT}", False),
    Slip('"C"', '"layer:3"', f"14: intra_cosine is taken over several layers, and 'layer:3' {SEVERAL}", False),
    Slip('"C"', '"layers:3-3"', f"14: intra_cosine is taken over several layers, and 'layers:3-3' {SEVERAL}", False),
    Slip("threshold = 0.5", 'than.scope = "layer:3"',
         f"16: intra_cosine is taken over several layers, and 'layer:3' {SEVERAL}", False),
    Slip('scope = "model", times = 2', 'scope = "layer:1", metric = "shared_fraction"',
         f"30: shared_fraction is taken over several layers, and 'layer:1' {SEVERAL}", False),
    Slip('"intra_cosine"', '"block_effective_rank"\nover = "median"',
         '14: block_effective_rank is one number for a phase, with none per layer: remove over = "median"', False),
    Slip("threshold = 0.5", 'over = "max"\nthan.scope = "E"\nthan.metric = "shared_fraction"',
         '18: shared_fraction is one number for a phase, with none per layer: remove over = "max"', False),
    Slip('"intra_cosine"', '"boundary_p"',
         '14: boundary_p is one number for the whole model under its phase map: write scope = "model"', False),
    Slip("threshold = 0.5", 'than = { scope = "E", metric = "boundary_p" }',
         '16: boundary_p is one number for the whole model under its phase map: write scope = "model"', False),
    Slip('"intra_cosine"\nscope = "C"', '"boundary_p"\nscope = "model"\nover = "max"',
         '15: boundary_p is one number for a model, with none per layer: remove over = "max"', False),
    Slip('over = "each"\n', "",
         '27: mostly is the share of layers that must hold: add over = "each", or remove mostly', False),
    Slip("threshold = 0.5", 'than = { times = 2, scope = "C" }',
         "16: intra_cosine over C is compared with itself: name another scope or metric", False),
    Slip('"rank"', '"direction"', "24: id 'direction' is that of the claim in line 12 too: rename one of them", False),
    Slip('scope = "model", times = 2', 'null = "window", times = 2',
         '30: times does not go with null = "window": remove it', False),
    Slip('scope = "model", times = 2', 'null = "lag", scope = "E"',
         '30: scope does not go with null = "lag": remove it', False),
    Slip('scope = "model", times = 2', 'scope = "E", quantile = 0.9',
         '30: quantile goes with null = "window" or null = "drift" or null = "random": remove it', False),
    # attention and MLP
    Slip('scope = "C"', 'scope = "C"\nwrite = "ml"', "15: unknown write 'ml': did you mean 'mlp'?"),
    Slip('scope = "C"', 'scope = "C"\nwrite = "mlp"', f"15: {NO_SINKS}", False),
    Slip("threshold = 0.5", 'than = { scope = "E", write = "attention" }', f"16: {NO_SINKS}", False),
    Slip('"intra_cosine"\nscope = "C"', '"relative_step"\nscope = "C"\nvariant = "centred"\nwrite = "mlp"',
         f'16: relative_step {OF_BLOCKS}: remove write = "mlp", or name another metric', False),
    Slip('"intra_cosine"\nscope = "C"', '"sharing_index"\nscope = "C"\nvariant = "centred"\nwrite = "mlp"',
         f'16: sharing_index {OF_BLOCKS}: remove write = "mlp", or name another metric', False),
    Slip("threshold = 0.5", 'variant = "centred"\nthan = { metric = "alignment", scope = "E", write = "mlp" }',
         f'17: alignment {OF_BLOCKS}: remove write = "mlp", or name another metric', False),
    Slip("threshold = 0.5", 'variant = "centred"\nwrite = "mlp"\nthan = { scope = "C", write = "mlp" }',
         "18: intra_cosine over C is compared with itself: name another scope or metric", False),
    Slip('scope = "model", times = 2', 'null = "lag", write = "mlp"',
         '30: write does not go with null = "lag": remove it', False),
]
# fmt: on


def slipped(slip: Slip) -> str:
    """Return GOOD with this edit."""
    assert slip.old in GOOD
    return GOOD.replace(slip.old, slip.new, 1)


def errors_of(path: Path) -> list[str]:
    """Return the lines of the loader's message, without the path."""
    try:
        load_hypothesis(path)
    except HypothesisFileError as error:
        return [line.removeprefix(f"{path}:") for line in str(error).splitlines()]
    return []
