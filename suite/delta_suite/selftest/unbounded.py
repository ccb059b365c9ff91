"""Reasons why single figures of the self-test are shown and not bounded; docs/weaknesses.md has what was tried."""

from __future__ import annotations

BY_CHANCE = "true of the drawn layers by chance over depth, which resampling documents cannot show and a rank can"

TIED = "the two largest eigenvalues are equal, so the truth lies at the end of the range"

EQUAL = "all eigenvalues are equal, so the truth lies at the end of the range"

NEAR_ONE = (
    "what the figure lacks of 1 is a squared error of directions, to which noise adds: 6% with 80 documents, 3% with "
    "160 and 1% with 320, where samples of 80 differ by 6%; taking that away by the jackknife makes the figure spread "
    "1.7 times as much"
)

DRAWN = (
    "the 8th and 9th singular values are nearly equal, so that samples choose other sets of 8 directions, and the "
    "figure is drawn towards that of arbitrary ones: four times the documents divide this bias by 1.5 at first, "
    "which no jackknife takes away; with a gap after the 8th most of it is gone"
)

EXCHANGED = (
    "the 8th and 9th singular values are nearly equal, so that deleting a domain exchanges directions of the sets, and "
    "replicates spread 1.4 (C) and 1.8 (E) times as much as samples differ; with a gap after the 8th and a basis of "
    "all directions, 1.0 and 1.3 times"
)

MEDIAN = (
    "two layers lie well below the one in the middle, and one or two less than their error above it, so that the "
    "median of the measured values is nearly the least of these, 0.6 to 0.8 standard errors below that of the true "
    "ones; of single layers the intervals cover"
)

OVERFIT = (
    "a layer's own map gains little on the shared one beside what it overfits, and deleting groups of documents "
    "overstates how much the overfit varies, by 1.2 to 1.9, so the interval is too wide"
)

FLAT = (
    "the residual is nearly equal in all 32 directions, so that the half that is fitted on cannot tell the leading "
    "one; the other half has a share of 1/32 along what it finds, and the largest eigenvalue a little more"
)
