"""The losses over the global batch: which passages a query sees, what its scores are worth, and what teaches
them.

settings      every number of the unified loss, from the recipe
negatives     which columns each query's softmax sees
distillation  teachers of a query's own group, and the margin rule
rows          which losses there are, and how they add up
unified       the loss over whole score matrices, and the choice between it and the next
tiled, tiles  the same where the matrices would not fit
limits        when that is
"""
