"""The words of a report and how its numbers are computed, for the reader of the page; the definitions stand in tables
and stability.
"""

from analysis.statistics.stability import SPIKE_FLOOR, SPIKE_THRESHOLD, SPIKE_WINDOW

LEGEND = (
    (
        "run, arm, seed",
        "A run is one training with one resolved config. Runs that differ in nothing but seeds are an arm.",
    ),
    (
        "n, mean, sd, excluded",
        "n runs enter the mean and the standard deviation (denominator n − 1) of an arm: the finished ones with a "
        "finite metric. Excluded are the others: diverged, failed, unfinished, or finished without a finite metric. "
        "An arm whose runs diverge is not better for it: read the mean beside the number excluded.",
    ),
    (
        "difference to float32",
        "Mean over seeds of (metric in the format − metric in float32), the same seed, optimizer and every other "
        "setting in both; seeds of which one run is excluded are left out and counted.",
    ),
    (
        "95% interval",
        "Mean ± t(0.975, n − 1) · sd / √n over the n seeds (Student). It takes seeds as independent draws and their "
        "differences as normal; it says nothing about other models, data, step counts or learning rates. Every "
        "interval stands for itself: among twenty, one is expected to miss. For n = 1 there is none; for n = 2 it has "
        "one degree of freedom and is wide.",
    ),
    (
        "worse, better, undecided",
        "The interval lies wholly on the worse side of 0, wholly on the better side, or contains 0. Undecided does "
        "not mean equal. An interval without width is undecided, too: all seeds differ by the same step of a coarse "
        "metric. The same in every pair: no pair differs at all, so that the setting or format did nothing here.",
    ),
    (
        "claim, prediction, p corrected",
        "A claim stands in the grid's file before its runs. It predicts that the means over seeds of some differences "
        "lie below a bound. p is that of a two-sided t test of the mean against its bound, corrected for all "
        "predictions about one model (Holm). Below 0.05 a prediction came true or false, by the side on which the "
        "mean lies; else it is undecided. It cannot come true where a run of it diverged. A claim is supported when "
        "all its predictions came true, refuted when one came out false.",
    ),
    (
        "seeds to decide",
        "The number of seeds with which that test would decide with a chance of 80%, at the level of the strictest of "
        "the corrected tests, were the mean and the spread measured the true ones.",
    ),
    (
        "loss to the format",
        "How much the metric changes from float32 to the format. Comparing optimizers: (format − float32) of one "
        "minus (format − float32) of the other, paired by seed. A reference with several settings takes part with the "
        "one that is best in float32.",
    ),
    (
        "where they end",
        "The metric of one optimizer minus that of the reference in the same format, paired by seed. An optimizer can "
        "lose less to a format and still end behind, or the other way round.",
    ),
    (
        "more seeds",
        "So many beyond those there are would decide a comparison with a chance of 80%, were the mean and the spread "
        "measured the true ones; few seeds tell both badly, so it is an order of magnitude.",
    ),
    (
        "one model of all runs",
        "A linear mixed model of the metric: the grid's factors as fixed effects against float32, AdamW and the levels "
        "that the grid lists first, optimizer × format where the grid has every combination, a random intercept by "
        "seed (REML, statsmodels). Intervals and p are Student's with the degrees of freedom that are left within "
        "seeds; p corrected is for all effects of a task (Holm). Only counted runs enter.",
    ),
    (
        "diverged, failed, unfinished",
        "Diverged: the loss was no longer finite, or what else the run's cause says. Failed: an error stopped it. "
        "Unfinished: it has no result yet. The interval of a divergence rate is Wilson's, over finished and diverged "
        "runs.",
    ),
    (
        "spikes",
        f"Times that a logged training loss exceeds the median of the {SPIKE_WINDOW} before it by more than "
        f"{SPIKE_THRESHOLD:g} robust standard deviations (1.4826 · median absolute deviation) and by more than "
        f"{SPIKE_FLOOR:.0%} of that median; neighbours are one spike. Mean over the arm's finished runs; the largest "
        "is the highest jump above that median.",
    ),
    (
        "weight growth",
        "Least-squares slope of log(norm of all weights) against the step, per 1000 steps: 0.69 is a doubling every "
        "1000 steps. Mean over finished runs.",
    ),
    (
        "gradient noise",
        "Robust standard deviation of the logarithm of the gradient norm about a line fitted to it, over the second "
        "half of training: 0.2 is about 20%. A proxy read off one norm a step, not the gradient noise scale. Mean "
        "over finished runs.",
    ),
    (
        "frontier, breaks, best rate",
        "Of `lpsim frontier`. A seed holds at a learning rate when it does not diverge there and ends at most the "
        "stated margin above its own run at the arm's best rate: that at which fewest seeds diverge and then the mean "
        "loss is lowest. A rate holds when the stated share of seeds hold, else it breaks. The frontier is the largest "
        "rate up to which, from the best one on, every rate tried holds. That what has broken stays broken is an "
        "assumption; an arm with trials against it is marked.",
    ),
    (
        "largest stable learning rate",
        "The largest rate tried at which a run finished and none diverged, below the smallest rate at which one did.",
    ),
)
