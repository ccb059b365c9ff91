"""The names of the site's pages, and the links to them from the site's folder."""

from __future__ import annotations

import hashlib
from urllib.parse import quote

from delta_suite.records.store import folder_name

SITE = "site"
"""The site's folder in the results folder."""

PAGES = "models"
"""The folder of the pages of models in the site."""

RUNS = "trajectories"
"""The folder of the pages of training runs in the site."""

HYPOTHESES = "hypotheses"
"""The folder of the pages of hypothesis files in the site."""

RECORDS = "records"
"""The folder of the records in the site, where they are published with it."""

FOLDERS = (PAGES, RUNS, HYPOTHESES, RECORDS)
"""The folders of the site that hold nothing but what was published."""


def page_name(model: str) -> str:
    """Return the file of a model's page in `models/`. A name that another could share gets a part of its hash."""
    folder = folder_name(model)
    safe = "".join(sign if sign.isalnum() or sign in "-_.@" else "-" for sign in folder)
    if safe == model.replace("/", "--") and "--" not in model:
        return f"{safe}.html"
    return f"{safe}-{hashlib.sha256(model.encode()).hexdigest()[:8]}.html"


def page_link(model: str) -> str:
    """Return the link to a model's page from the site's folder."""
    return f"{PAGES}/{quote(page_name(model))}"


def run_page_name(run: str) -> str:
    """Return the file of a training run's page in `trajectories/`."""
    return page_name(run.removesuffix("*").rstrip("-_@"))


def run_link(run: str) -> str:
    """Return the link to a training run's page from the site's folder."""
    return f"{RUNS}/{quote(run_page_name(run))}"


def hypothesis_link(hypothesis: str) -> str:
    """Return the link to the page of a hypothesis's file from the site's folder."""
    return f"{HYPOTHESES}/{quote(hypothesis)}.html"


def claim_anchor(group: str, hypothesis: str, claim: str) -> str:
    """Return the anchor of a claim on a model's page, in the section of one table."""
    return f"{group}-{hypothesis}-{claim}"
