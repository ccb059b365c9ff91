"""Sums over disjoint groups of units, from which the participation ratio of centred updates has no bias of their mean.

Updates less their sample mean are not independent between groups, because each group enters the mean: pairs of
different groups then give a ratio that is too small, 49.5 where the truth is 56.5 with ten groups of two tokens. So the
mean is taken from groups that enter nothing else (arXiv 2509.26560). With x_1 .. x_4 from four different groups, and
Sigma the covariance of the updates,

    (tr Sigma)^2 = E[ |x_1|^2 |x_2|^2 - 2 |x_1|^2 x_2 . x_3 + (x_1 . x_2)(x_3 . x_4) ],
    tr Sigma^2   = E[ (x_1 . x_2)^2   - 2 (x_1 . x_2)(x_1 . x_3) + (x_1 . x_2)(x_3 . x_4) ],

and each expectation is a sum over all choices of different groups, over the number of tuples of tokens in it. Moving
all updates by one vector changes neither, so they may be taken about their sample mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

FEWEST = 4
"""Groups with tokens, of which four must differ."""


def centred_pairs(
    tokens: Sequence[int],
    traces: Float64[np.ndarray, " groups"],
    squares: float,
    products: Float64[np.ndarray, "groups groups"],
    through: Float64[np.ndarray, "groups 4"],
    without: int | None = None,
) -> tuple[float, float] | None:
    """Return estimates of (tr Sigma)^2 and tr Sigma^2 from all groups, or all but one; None with fewer than FEWEST.

    All are of the updates about the mean of all groups: `traces` tr G_a; `squares` the sum of tr G_a G_b over all pairs
    of different groups that enter; `products` t_a . t_b of the groups' summed updates t. `through` holds for each group
    t_a^T G_a t_a, tr(G_a K), t_a^T S t_a and t_a . u, where K = sum t_b t_b^T, S = sum G_b and u = sum G_b t_b.
    """
    kept = np.array([a for a, count in enumerate(tokens) if count and a != without])
    if len(kept) < FEWEST:
        return None
    n = np.asarray(tokens, dtype=np.float64)[kept]
    first, second, third, fourth = (float((n**power).sum()) for power in (1, 2, 3, 4))
    pairs = first**2 - second
    triples = first**3 - 3 * first * second + 2 * third
    quadruples = first**4 - 6 * first**2 * second + 3 * second**2 + 8 * first * third - 6 * fourth
    trace, product = traces[kept], products[np.ix_(kept, kept)].copy()
    np.fill_diagonal(product, 0.0)
    rows = product.sum(axis=1)
    both = product.sum()
    squared_trace = trace.sum() ** 2 - (trace**2).sum()
    trace_of_mean = (trace * (both - 2 * rows)).sum()
    mean_of_mean = both**2 - 4 * (rows**2).sum() + 2 * (product**2).sum()
    alone, of_all, whole, mixed = through.T
    # Sum over a, b, c different of t_b^T G_a t_c. The t sum to 0, so that without g those left sum to -t_g.
    through_mean = 2 * alone[kept].sum() - of_all[kept].sum()
    if without is not None:
        through_mean += 2 * (whole[without] - alone[without]) + 2 * (mixed[without] - alone[without])
    spread = mean_of_mean / quadruples
    return (
        float(squared_trace / pairs - 2 * trace_of_mean / triples + spread),
        float(squares / pairs - 2 * through_mean / triples + spread),
    )
