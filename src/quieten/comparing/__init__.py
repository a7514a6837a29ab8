r"""Samplers side by side, as `quieten compare` has them.

compare  Samplers side by side: each cell of a comparison is drawn in chunks that are kept, then judged.
judge    What samples are judged by: one reference, one extractor of features, the metrics that take them, and what they
         remember.
lineup   Who takes part in a comparison: samplers by name, on a model, at numbers of steps.
"""
