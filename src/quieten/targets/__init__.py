r"""Where the references of stable targets come from, and what they take away; `target` makes the targets.

diagnosis  How noisy training is at each level: the variance of plain and of stable targets, and what is left of a
           network's loss.
pools      Where the references of stable targets come from.
posterior  Averages over a set of references, weighted as x_t says: the exact posterior mean when the clean data are that
           set.
"""
